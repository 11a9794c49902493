"""SwitchRouter: one expert a token (Fedus et al., JMLR 2022, https://arxiv.org/abs/2101.03961)."""
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
class SwitchRouter(LogitRouter):
    """Linear gate whose experts are weighted by their probability, with jitter on its input in training.

    `p = softmax(x W^T)`, the expert is the largest, its weight p (equations 1 and 2). In training x is multiplied
    elementwise with random numbers in `1 - jitter .. 1 + jitter`, for the gate alone. Loss `balance` (equations 4 to
    6), coefficient 0.01. The published layer also has a capacity.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: experts per token; 1 as published.
        jitter: how far the jitter goes.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: a jitter that is negative, or not below 1.
    """

    paper = "Fedus et al., JMLR 2022, arXiv:2101.03961"
    renormalize = False
    default_loss_weights: Mapping[str, float | LossWeight] = {"balance": 0.01}

    def __init__(self, spec: LayerSpec, *, top_k: int = 1, jitter: float = 0.01, init_std: float = 0.02) -> None:
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter must be at least 0 and below 1, got {jitter}")
        super().__init__(spec, top_k=top_k)
        self.jitter = jitter
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * init_std)

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return `x W^T`, of the jittered x in training."""
        if self.jitter and self.training:
            # In float32 at least: in bfloat16 the jitter would have five values.
            noise_TD = torch.empty_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
            x_TD = x_TD * noise_TD.uniform_(1 - self.jitter, 1 + self.jitter)
        return gate_linear(x_TD, self.weight)
