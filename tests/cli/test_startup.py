"""The command line's imports."""

import subprocess
import sys

PROGRAM = """
import gc, sys
from routerzoo.cli.startup import quick_imports
with quick_imports():
    import routerzoo.cli.main
    assert not gc.isenabled()
assert gc.isenabled()
assert "scipy.signal" not in sys.modules, "somebody needs it: what quick_imports does for it is of no use any more"
from scipy.signal import get_window
import scipy.signal.windows
assert scipy.signal.get_window is get_window is scipy.signal.windows.get_window
"""
USED_MEANWHILE = """
import inspect, sys
from routerzoo.cli.startup import quick_imports
with quick_imports():
    import scipy.signal
    stand_in = scipy.signal
    inspect.getmodule(inspect.currentframe())  # asks every module for its file
    assert sys.modules["scipy.signal"] is stand_in
    import scipy.signal.windows
    from scipy.signal import get_window
    assert stand_in.get_window is get_window is scipy.signal.windows.get_window
    assert sys.modules["scipy.signal"] is not stand_in
    assert not hasattr(stand_in, "no_such_name")
import scipy.signal
assert scipy.signal.get_window is get_window
"""


def test_the_command_line_does_not_wait_for_scipys_signals():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)


def test_who_needs_scipys_signals_meanwhile_has_them():
    subprocess.run([sys.executable, "-c", USED_MEANWHILE], check=True)
