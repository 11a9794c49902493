"""VMoERouter: the noisy gate of V-MoE (Riquelme et al., NeurIPS 2021, https://arxiv.org/abs/2106.05974)."""
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
class VMoERouter(LogitRouter):
    """Linear gate with normal noise of standard deviation 1 / E on its logits in training.

    `p = softmax(x W^T + N(0, 1 / E))`; experts are the k largest, their weights p, not renormalized. Losses
    `importance` and `load` (appendix A), coefficient 0.005 each, summed over layers.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: experts per token.
        init_std: standard deviation of the gate's initial weights.
    """

    paper = "Riquelme et al., NeurIPS 2021, arXiv:2106.05974"
    renormalize = False
    default_loss_weights: Mapping[str, float | LossWeight] = {"importance": 0.005, "load": 0.005}

    def __init__(self, spec: LayerSpec, *, top_k: int = 2, init_std: float = 0.02) -> None:
        super().__init__(spec, top_k=top_k)
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * init_std)

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return `x W^T`."""
        return gate_linear(x_TD, self.weight)

    def noise_std(self, x_TD: Tensor) -> float:
        """Return 1 / E."""
        return 1 / self.spec.num_experts
