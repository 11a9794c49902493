"""TemplateRouter: what your router does, in a line, and where it was published."""
# Shape suffixes: T tokens, D model width, R width between the maps, E experts.

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from routerzoo import LayerSpec, LogitRouter, LossWeight, RoutingContext, register_router
from routerzoo.functional import gate_linear


@register_router
@final
class TemplateRouter(LogitRouter):
    """Scores experts by a product of two low-rank maps, and weights the k best by the softmax over their logits.

    `logits = up(down(x))`. Say here what a reader has to know to cite it: the equations, and where the paper is silent.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: experts per token.
        rank: width R between the maps.

    Raises:
        ValueError: a rank below 1.
    """

    paper = "You et al. 2027"
    gate_name = "up"  # the parameter that the logits are proportional to
    default_loss_weights: Mapping[str, float | LossWeight] = {"balance": 1e-2}

    def __init__(self, spec: LayerSpec, *, top_k: int = 2, rank: int = 8) -> None:
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        super().__init__(spec, top_k=top_k)
        self.down = nn.Parameter(torch.randn(rank, spec.d_model) * spec.d_model**-0.5)
        self.up = nn.Parameter(torch.randn(spec.num_experts, rank) * 0.02)

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return `up(down(x))`, float32 whatever the hidden states are."""
        return gate_linear(gate_linear(x_TD, self.down), self.up)
