"""Gemma4Router: a gate on normalized hidden states, and a learned scale for each expert's output (Gemma 4)."""
# Shape suffixes: T tokens, D model width, E experts, K choices per token.

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from routerzoo import LayerSpec, LogitRouter, RoutingContext, register_router
from routerzoo.functional import gate_linear
from routerzoo.functional.gate import at_least_float32


@register_router
@final
class Gemma4Router(LogitRouter):
    """Linear gate on scaled, RMS-normalized hidden states, whose weights are scaled expert by expert.

    `z = W (s * rms_norm(x) / sqrt(D))`. The weights are the softmax over the k largest z, times `expert_scale` of each
    expert: a scale of its output. As transformers 5.24 has it (`Gemma4TextRouter`). In Gemma 4 the router sees the
    hidden states before the norm that the experts see; `MoE` takes the former as `router_input`.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: experts per token; Gemma 4 takes 8.
        eps: added to the mean square.
        init_std: standard deviation of the gate's initial weights.
    """

    paper = "Google DeepMind 2026 (transformers 5.24, gemma4)"
    normalized = False
    nonnegative = False
    trains_at_top_1 = True  # by the scales

    def __init__(self, spec: LayerSpec, *, top_k: int = 2, eps: float = 1e-6, init_std: float = 0.02) -> None:
        super().__init__(spec, top_k=top_k)
        self.eps = eps
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * init_std)
        self.input_scale = nn.Parameter(torch.ones(spec.d_model))
        self.expert_scale = nn.Parameter(torch.ones(spec.num_experts))

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return `W (s * rms_norm(x) / sqrt(D))`."""
        x_TD = at_least_float32(x_TD)
        x_TD = x_TD * (x_TD.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return gate_linear(x_TD * self.input_scale * self.spec.d_model**-0.5, self.weight)

    def combine_weights(self, logits_TE: Tensor, experts_TK: Tensor, *, may_drop: bool = True) -> Tensor:
        """Return the softmax over the given experts, each times its scale."""
        weights_TK = super().combine_weights(logits_TE, experts_TK, may_drop=may_drop)
        return weights_TK * self.expert_scale[experts_TK.clamp_min(0) if may_drop else experts_TK]
