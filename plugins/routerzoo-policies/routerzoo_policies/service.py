"""Counting against a capacity: who shares it, how large it is, and who is served first."""
# Shape suffixes: T tokens, E experts, K choices per token, N assignments, G groups of tokens (sequences).

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from routerzoo import Routing
from routerzoo.functional.ragged import Sequences

Order = Literal["token", "choice", "priority", "weight"]


class Groups(NamedTuple):
    """Tokens that share a capacity.

    Args:
        group_T: the group of each token; -1 for padding.
        sequences: the same, laid out in rows.
        capacity_G: tokens that an expert takes in each group, int64.
    """

    group_T: Tensor
    sequences: Sequences
    capacity_G: Tensor

    def bins(self, expert_N: Tensor, token_N: Tensor, num_experts: int) -> Tensor:
        """Return the number of each assignment's expert and group, int64 `[N]`; -1 for padding and for no expert."""
        group_N = self.group_T.index_select(0, token_N)
        return torch.where((expert_N >= 0) & (group_N >= 0), group_N * num_experts + expert_N, -1)

    def room(self, num_experts: int) -> Tensor:
        """Return the capacity of each bin, int64 `[G * E]`."""
        return self.capacity_G.repeat_interleave(num_experts)


def groups_of(
    sequences: Sequences, num_tokens: int, *, capacity_factor: float, choices: int, num_experts: int
) -> Groups:
    """Let the tokens of each sequence share `ceil(capacity_factor * S * choices / num_experts)` places of an expert."""
    length = sequences.real_GS.shape[1]
    group_T = sequences.token_R.new_full((num_tokens,), -1)
    if length:
        group_T = group_T.index_copy(0, sequences.token_R, sequences.place_R // length)
    capacity_G = capacity_factor * (sequences.lengths_G * choices) / num_experts
    return Groups(group_T, sequences, capacity_G.ceil().long())


def rank_in_bin(bin_N: Tensor, order_N: Tensor) -> Tensor:
    """Return how many assignments of the same bin are served before each one."""
    served_N = bin_N.index_select(0, order_N)
    sorted_N, by_bin_N = served_N.sort(stable=True)
    within_N = torch.arange(len(bin_N), device=bin_N.device) - torch.searchsorted(sorted_N, sorted_N)
    return torch.empty_like(bin_N).index_copy(0, order_N.index_select(0, by_bin_N), within_N)


def finds_room(bin_N: Tensor, order_N: Tensor, room: Tensor) -> Tensor:
    """Return which assignments find room where they are served in this order, bool `[N]`."""
    if not len(room):
        return bin_N >= 0
    return (bin_N >= 0) & (rank_in_bin(bin_N, order_N) < room[bin_N.clamp_min(0)])


def service_order(routing: Routing, order: Order) -> Tensor:
    """Return the assignments in the order in which they are served, int64 `[N]`.

    Raises:
        ValueError: an order by columns, of a routing that has none.
    """
    pairs = routing.assignments()
    in_order_N = torch.arange(len(pairs.token_N), device=pairs.token_N.device)
    if order == "token":
        return in_order_N
    if order == "weight":
        return pairs.weight_N.detach().sort(descending=True, stable=True).indices
    if routing.experts_TK is None or routing.weights_TK is None:
        raise ValueError(f"the order {order} needs choices in columns; take token or weight")
    num_tokens, top_k = routing.experts_TK.shape
    tokens_T = in_order_N[:num_tokens]
    if order == "priority" and top_k:
        tokens_T = routing.weights_TK.detach().amax(1).sort(descending=True, stable=True).indices
    return (tokens_T.unsqueeze(0) * top_k + in_order_N[:top_k].unsqueeze(1)).flatten()
