"""BaseLayerRouter: tokens and experts as a linear assignment (Lewis et al. 2021, https://arxiv.org/abs/2103.16716)."""
# Shape suffixes: T tokens, R real tokens (not padding), D model width, E experts.

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routerzoo import LayerSpec, Router, Routing, RoutingContext, register_router
from routerzoo.distributed.collectives import rows_of_all_ranks
from routerzoo.functional.topk import topk


@register_router
@final
class BaseLayerRouter(Router):
    """BASE layer: in training each expert gets equally many tokens, assigned so that the scores' sum is the largest.

    Top-1. The score is `x . e` for an expert embedding e, the weight its sigmoid. Training solves the assignment by
    auction, over the tokens of the batch; evaluation takes the best expert (Lewis et al. 2021, section 3). No loss.

    The paper assigns within a worker's tokens, after shuffling them over workers; here the tokens of all processes that
    train together are assigned together, so that results do not depend on how many there are.
    Like `SBaseRouter`, its training looks at other tokens and its evaluation does not.

    Args:
        spec: sizes of the layer the router sits in.
        precision: bids rise by this share of the scores' spread at least; the sum of scores falls short of the best one
            by no more than that per token. A smaller one takes more rounds.
        max_rounds: of the auction; then tokens without an expert take what is left.
        init_gain: of the orthogonal embeddings.

    Raises:
        ValueError: a precision that is not positive.
    """

    paper = "Lewis et al., ICML 2021, arXiv:2103.16716"
    compiles = False
    causal_form = "ExpertThresholdRouter"

    def __init__(
        self, spec: LayerSpec, *, precision: float = 0.02, max_rounds: int = 1000, init_gain: float = 0.1
    ) -> None:
        if precision <= 0:
            raise ValueError(f"precision must be above 0, got {precision}")
        super().__init__(spec, top_k=1, max_top_k=1)
        self.precision, self.max_rounds = precision, max_rounds
        self.expert_embedding = nn.Parameter(torch.empty(spec.num_experts, spec.d_model))
        nn.init.orthogonal_(self.expert_embedding, gain=init_gain)

    @property
    def causal(self) -> bool:  # type: ignore[override]
        """Evaluation is; training assigns all tokens together."""
        return not self.training

    @property
    def batch_independent(self) -> bool:  # type: ignore[override]
        """Evaluation is; training assigns all tokens together."""
        return not self.training

    @torch.no_grad()
    def scale_initial_logits(self, factor: float) -> None:
        """Scale the embeddings."""
        self.expert_embedding.mul_(factor)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Assign in training, choose in evaluation."""
        logits_TE = F.linear(x_TD, self.expert_embedding)
        experts_T1 = topk(logits_TE, 1)[1]
        if self.training:
            scores_TE = logits_TE.detach()
            real_R = None if context.padding_mask is None else (~context.padding_mask).nonzero().squeeze(1)
            scores_RE = scores_TE if real_R is None else scores_TE.index_select(0, real_R)
            all_RE, own = rows_of_all_ranks(scores_RE, context.process_group)
            assigned_R1 = balanced_assignment(all_RE, self.precision, self.max_rounds)[own].unsqueeze(1)
            experts_T1 = assigned_R1 if real_R is None else experts_T1.index_copy(0, real_R, assigned_R1)
        return Routing(experts_T1, logits_TE.gather(1, experts_T1).sigmoid(), logits_TE, may_drop=False)


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
        # A token that is no number has no best expert; its weight will tell.
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
