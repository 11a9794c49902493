"""SimBalRouter: an orthogonal gate in place of a loss on loads (SimBal 2025, https://arxiv.org/abs/2506.14038)."""
# Shape suffixes: T tokens, D model width, E experts.

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from routerzoo import LayerSpec, LogitRouter, LossWeight, RoutingContext, register_router
from routerzoo.functional import gate_linear
from routerzoo.functional.initialization import orthogonal


@register_router
@final
class SimBalRouter(LogitRouter):
    """Linear gate whose rows start orthonormal, and are kept so by a loss: similar tokens get similar experts.

    The weights are the softmax over the k largest logits. The loss `orthogonality` is the sum of `|W W^T - I|`,
    coefficient 0.1.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: experts per token.

    Raises:
        ValueError: more experts than d_model, which cannot be orthogonal.
    """

    paper = "SimBal 2025, arXiv:2506.14038"
    default_loss_weights: Mapping[str, float | LossWeight] = {"orthogonality": 0.1, "z": 1e-5}

    def __init__(self, spec: LayerSpec, *, top_k: int = 2) -> None:
        if spec.num_experts > spec.d_model:
            raise ValueError(
                f"{spec.num_experts} experts cannot be orthogonal in d_model = {spec.d_model}: take fewer experts"
            )
        super().__init__(spec, top_k=top_k)
        self.weight = nn.Parameter(orthogonal(spec.num_experts, spec.d_model))

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return `x W^T`."""
        return gate_linear(x_TD, self.weight)

    def own_losses(self, x_TD: Tensor, logits_TE: Tensor, context: RoutingContext) -> Mapping[str, Tensor]:
        """Return how far the gate is from orthonormal rows."""
        identity_EE = torch.eye(self.spec.num_experts, device=self.weight.device, dtype=self.weight.dtype)
        return {"orthogonality": (self.weight @ self.weight.T - identity_EE).abs().sum()}
