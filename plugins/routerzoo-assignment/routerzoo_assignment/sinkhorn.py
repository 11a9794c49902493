"""SinkhornRouter: token choice balanced by optimal transport (Liu et al. 2024, https://arxiv.org/abs/2401.15969)."""
# Shape suffixes: T tokens, D model width, E experts, K choices per token.

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from routerzoo import LayerSpec, LogitRouter, Routing, RoutingContext, register_router
from routerzoo.functional import gate_linear, topk_indices
from routerzoo_assignment.transport import check_transport, transport_plan


@register_router
@final
class SinkhornRouter(LogitRouter):
    """Sinkhorn token choice: experts are the k largest of a token's row of the transport plan of its image.

    The balance holds within each sequence or image, in training and in evaluation; weights are the softmax of the
    logits ("Sinkhorn TC": entropy weight 1, 20 iterations). In training the plan is of logits with normal noise of
    standard deviation `noise / E`, the weights of those without, as in the authors' code family (V-MoE,
    `kl_projection_routing.py`). The plan looks at all tokens of a sequence, so this is not for decoders. It costs
    `iterations` passes over `[T, E]`.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: experts per token.
        epsilon: weight of the plan's entropy.
        iterations: of Sinkhorn's algorithm.
        renormalize: divide the weights by their sum.
        noise: in training, standard deviation of the logits' noise times E.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: an entropy weight that is not positive, no iterations, or negative noise.
    """

    paper = "Liu et al. 2024, arXiv:2401.15969"
    requires = frozenset({"sequence_ids"})
    causal = False
    causal_form = "SBaseRouter in evaluation, or ExpertThresholdRouter"
    tokenwise = False
    compiles = False

    def __init__(
        self,
        spec: LayerSpec,
        *,
        top_k: int = 2,
        epsilon: float = 1.0,
        iterations: int = 20,
        renormalize: bool = False,
        noise: float = 1.0,
        init_std: float = 0.02,
    ) -> None:
        check_transport(epsilon, iterations)
        if noise < 0:
            raise ValueError(f"noise must be at least 0, got {noise}")
        super().__init__(spec, top_k=top_k, renormalize=renormalize)
        self.epsilon, self.iterations, self.noise = epsilon, iterations, noise
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * init_std)

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return `x W^T`."""
        return gate_linear(x_TD, self.weight)

    def noise_std(self, x_TD: Tensor) -> float | None:
        """Return `noise / E`."""
        return self.noise / self.spec.num_experts or None

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Select by the plan, weight by the logits without noise."""
        noisy_TE, clean_TE, _ = self.noisy_logits(x_TD, context)
        logits_TE = noisy_TE if clean_TE is None else clean_TE
        plan_TE = transport_plan(noisy_TE, context, scope="sequence", epsilon=self.epsilon, iterations=self.iterations)
        experts_TK = topk_indices(plan_TE, self.top_k)
        return Routing(experts_TK, self.combine_weights(logits_TE, experts_TK), logits_TE, may_drop=False)

    def select_experts(self, logits_TE: Tensor) -> Tensor:
        """Refuse: selection looks at whole sequences."""
        raise NotImplementedError("SinkhornRouter selects experts by the plan of a sequence, not by logits alone")
