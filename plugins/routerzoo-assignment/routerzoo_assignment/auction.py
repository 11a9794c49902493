"""A balanced linear assignment of tokens to experts, by auction."""
# Shape suffixes: R tokens, E experts, B bidders.

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def balanced_assignment(scores_RE: Tensor, precision: float = 0.02, max_rounds: int = 1000) -> Tensor:
    """Assign tokens to experts, at most `ceil(R / E)` each, so that the sum of scores is nearly the largest possible.

    An auction (Bertsekas and Castanon 1989): tokens bid for the expert that is worth most to them after its price, up
    to where another one would be worth as much, plus epsilon; an expert keeps its highest bids, and its price is the
    lowest of them once it is full. The result is within epsilon per token of the optimum.

    Args:
        scores_RE: what each expert is worth to each token.
        precision: epsilon as a share of the scores' spread.
        max_rounds: of bidding; tokens still without an expert then take free places.

    Returns:
        The expert of each token, int64 `[R]`.
    """
    num_tokens, num_experts = scores_RE.shape
    expert_R = scores_RE.new_full((num_tokens,), -1, dtype=torch.int64)
    if num_tokens == 0:
        return expert_R
    if num_experts == 1 or not scores_RE.isfinite().all():
        # A token that is NaN has no best expert; its weight will be NaN.
        return scores_RE.nan_to_num().argmax(1)
    capacity = -(-num_tokens // num_experts)
    epsilon = float((scores_RE.max() - scores_RE.min()).clamp_min(1e-6)) * precision
    bid_R = scores_RE.new_zeros(num_tokens)
    price_E = scores_RE.new_zeros(num_experts)
    for _ in range(max_rounds):
        bidder_B = (expert_R < 0).nonzero().squeeze(1)
        if len(bidder_B) == 0:
            return expert_R
        worth_B2, best_B2 = (scores_RE.index_select(0, bidder_B) - price_E).topk(2, dim=1)
        expert_R[bidder_B] = best_B2[:, 0]
        bid_R[bidder_B] = price_E[best_B2[:, 0]] + worth_B2[:, 0] - worth_B2[:, 1] + epsilon
        rank_R = _rank_within(expert_R, bid_R)
        last_R = (rank_R == capacity - 1) & (expert_R >= 0)
        price_E[expert_R[last_R]] = bid_R[last_R]
        expert_R[rank_R >= capacity] = -1
    free_E = capacity - torch.bincount(expert_R[expert_R >= 0], minlength=num_experts)
    left_B = (expert_R < 0).nonzero().squeeze(1)
    expert_R[left_B] = torch.repeat_interleave(torch.arange(num_experts, device=free_E.device), free_E)[: len(left_B)]
    return expert_R


def _rank_within(expert_R: Tensor, bid_R: Tensor) -> Tensor:
    """Return each token's place among the bids for its expert, the highest first."""
    order_R = bid_R.argsort(descending=True, stable=True)
    order_R = order_R.index_select(0, expert_R.index_select(0, order_R).argsort(stable=True))
    sorted_R = expert_R.index_select(0, order_R)
    begin_R = torch.searchsorted(sorted_R, sorted_R)
    place_R = torch.arange(len(order_R), device=order_R.device) - begin_R
    return torch.empty_like(order_R).index_copy(0, order_R, place_R)
