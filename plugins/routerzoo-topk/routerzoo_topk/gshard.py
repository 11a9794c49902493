"""GShardRouter: two experts, the second by chance (Lepikhin et al., ICLR 2021, https://arxiv.org/abs/2006.16668)."""
# Shape suffixes: T tokens, D model width, E experts, K choices per token.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import final

import torch
from torch import Tensor, nn

from routerzoo import ByMode, LayerSpec, LogitRouter, LossWeight, Routing, RoutingContext, register_router
from routerzoo.functional import gate_linear


@register_router
@final
class GShardRouter(LogitRouter):
    """Linear gate whose second expert is kept, in training, with probability twice its weight.

    The weights are the softmax over the two largest logits (algorithm 1). In training each choice but the first is
    dropped with probability `1 - 2 * weight`; the others keep their weights. Loss `balance`, coefficient 0.01.

    The published layer also has a capacity, and its loss counts first choices alone; here it counts both, before any
    is dropped.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: experts per token; 2 as published.
        init_std: standard deviation of the gate's initial weights.
    """

    paper = "Lepikhin et al., ICLR 2021, arXiv:2006.16668"
    default_loss_weights: Mapping[str, float | LossWeight] = {"balance": 0.01}

    def __init__(self, spec: LayerSpec, *, top_k: int = 2, init_std: float = 0.02) -> None:
        super().__init__(spec, top_k=top_k)
        self.normalized &= ByMode(training=False)
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * init_std)

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return `x W^T`."""
        return gate_linear(x_TD, self.weight)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Drop second choices in training."""
        routing = super().route(x_TD, context)
        experts_TK, weights_TK = routing.experts_TK, routing.weights_TK
        if not self.training or experts_TK is None or weights_TK is None:
            return routing
        dropped_TK = torch.rand_like(weights_TK) >= 2 * weights_TK
        dropped_TK[:, 0] = False
        return replace(
            routing,
            experts_TK=experts_TK.masked_fill(dropped_TK, -1),
            weights_TK=weights_TK.masked_fill(dropped_TK, 0.0),
            may_drop=True,
            selected=routing,
        )
