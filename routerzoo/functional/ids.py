"""Ids that a table can be asked for."""
# Shape suffixes: T tokens.

from __future__ import annotations

import torch
from torch import Tensor


def checked_ids(
    ids_T: Tensor,
    size: int,
    padding_mask: Tensor | None,
    use: str,
    advice: str = "mark padding in padding_mask, or build the model for more ids",
) -> Tensor:
    """Return ids as int64, 0 for padding, after a check that all are between 0 and `size - 1`.

    On a CPU the check reads the ids. On a GPU, and in a compiled or exported graph, it does not wait for the device: an
    assertion among the other kernels stops the process (GPU) or raises a RuntimeError (CPU), with the same sentence but
    for the id.

    Args:
        ids_T: ids.
        size: entries of the table.
        padding_mask: True for tokens that are not looked up.
        use: who looks what up, as the message begins.
        advice: what helps, as it ends.

    Raises:
        ValueError: ids that are not integers, or, on a CPU, out of range.
    """
    if ids_T.is_floating_point() or ids_T.is_complex() or ids_T.dtype == torch.bool:
        raise ValueError(f"{use}, and they are {ids_T.dtype}: give integers, torch.int64")
    ids_T = ids_T if ids_T.dtype == torch.int64 else ids_T.long()
    if padding_mask is not None:
        ids_T = ids_T.masked_fill(padding_mask, 0)
    advice = f"0 to {size - 1}: {advice}"
    if ids_T.is_meta:
        return ids_T
    if torch.compiler.is_compiling() or ids_T.device.type != "cpu":
        torch._assert_async(((ids_T >= 0) & (ids_T < size)).all(), f"{use}, {advice}")
    elif type(ids_T) is Tensor and len(ids_T):
        wrong_T = (ids_T < 0) | (ids_T >= size)
        if wrong_T.any():
            place = int(wrong_T.nonzero()[0])
            raise ValueError(f"{use}, and token {place} has {int(ids_T[place])}, not one of {advice}")
    return ids_T
