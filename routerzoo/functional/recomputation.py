"""Is this forward pass the one that activation checkpointing repeats?"""

from __future__ import annotations

import torch


def in_backward() -> bool:
    """Return whether this thread is inside a backward pass, where a forward pass is a recomputation.

    Torch has no public name for it. A compiled graph recomputes by itself, without running Python again.
    """
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)


def backward_id() -> int:
    """Return a number that names the backward pass that this thread is in; -1 outside one."""
    return int(torch._C._current_graph_task_id())
