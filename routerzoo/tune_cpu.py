"""`tune_cpu`: settings of a process that make training on a CPU faster."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

# glibc's names for the options of `mallopt`, and the values that keep freed memory in the process.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER_TRIM, _NO_MMAP = 2**31 - 1, 0


def tune_cpu(*, keep_memory: bool = True, flush_denormals: bool = True) -> bool:
    """Make this process train faster on a CPU. Call it before the first step, and before threads start.

    `python -m routerzoo` does so by itself, unless the environment variable `ROUTERZOO_TUNE_CPU` is 0.

    Args:
        keep_memory: keep freed memory instead of handing it back to the operating system, which otherwise clears every
            page of every large gradient anew in each step. With many experts that is a third of a layer's time. The
            process then holds on to the most memory that it ever used. glibc only (most of Linux), and not where the
            environment already sets its `MALLOC_` variables.
        flush_denormals: take numbers below 1e-38 for zero. A softmax that has become sure is full of them, and a
            processor computes them some twenty times slower.

    Returns:
        Whether everything asked for was set; the rest is left as it was.
    """
    kept = not keep_memory or _keep_memory()
    flushed = not flush_denormals or torch.set_flush_denormal(True)
    return kept and flushed


def _keep_memory() -> bool:
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    return bool(mallopt(_M_MMAP_MAX, _NO_MMAP)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM))
