"""`Rows`: the assignments of tokens to experts, sorted by expert, for the low-memory form of the layer."""
# Shape suffixes: T tokens, N assignments, E experts.

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from routerzoo.routing import Routing


class Rows(NamedTuple):
    """Where assignments go when they are sorted by expert; indices are int32, experts int16 where they fit.

    Args:
        ends_E: where each expert's rows end. Rows from the last end on belong to none.
        expert_N: the expert of each row; E for none.
        order_N: the assignment in each row.
        source_N: the token in each row.
        row_N: the row of each assignment; assignments are in the order of tokens.
        begin_T: where each token's assignments begin, and at last N; None where all tokens have as many.
        top_k: assignments of every token, where all have as many.
        num_tokens: T.
    """

    ends_E: Tensor
    expert_N: Tensor
    order_N: Tensor
    source_N: Tensor
    row_N: Tensor
    begin_T: Tensor | None
    top_k: int | None
    num_tokens: int


def sorted_rows(routing: Routing, num_tokens: int, num_experts: int, *, by_kernel: bool = False) -> tuple[Rows, Tensor]:
    """Sort the assignments of a routing by expert, without a host synchronization.

    Args:
        routing: sparse or flat.
        num_tokens: T.
        num_experts: E.
        by_kernel: find everything in one Triton kernel, once they are sorted.

    Returns:
        The rows, and the weight of each assignment in the order of tokens.
    """
    token_N, begin_T, top_k = None, None, None
    if routing.experts_TK is not None and routing.weights_TK is not None:
        top_k = routing.experts_TK.shape[1]
        expert_N, weight_N = routing.experts_TK.reshape(-1), routing.weights_TK.reshape(-1)
    else:
        token_N, expert_N, weight_N, _, _ = routing.assignments()
        token_N, by_token_N = token_N.sort(stable=True)
        expert_N, weight_N = expert_N.index_select(0, by_token_N), weight_N.index_select(0, by_token_N)
        bounds_T = torch.arange(num_tokens + 1, device=token_N.device, dtype=token_N.dtype)
        begin_T = torch.searchsorted(token_N, bounds_T, out_int32=True)
    # Of few bits, which a GPU sorts in fewer passes; what names no expert goes behind the last one.
    key_N = expert_N.to(torch.int16 if num_experts + 1 < 2**15 else torch.int32)
    if routing.may_drop:
        key_N = key_N.remainder(num_experts + 1)
    sorted_N, order_N = key_N.sort(stable=True)
    if by_kernel:
        ends_E, order_N, source_N, row_N = _place_rows(sorted_N, order_N, token_N, top_k or 1, num_experts)
        return Rows(ends_E, sorted_N, order_N, source_N, row_N, begin_T, top_k, num_tokens), weight_N
    bounds_E = torch.arange(num_experts, device=sorted_N.device, dtype=sorted_N.dtype)
    ends_E = torch.searchsorted(sorted_N, bounds_E, right=True, out_int32=True)
    rising_N = torch.arange(len(order_N), device=order_N.device, dtype=torch.int32)
    row_N = torch.empty_like(rising_N).scatter_(0, order_N, rising_N)
    order_N = order_N.int()
    source_N = token_N.index_select(0, order_N).int() if token_N is not None else order_N // (top_k or 1)
    return Rows(ends_E, sorted_N, order_N, source_N, row_N, begin_T, top_k, num_tokens), weight_N


@custom_op("routerzoo::place_rows", mutates_args=())
def _place_rows(
    expert_N: Tensor, order_N: Tensor, token_N: Tensor | None, top_k: int, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from routerzoo.moe import kernel_calls  # Triton takes long to import, and is not everywhere

    with torch.cuda.device_of(expert_N):  # type: ignore[no-untyped-call]
        return kernel_calls.place_rows(expert_N, order_N, token_N, top_k, num_experts)


@_place_rows.register_fake
def _(
    expert_N: Tensor, order_N: Tensor, token_N: Tensor | None, top_k: int, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assignment_N, source_N, row_N = (torch.empty_like(order_N, dtype=torch.int32) for _ in range(3))
    return order_N.new_empty(num_experts, dtype=torch.int32), assignment_N, source_N, row_N
