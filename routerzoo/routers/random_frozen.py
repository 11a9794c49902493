"""RandomFrozenRouter: SMoE-Dropout's gate (Chen et al., ICLR 2023, https://arxiv.org/abs/2303.01610)."""
# Shape suffixes: T tokens, D model width, E experts, K choices per token.

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from routerzoo.functional.topk import softmax_at, topk_indices, topk_softmax
from routerzoo.registry import register_router
from routerzoo.router import Router
from routerzoo.routing import LayerSpec, Routing, RoutingContext


@register_router
@final
class RandomFrozenRouter(Router):
    """Linear gate that is drawn at random once and never learns.

    `z = x W^T + b`, weights by softmax over the k largest. The gradient passes *through* the frozen gate into the
    hidden states, so the model learns to be routed; copies that wrap the gate in `no_grad` cut that path.

    SMoE-Dropout also lets k grow over training; that schedule is not the router's: see `routerzoo.callbacks.KSchedule`.
    No auxiliary loss. W and b are buffers: no optimiser, and no `requires_grad_(True)`, can move them. Initial values
    as in the authors' Transformer-XL code: N(0, 0.02) and 0.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: experts per token.
        init_std: standard deviation of the gate's weights.
    """

    paper = "Chen et al., ICLR 2023, arXiv:2303.01610"
    trainable = False
    normalized = True
    trains_at_top_1 = False
    weight: Tensor
    bias: Tensor

    def __init__(self, spec: LayerSpec, *, top_k: int = 2, init_std: float = 0.02) -> None:
        super().__init__(spec, top_k=top_k)
        self.register_buffer("weight", torch.randn(spec.num_experts, spec.d_model) * init_std)
        self.register_buffer("bias", torch.zeros(spec.num_experts))

    def scale_initial_logits(self, factor: float) -> None:
        """Scale the gate."""
        self.weight *= factor

    def select_experts(self, logits_TE: Tensor) -> Tensor:
        """Choose the k largest."""
        return topk_indices(logits_TE, self.top_k)

    def combine_weights(self, logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """Take the softmax over the chosen logits."""
        return softmax_at(logits_TE, experts_TK)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Take the k largest logits of the frozen gate."""
        logits_TE = F.linear(x_TD, self.weight, self.bias)
        weights_TK, experts_TK = topk_softmax(logits_TE, self.top_k)
        return Routing(experts_TK, weights_TK, logits_TE, may_drop=False)
