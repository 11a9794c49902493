"""TopPRouter: as many experts as hold a share of the probability (Huang et al. 2024, arXiv:2403.07652)."""
# Shape suffixes: T tokens, D model width, E experts.

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from routerzoo import LayerSpec, LossWeight, RoutingContext, register_router
from routerzoo.functional import gate_linear
from routerzoo.functional.losses import masked_mean
from routerzoo_dynamic.mask import MaskRouter


@register_router
@final
class TopPRouter(MaskRouter):
    """Experts in the order of their probability, until their probabilities sum to the threshold.

    The expert that crosses the threshold is among them. Weights are the softmax over all experts, not renormalized
    ("Harder tasks need more experts", Huang et al. 2024, https://arxiv.org/abs/2403.07652, equations 4 to 6). A
    token that the gate is unsure of gets more experts; the loss `entropy`, the mean entropy of the softmax, keeps it
    from being unsure of all. The paper's coefficients are 1e-2 for `balance` and 1e-4 for `entropy`.

    Args:
        spec: sizes of the layer the router sits in.
        threshold: share of the probability, above 0, at most 1; the paper takes 0.4.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: a threshold out of range.
    """

    paper = "Huang et al., ACL 2024, arXiv:2403.07652"
    default_loss_weights: Mapping[str, float | LossWeight] = {"balance": 1e-2, "entropy": 1e-4}

    def __init__(self, spec: LayerSpec, *, threshold: float = 0.4, init_std: float = 0.02) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}")
        super().__init__(spec)
        self.threshold = threshold
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * init_std)

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return `x W^T`."""
        return gate_linear(x_TD, self.weight)

    def mask(self, logits_TE: Tensor) -> Tensor:
        """Select until the probabilities reach the threshold."""
        sorted_TE, order_TE = logits_TE.detach().softmax(-1).sort(dim=-1, descending=True, stable=True)
        kept_TE = sorted_TE.cumsum(-1) - sorted_TE < self.threshold
        kept_TE[:, :1] = True
        return torch.zeros_like(kept_TE).scatter(1, order_TE, kept_TE)

    def own_losses(self, x_TD: Tensor, logits_TE: Tensor, context: RoutingContext) -> Mapping[str, Tensor]:
        """Return the mean entropy of the softmax, in nats."""
        # Not `torch.special.entr`: its gradient is infinite where a probability underflows to 0.
        entropy_T = -(logits_TE.softmax(-1) * logits_TE.log_softmax(-1)).sum(-1)
        return {"entropy": masked_mean(entropy_T, context.padding_mask)}
