"""Imports and plugins that every run needs, loaded once, in the server that runs are forked from.

Import it nowhere else: it takes as long as a run's start.
"""

import routerzoo.cli.main  # noqa: F401
from routerzoo.tasks import class_paths

class_paths.load_plugins()
