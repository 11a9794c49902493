"""Which blocks of a model have a MoE layer."""

from __future__ import annotations

from typing import Literal

MoEBlocks = Literal["all", "every-other", "none"] | list[int]


def moe_block_indices(which: MoEBlocks, num_blocks: int) -> list[int]:
    """Return the indices of the blocks that get a MoE layer, ascending.

    Args:
        which: `all`; `every-other`, the second, the fourth and so on (as in GShard and V-MoE); `none`; or indices,
            negative ones counting from the end.
        num_blocks: blocks of the model.

    Raises:
        ValueError: an index that the model does not have, or one given twice.
    """
    if which == "all":
        return list(range(num_blocks))
    if which == "every-other":
        return list(range(1, num_blocks, 2))
    if which == "none":
        return []
    if isinstance(which, str):
        raise ValueError(f"moe_blocks must be all, every-other, none or a list of indices, got {which!r}")
    if bad := [index for index in which if not -num_blocks <= index < num_blocks]:
        raise ValueError(f"moe_blocks names block {bad[0]}; the model has {num_blocks}, from 0 to {num_blocks - 1}")
    chosen = sorted(index % num_blocks for index in which)
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"moe_blocks names a block twice: {which}")
    return chosen
