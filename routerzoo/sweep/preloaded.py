"""Imports and plugins that every run needs, loaded once, in the server that runs are forked from.

Import it nowhere else: it takes as long as a run's start.
"""

import routerzoo.cli.main  # noqa: F401
from routerzoo import registry

registry.load_plugins()
