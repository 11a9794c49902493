"""DynMoLERouter: top-p, and all experts where the gate is at a loss (Li et al. 2025, arXiv:2504.00661)."""
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

_EPSILON = 1e-5  # the authors'


@register_router
@final
class DynMoLERouter(MaskRouter):
    """Experts whose probabilities sum to no more than a threshold, but at least two; all where the entropy is high.

    The entropy is Tsallis', `(1 - sum p^q) / (q - 1)`, divided by that of the uniform distribution; the expert that
    crosses the threshold is not selected. Weights are the softmax over all experts, not renormalized. After the
    authors' released code (https://arxiv.org/abs/2504.00661), whose default call passes q under a name that its
    function does not have; here q is used.

    Losses, as in that code over the tokens of all layers together: `entropy`, the mean normalized entropy (0.01), and
    `weighted_balance`, `E * sum_e f_e P_e` with f the mean weight of each expert, 0 where it is not selected, and P its
    mean probability (0.001).

    Args:
        spec: sizes of the layer the router sits in.
        threshold: probabilities may sum to this.
        min_experts: at least so many, as far as there are.
        entropy_threshold: above this normalized entropy all experts are selected.
        q: index of the entropy; towards 1 it is Shannon's.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: an argument out of range.
    """

    paper = "Li et al. 2025, arXiv:2504.00661"
    default_loss_weights: Mapping[str, float | LossWeight] = {
        "weighted_balance": LossWeight(1e-3, "pooled"),
        "entropy": LossWeight(1e-2, "pooled"),
    }

    def __init__(
        self,
        spec: LayerSpec,
        *,
        threshold: float = 0.75,
        min_experts: int = 2,
        entropy_threshold: float = 0.9,
        q: float = 1.1,
        init_std: float = 0.02,
    ) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}")
        if min_experts < 1:
            raise ValueError(f"min_experts must be at least 1, got {min_experts}")
        if q <= 0 or q == 1:
            raise ValueError(f"q must be above 0 and not 1, got {q}")
        super().__init__(spec)
        self.threshold, self.min_experts = threshold, min_experts
        self.entropy_threshold, self.q = entropy_threshold, q
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * init_std)

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return `x W^T`."""
        return gate_linear(x_TD, self.weight)

    def mask(self, logits_TE: Tensor) -> Tensor:
        """Select while the probabilities stay below the threshold, or all."""
        probs_TE = logits_TE.detach().softmax(-1)
        sorted_TE, order_TE = probs_TE.sort(dim=-1, descending=True, stable=True)
        kept_TE = sorted_TE.cumsum(-1) <= self.threshold
        kept_TE[:, : self.min_experts] = True
        uncertain_T1 = normalized_tsallis_entropy(probs_TE, self.q).unsqueeze(1) > self.entropy_threshold
        return torch.zeros_like(kept_TE).scatter(1, order_TE, kept_TE) | uncertain_T1

    def own_losses(self, x_TD: Tensor, logits_TE: Tensor, context: RoutingContext) -> Mapping[str, Tensor]:
        """Return the mean normalized entropy."""
        entropy_T = normalized_tsallis_entropy(logits_TE.softmax(-1), self.q)
        return {"entropy": masked_mean(entropy_T, context.padding_mask)}


def normalized_tsallis_entropy(probs_TE: Tensor, q: float) -> Tensor:
    """Return Tsallis' entropy of each row, 1 for the uniform distribution; 0 where there is one expert."""
    num_experts = probs_TE.shape[1]
    if num_experts == 1:
        return probs_TE.sum(-1) * 0.0
    highest: float = (1 - num_experts ** (1 - q)) / (q - 1)
    return (1 - (probs_TE + _EPSILON).pow(q).sum(-1)) / (q - 1) / highest
