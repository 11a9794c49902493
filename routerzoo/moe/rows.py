"""`Rows`: the assignments of tokens to experts, sorted by expert, for the low-memory form of the layer."""
# Shape suffixes: T tokens, N assignments, E experts.

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from routerzoo.routing import Routing


class Order(NamedTuple):
    """Assignments sorted by expert: all that the backward pass keeps of them but their weights.

    Args:
        expert_N: the expert of each row, int16 where they fit; E for none.
        order_N: the assignment in each row; assignments are in the order of tokens.
        begin_T: where each token's assignments begin, and at last N; None where all tokens have as many.
        top_k: assignments of every token, where all have as many.
    """

    expert_N: Tensor
    order_N: Tensor
    begin_T: Tensor | None
    top_k: int | None


class Rows(NamedTuple):
    """What follows from an `Order`, computed in each pass; indices are int32.

    Args:
        ends_E: where each expert's rows end. Rows from the last end on belong to none.
        expert_N: the expert of each row; E for none.
        order_N: the assignment in each row.
        source_N: the token in each row.
        row_N: the row of each assignment.
        begin_T: as in `Order`.
        top_k: as in `Order`.
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


def sort_assignments(routing: Routing, num_tokens: int, num_experts: int) -> tuple[Order, Tensor]:
    """Sort the assignments of a routing by expert, without a host synchronization.

    Args:
        routing: sparse or flat.
        num_tokens: T.
        num_experts: E.

    Returns:
        Their order, and the weight of each assignment in the order of tokens.
    """
    begin_T, top_k = None, None
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
    return Order(sorted_N, order_N, begin_T, top_k), weight_N


def place_rows(order: Order, num_tokens: int, num_experts: int) -> Rows:
    """Return what follows from an order, by torch's own operations."""
    expert_N, order_N, begin_T, top_k = order
    bounds_E = torch.arange(num_experts, device=expert_N.device, dtype=expert_N.dtype)
    ends_E = torch.searchsorted(expert_N, bounds_E, right=True, out_int32=True)
    rising_N = torch.arange(len(order_N), device=order_N.device, dtype=torch.int32)
    row_N = torch.empty_like(rising_N).scatter_(0, order_N.long(), rising_N)
    order_N = order_N.int()
    if begin_T is None:
        source_N = order_N // (top_k or 1)
    else:
        source_N = torch.searchsorted(begin_T, order_N, right=True, out_int32=True) - 1
    return Rows(ends_E, expert_N, order_N, source_N, row_N, begin_T, top_k, num_tokens)
