"""OmniRouter: one gate for all layers (Gu et al. 2025, https://arxiv.org/abs/2507.05724)."""
# Shape suffixes: T tokens, D model width, E experts, K choices per token.

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routerzoo import LayerSpec, Router, Routing, RoutingContext, register_router
from routerzoo.functional.losses import balance_loss, scope_of
from routerzoo.functional.topk import gather_weights, topk, topk_indices

_CARRIED = "routerzoo_context.OmniRouter"


@register_router
@final
class OmniRouter(Router):
    """The linear gate of the first MoE layer decides in all of them, each time on that layer's hidden states.

    A top-k gate under the softmax, not renormalised (the paper takes k = 1), whose weights all layers share, so that
    experts of one index specialise together over depth. The first layer owns the parameters; the others get them in
    the context's `carry` and have none. Inspired by: the paper could be read second-hand only.

    Args:
        spec: sizes of the layer the router sits in; all MoE layers need the same.
        top_k: experts per token.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: in use, a later layer without the first one's gate in its context, or of other sizes.
    """

    paper = "Gu et al. 2025, arXiv:2507.05724"
    inspired_by = True
    default_loss_weights: ClassVar[Mapping[str, float]] = {"balance": 1e-2}

    def __init__(self, spec: LayerSpec, *, top_k: int = 1, init_std: float = 0.02) -> None:
        super().__init__(spec, top_k=top_k)
        own = torch.randn(spec.num_experts, spec.d_model) * init_std
        self.weight = nn.Parameter(own) if spec.layer == 0 else None
        self.trainable = self.trains_at_top_1 = spec.layer == 0

    @torch.no_grad()
    def scale_initial_logits(self, factor: float) -> None:
        """Scale the gate, where it is."""
        if self.weight is not None:
            self.weight.mul_(factor)

    def select_experts(self, logits_TE: Tensor) -> Tensor:
        """Choose the k largest."""
        return topk_indices(logits_TE, self.top_k)

    def combine_weights(self, logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """Take the softmax over all experts at the chosen ones."""
        return gather_weights(logits_TE.softmax(-1), experts_TK)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Take the k most probable experts."""
        if self.weight is not None:
            context.carry[_CARRIED] = self.weight
        gate_ED = context.carry.get(_CARRIED)
        if gate_ED is None:
            raise ValueError(
                f"the OmniRouter of MoE layer {self.spec.layer} uses the gate of layer 0: run that one before, and "
                "give both the same RoutingContext"
            )
        if gate_ED.shape != (self.spec.num_experts, self.spec.d_model):
            raise ValueError(
                f"layer 0's gate is for {gate_ED.shape[0]} experts and d_model {gate_ED.shape[1]}, layer "
                f"{self.spec.layer} has {self.spec.num_experts} and {self.spec.d_model}: one gate needs equal layers"
            )
        logits_TE = F.linear(x_TD, gate_ED.to(x_TD.dtype))
        probs_TE = logits_TE.softmax(-1)
        weights_TK, experts_TK = topk(probs_TE, self.top_k)
        losses = {}
        if self.training and context.compute_aux_losses:
            losses["balance"] = balance_loss(probs_TE, experts_TK, **scope_of("batch", context))
        return Routing(experts_TK, weights_TK, logits_TE, losses, probs_TE, may_drop=False)
