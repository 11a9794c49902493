"""BaseLayerRouter: tokens and experts as a linear assignment (Lewis et al. 2021, https://arxiv.org/abs/2103.16716)."""
# Shape suffixes: T tokens, R real tokens (not padding), D model width, E experts.

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from routerzoo import ByMode, LayerSpec, LogitRouter, Routing, RoutingContext, register_router
from routerzoo.distributed.collectives import rows_of_all_ranks
from routerzoo.functional import gate_linear
from routerzoo.functional.initialization import orthogonal
from routerzoo_assignment.auction import balanced_assignment


@register_router
@final
class BaseLayerRouter(LogitRouter):
    """BASE layer: in training each expert gets equally many tokens, assigned so that the scores' sum is the largest.

    Top-1. The score is `x . e` for an expert embedding e, the weight its sigmoid. Training solves the assignment by
    auction, over the tokens of the batch; evaluation takes the best expert (section 3). No loss.

    The paper assigns within a worker's tokens, after shuffling them over workers; here the tokens of all processes that
    train together are assigned together, so that results do not depend on how many there are.

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
    score_fn = "sigmoid"
    renormalize = False
    gate_name = "expert_embedding"
    causal = ByMode(training=False)
    causal_form = "ExpertThresholdRouter"
    batch_independent = ByMode(training=False)
    compiles = False

    def __init__(
        self, spec: LayerSpec, *, precision: float = 0.02, max_rounds: int = 1000, init_gain: float = 0.1
    ) -> None:
        if precision <= 0:
            raise ValueError(f"precision must be above 0, got {precision}")
        super().__init__(spec, top_k=1, max_top_k=1)
        self.precision, self.max_rounds = precision, max_rounds
        self.expert_embedding = nn.Parameter(orthogonal(spec.num_experts, spec.d_model, gain=init_gain))

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return the scores."""
        return gate_linear(x_TD, self.expert_embedding)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Assign in training, select in evaluation."""
        logits_TE = self.logits(x_TD, context)
        experts_T1 = self._assign(logits_TE.detach(), context) if self.training else self.select_experts(logits_TE)
        return Routing(experts_T1, self.combine_weights(logits_TE, experts_T1), logits_TE, may_drop=False)

    def _assign(self, logits_TE: Tensor, context: RoutingContext) -> Tensor:
        real_R = torch.arange(len(logits_TE), device=logits_TE.device)
        if context.padding_mask is not None:
            real_R = real_R[~context.padding_mask]
        all_RE, own = rows_of_all_ranks(logits_TE.index_select(0, real_R), context.process_group)
        assigned_R1 = balanced_assignment(all_RE, self.precision, self.max_rounds)[own].unsqueeze(1)
        return self.select_experts(logits_TE).index_copy(0, real_R, assigned_R1)
