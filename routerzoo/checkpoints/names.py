"""Names of weights, whatever a model was wrapped in when it was saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

WRAPPERS = frozenset({"_orig_mod", "module"})
"""What `torch.compile`, and wrappers such as `DistributedDataParallel`, put into the names of weights."""


def under_own_names(saved: Mapping[str, Any], own: Collection[str]) -> dict[str, Any]:
    """Return a state dict under a model's own names, where they differ from those saved by wrappers alone.

    Args:
        saved: state dict of a model that may have been wrapped.
        own: names of the model that is to load it, which may be wrapped too.
    """
    counts = Counter(map(_bare, own))
    known = {_bare(name): name for name in own if counts[_bare(name)] == 1}
    return {name if name in own else known.get(_bare(name), name): value for name, value in saved.items()}


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
