"""`quick_imports`: the command line's imports, in three quarters of their time."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_SIGNAL = "scipy.signal"


class _Later(ModuleType):
    """Stands for `scipy.signal` until something of it is used."""

    # torchmetrics asks for this name alone, to add what scipy has renamed, for a package that is not used here.
    hamming = None

    def __getattr__(self, name: str) -> Any:
        # Those who list modules ask each for its file; that is no use.
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        if sys.modules.get(_SIGNAL) is self:
            del sys.modules[_SIGNAL]
        return getattr(importlib.import_module(_SIGNAL), name)


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import many modules in less time.

    Importing Lightning imports torchmetrics, and that all of `scipy.signal`, a sixth of the whole, to look for one name
    in it: it waits until somebody uses it. And the collector of cyclic garbage, which searches the new objects over and
    over and finds that all of them are needed, rests.
    """
    collected = gc.isenabled()
    stand_in = _SIGNAL not in sys.modules
    if stand_in:
        sys.modules[_SIGNAL] = _Later(_SIGNAL)
    gc.disable()
    try:
        yield
    finally:
        if isinstance(sys.modules.get(_SIGNAL), _Later):
            del sys.modules[_SIGNAL]
        if collected:
            gc.enable()
