"""OmniRouter: one gate for all layers (Gu et al. 2025, https://arxiv.org/abs/2507.05724)."""
# Shape suffixes: T tokens, D model width, E experts.

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from routerzoo import LayerSpec, LogitRouter, LossWeight, RoutingContext, register_router
from routerzoo.functional import gate_linear


@register_router
@final
class OmniRouter(LogitRouter):
    """The linear gate of the first MoE layer decides in all of them, each time on that layer's hidden states.

    A top-k gate under the softmax, not renormalized (the paper takes k = 1), whose weights all layers share, so that
    experts of one index specialize together over depth. Layer 0 owns the parameters; the others read them from the
    context's `carry` and have none. Inspired by: the paper could be read second-hand only.

    Args:
        spec: sizes of the layer the router sits in; all MoE layers need the same.
        top_k: experts per token.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        UnmetRequirementError: the model does not number its layers.
        ValueError: in use, two routers in layer 0, or a later layer that its context gives no gate, or one of other
            sizes.
    """

    paper = "Gu et al. 2025, arXiv:2507.05724"
    inspired_by = True
    renormalize = False
    default_loss_weights: Mapping[str, float | LossWeight] = {"balance": 1e-2}

    def __init__(self, spec: LayerSpec, *, top_k: int = 1, init_std: float = 0.02) -> None:
        super().__init__(spec, top_k=top_k)
        weight = torch.randn(spec.num_experts, spec.d_model) * init_std
        self.weight = nn.Parameter(weight) if self.required_layer() == 0 else None
        self.trainable = self.trains_at_top_1 = spec.layer == 0

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return `x W^T`, W that of layer 0."""
        if self.weight is not None:
            owner, _ = context.carry.setdefault(OmniRouter, (self, self.weight))
            if owner is not self:
                raise ValueError(
                    "two OmniRouters of one forward pass say that they are in MoE layer 0, which owns the gate: number "
                    "the layers of the model, LayerSpec(..., layer=0), LayerSpec(..., layer=1) and so on"
                )
            return gate_linear(x_TD, self.weight)
        if OmniRouter not in context.carry:
            raise ValueError(
                f"the OmniRouter of MoE layer {self.spec.layer} uses the gate of layer 0: run that one before, and "
                "give both the same RoutingContext"
            )
        _, gate_ED = context.carry[OmniRouter]
        if gate_ED.shape != (self.spec.num_experts, self.spec.d_model):
            raise ValueError(
                f"layer 0's gate is for {gate_ED.shape[0]} experts and d_model {gate_ED.shape[1]}, layer "
                f"{self.spec.layer} has {self.spec.num_experts} and {self.spec.d_model}: one gate needs equal layers"
            )
        return gate_linear(x_TD, gate_ED)

    def scale_initial_logits(self, factor: float) -> None:
        """Multiply the gate, in the layer that owns it."""
        if self.weight is not None:
            super().scale_initial_logits(factor)
