"""SBaseRouter: optimal transport in training alone (Clark et al., ICML 2022, https://arxiv.org/abs/2202.01169)."""
# Shape suffixes: T tokens, D model width, E experts, K choices per token.

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from routerzoo import ByMode, LayerSpec, LogitRouter, Routing, RoutingContext, register_router
from routerzoo.functional import gate_linear, gather_weights, topk_indices
from routerzoo.functional.losses import Scope, fields_of_scope
from routerzoo_assignment.transport import check_transport, transport_plan


@register_router
@final
class SBaseRouter(LogitRouter):
    """S-BASE: in training, experts are the k largest of the transport plan of the batch; in evaluation, of the logits.

    Weights are sigmoid(logit) for k = 1, else the softmax over all experts, not renormalized (the form of Megatron-core
    0.19, with its tolerance of 1e-4). Its code takes the exponential of logits, which overflows; here it is all in the
    log domain. No auxiliary loss.

    Training looks at the whole batch, evaluation at a token alone. In a decoder it must therefore be allowed: its loss
    in training is flattered by what the balance reveals of later tokens, its evaluation is not.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: experts per token.
        epsilon: weight of the plan's entropy.
        iterations: of Sinkhorn's algorithm, at most.
        tolerance: stop when potentials move no further than that.
        scope: balance the batch, as published, or each sequence.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: an entropy weight that is not positive, or no iterations.
    """

    paper = "Clark et al., ICML 2022, arXiv:2202.01169"
    renormalize = False
    causal = ByMode(training=False)
    causal_form = "ExpertThresholdRouter"
    compiles = False

    def __init__(
        self,
        spec: LayerSpec,
        *,
        top_k: int = 1,
        epsilon: float = 1.0,
        iterations: int = 100,
        tolerance: float = 1e-4,
        scope: Scope = "batch",
        init_std: float = 0.02,
    ) -> None:
        check_transport(epsilon, iterations)
        super().__init__(spec, top_k=top_k)
        self.require(*fields_of_scope(scope))
        self.batch_independent = ByMode(training=scope == "sequence")
        self.epsilon, self.iterations, self.tolerance, self.scope = epsilon, iterations, tolerance, scope
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * init_std)

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return `x W^T`."""
        return gate_linear(x_TD, self.weight)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Select by the plan in training, by the logits in evaluation."""
        logits_TE = scores_TE = self.logits(x_TD, context)
        if self.training:
            scores_TE = transport_plan(
                logits_TE,
                context,
                scope=self.scope,
                epsilon=self.epsilon,
                iterations=self.iterations,
                tolerance=self.tolerance,
            )
        experts_TK = topk_indices(scores_TE, self.top_k)
        return Routing(experts_TK, self.combine_weights(logits_TE, experts_TK), logits_TE, may_drop=False)

    def combine_weights(self, logits_TE: Tensor, experts_TK: Tensor, *, may_drop: bool = True) -> Tensor:
        """Return the sigmoid of the one expert's logit, or the softmax at several experts; 0 for none (-1)."""
        scores_TE = logits_TE.sigmoid() if self.top_k == 1 else logits_TE.softmax(-1)
        return gather_weights(scores_TE, experts_TK, may_drop=may_drop)
