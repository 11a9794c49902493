"""TemplateRouter: what your router does, in a line, and where it was published."""
# Shape suffixes: T tokens, D model width, R width between the maps, E experts, K choices per token.

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routerzoo import LayerSpec, Router, Routing, RoutingContext, register_router
from routerzoo.functional.losses import balance_loss, scope_of
from routerzoo.functional.topk import softmax_at, topk_indices, topk_softmax


@register_router
@final
class TemplateRouter(Router):
    """Scores experts by a product of two low-rank maps, and takes the softmax over the k largest.

    `logits = up(down(x))`. Say here what a reader has to know to cite it: the equations, and where the paper is silent.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: experts per token.
        rank: width R between the maps.

    Raises:
        ValueError: a rank below 1.
    """

    paper = "You et al. 2027"
    # What is declared here is proved by the tests. `help(routerzoo.Router)` lists all properties with their defaults.
    normalized = True  # a token's weights sum to 1,
    trains_at_top_1 = False  # so that at k = 1 the weight is always 1, and teaches the gate nothing
    default_loss_weights: ClassVar[Mapping[str, float]] = {"balance": 1e-2}

    def __init__(self, spec: LayerSpec, *, top_k: int = 2, rank: int = 8) -> None:
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        super().__init__(spec, top_k=top_k)
        self.down = nn.Parameter(torch.randn(rank, spec.d_model) * spec.d_model**-0.5)
        self.up = nn.Parameter(torch.randn(spec.num_experts, rank) * 0.02)

    @torch.no_grad()
    def scale_initial_logits(self, factor: float) -> None:
        """Multiply the logits' scale, so that routers can be compared from the same start."""
        self.up.mul_(factor)

    def select_experts(self, logits_TE: Tensor) -> Tensor:
        """Choose by logits alone: optional, so that policies such as steering and replay can wrap the router."""
        return topk_indices(logits_TE, self.top_k)

    def combine_weights(self, logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """Weigh given experts: optional, likewise."""
        return softmax_at(logits_TE, experts_TK)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Choose experts. It is called in float32; the layer casts the weights back."""
        logits_TE = F.linear(F.linear(x_TD, self.down), self.up)
        weights_TK, experts_TK = topk_softmax(logits_TE, self.top_k)
        losses = {}
        if self.training and context.compute_aux_losses:
            # Raw: the task multiplies it with its coefficient. Padding counts for nothing.
            losses["balance"] = balance_loss(logits_TE.softmax(-1), experts_TK, **scope_of("batch", context))
        return Routing(experts_TK, weights_TK, logits_TE, losses, may_drop=False)
