"""YuanRouter: attention between experts (Wu et al. 2024, https://arxiv.org/abs/2405.17976)."""
# Shape suffixes: T tokens, D model width, E and F experts.

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from routerzoo import LayerSpec, LogitRouter, RoutingContext, register_router
from routerzoo.functional import gate_linear


@register_router
@final
class YuanRouter(LogitRouter):
    """Attention router of Yuan 2.0-M32: a token's scores for experts attend to each other.

    `q, k, v = W_q x, W_k x, W_v x`, each with one number an expert; `logits = softmax(q k^T) v`, the softmax along the
    rows of the E x E products; softmax over the k largest (Wu et al. 2024, section 2.1). No tokens but its own, despite
    the name; no auxiliary loss. Beside three linear gates it costs `T * E^2` exponentials and as much memory.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: experts per token; the paper takes 2 of 32.
        init_std: standard deviation of the initial weights.
    """

    paper = "Wu et al. 2024, arXiv:2405.17976"

    def __init__(self, spec: LayerSpec, *, top_k: int = 2, init_std: float = 0.02) -> None:
        super().__init__(spec, top_k=top_k)
        self.weight = nn.Parameter(torch.randn(3 * spec.num_experts, spec.d_model) * init_std)

    @torch.no_grad()
    def scale_initial_logits(self, factor: float) -> None:
        """Scale the values: logits are averages of them."""
        self.weight[2 * self.spec.num_experts :].mul_(factor)

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return `softmax(q k^T) v`."""
        query_TE, key_TF, value_TF = gate_linear(x_TD, self.weight).chunk(3, dim=-1)
        attention_TEF = (query_TE.unsqueeze(2) * key_TF.unsqueeze(1)).softmax(-1)
        return (attention_TEF @ value_TF.unsqueeze(2)).squeeze(2)
