"""RandomFrozenRouter: SMoE-Dropout's gate (Chen et al., ICLR 2023, https://arxiv.org/abs/2303.01610)."""
# Shape suffixes: T tokens, D model width, E experts.

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from routerzoo.functional.gate import gate_linear
from routerzoo.registry import register_router
from routerzoo.router import LogitRouter
from routerzoo.routing import LayerSpec, RoutingContext


@register_router
@final
class RandomFrozenRouter(LogitRouter):
    """Linear gate that is drawn at random once and never learns.

    `z = x W^T + b`, weights by softmax over the k largest. The gradient passes *through* the frozen gate into the
    hidden states, so the model learns to be routed; copies that wrap the gate in `no_grad` cut that path.

    SMoE-Dropout also lets k grow over training; that schedule is not the router's: see `routerzoo.callbacks.KSchedule`.
    No auxiliary loss. W and b are buffers: no optimizer, and no `requires_grad_(True)`, can move them. Initial values
    as in the authors' Transformer-XL code: N(0, 0.02) and 0.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: experts per token.
        init_std: standard deviation of the gate's weights.
    """

    paper = "Chen et al., ICLR 2023, arXiv:2303.01610"
    trainable = False
    weight: Tensor
    bias: Tensor

    def __init__(self, spec: LayerSpec, *, top_k: int = 2, init_std: float = 0.02) -> None:
        super().__init__(spec, top_k=top_k)
        self.register_buffer("weight", torch.randn(spec.num_experts, spec.d_model) * init_std)
        self.register_buffer("bias", torch.zeros(spec.num_experts))

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return `x W^T + b`."""
        return gate_linear(x_TD, self.weight, self.bias)
