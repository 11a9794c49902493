"""Does `torch.func` transform what runs now?"""

from __future__ import annotations

import torch


def in_transform() -> bool:
    """Return whether `torch.func` transforms what runs now: it knows torch's own operations only."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
