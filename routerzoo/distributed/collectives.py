"""Collectives with gradients: all-reduce, all-gather, broadcast and all-to-all."""
# Shape suffixes: N rows sent, M rows received, D width, R ranks (processes of a group).

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Written with torch's plain collectives: those with gradients have been renamed or deprecated in every other release.


def all_ranks() -> dist.ProcessGroup | None:
    """Return the group of all processes; None where there is one alone."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All-reduce a tensor over the ranks of a group, with gradients.

    A loss that every rank computes from the sum counts once for each rank in the gradient; averaging gradients over
    ranks, as data parallelism does, makes that one again.

    Args:
        x: of the same shape on each rank.
        group: None for this process alone.
    """
    if group is None:
        return x
    summed: Tensor = _Sum.apply(x, group)
    return summed


@torch.no_grad()
def rows_of_all_ranks(x_ND: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, slice]:
    """All-gather rows, and return them in the order of the ranks with the place of this rank's. Without gradients.

    Args:
        x_ND: rows; ranks may have different numbers of them.
        group: None for this process alone.
    """
    if group is None:
        return x_ND, slice(0, len(x_ND))
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    count = torch.tensor([len(x_ND)], device=x_ND.device)
    counts_R = [torch.empty_like(count) for _ in range(size)]
    dist.all_gather(counts_R, count, group=group)
    counts = [int(count) for count in counts_R]
    padded_ND = x_ND.new_zeros(max(counts), *x_ND.shape[1:])
    padded_ND[: len(x_ND)] = x_ND
    parts = [torch.empty_like(padded_ND) for _ in range(size)]
    dist.all_gather(parts, padded_ND, group=group)
    begin = sum(counts[:rank])
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]), slice(begin, begin + counts[rank])


@torch.no_grad()
def of_first_rank(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Broadcast the first rank's tensor, so that all ranks decide alike."""
    x = x.clone()
    dist.broadcast(x, group=group, group_src=0)
    return x


def counts_from_ranks(counts_R: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-to-all: send row r to rank r, and return the rows received.

    Args:
        counts_R: int64 `[R, ...]`, a row for each rank.
        group: of the ranks.
    """
    received_R = torch.empty_like(counts_R)
    dist.all_to_all_single(received_R, counts_R.contiguous(), group=group)
    return received_R


def exchange_rows(x_ND: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """All-to-all of rows, with gradients, which go back the same way.

    Args:
        x_ND: rows in the order of the ranks that they are for.
        sent: rows for each rank.
        received: rows from each rank.
        group: of the ranks.

    Returns:
        `[M, D]`, in the order of the ranks that they are from.
    """
    rows_MD: Tensor = _Exchange.apply(x_ND, sent, received, group)
    return rows_MD


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_over_ranks(grad, ctx.group), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        rows_MD = x_ND.new_empty(sum(received), *x_ND.shape[1:])
        dist.all_to_all_single(rows_MD, x_ND.contiguous(), received, sent, group=group)
        return rows_MD

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None, None]:
        return exchange_rows(grad_MD, ctx.received, ctx.sent, ctx.group), None, None, None
