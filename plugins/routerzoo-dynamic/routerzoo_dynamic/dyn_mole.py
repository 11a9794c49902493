"""DynMoLERouter: top-p, and all experts where the gate is at a loss (Li et al. 2025, arXiv:2504.00661)."""
# Shape suffixes: T tokens, D model width, E experts.

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routerzoo import LayerSpec, Router, Routing, RoutingContext, register_router
from routerzoo.functional.losses import masked_mean, sums_in
from routerzoo.functional.topk import gather_weights
from routerzoo_dynamic.chosen import choices, routing_of

_EPSILON = 1e-5  # the authors'


@register_router
@final
class DynMoLERouter(Router):
    """Experts whose probabilities sum to no more than a threshold, but at least two; all where the entropy is high.

    The entropy is Tsallis', `(1 - sum p^q) / (q - 1)`, divided by that of the uniform distribution; the expert that
    crosses the threshold is not taken. Weights are the softmax over all experts, not renormalised. After the authors'
    released code (https://arxiv.org/abs/2504.00661), whose default call passes q under a name that its function does
    not have; here q is used. The loss `entropy` is the mean normalised entropy (their coefficient 0.01). `balance` is
    `E * sum_e f_e P_e` with f the share of the weights that each expert gets, not of choices (0.001).

    Args:
        spec: sizes of the layer the router sits in.
        threshold: probabilities may sum to this.
        min_experts: at least so many, as far as there are.
        entropy_threshold: above this normalised entropy all experts are taken.
        q: index of the entropy; towards 1 it is Shannon's.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: an argument out of range.
    """

    paper = "Li et al. 2025, arXiv:2504.00661"
    default_loss_weights: ClassVar[Mapping[str, float]] = {"balance": 1e-3, "entropy": 1e-2}
    compiles = False

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
        super().__init__(spec, top_k=1, max_top_k=1)
        self.threshold, self.min_experts = threshold, min_experts
        self.entropy_threshold, self.q = entropy_threshold, q
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * init_std)

    @torch.no_grad()
    def scale_initial_logits(self, factor: float) -> None:
        """Scale the gate."""
        self.weight.mul_(factor)

    def select_experts(self, logits_TE: Tensor) -> Tensor:
        """Choose the likely experts, or all; -1 for the others."""
        probs_TE = logits_TE.softmax(-1)
        return choices(self._chosen(probs_TE, normalized_tsallis_entropy(probs_TE, self.q)))

    def combine_weights(self, logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """Take the softmax over all experts at the chosen ones."""
        return gather_weights(logits_TE.softmax(-1), experts_TK)

    def _chosen(self, probs_TE: Tensor, entropy_T: Tensor) -> Tensor:
        sorted_TE, order_TE = probs_TE.detach().sort(dim=-1, descending=True, stable=True)
        kept_TE = sorted_TE.cumsum(-1) <= self.threshold
        kept_TE[:, : self.min_experts] = True
        chosen_TE = torch.zeros_like(kept_TE).scatter(1, order_TE, kept_TE)
        return chosen_TE | (entropy_T.detach() > self.entropy_threshold).unsqueeze(1)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Take the likely experts, or all."""
        logits_TE = F.linear(x_TD, self.weight)
        probs_TE = logits_TE.softmax(-1)
        entropy_T = normalized_tsallis_entropy(probs_TE, self.q)
        chosen_TE = self._chosen(probs_TE, entropy_T)
        losses = {}
        if self.training and context.compute_aux_losses:
            (weight_1E, probs_1E), tokens_11 = sums_in("batch", context, probs_TE * chosen_TE, probs_TE)
            share_1E = weight_1E / weight_1E.sum().clamp_min(1e-20)
            losses["balance"] = self.spec.num_experts * (share_1E * probs_1E / tokens_11.clamp_min(1)).sum()
            losses["entropy"] = masked_mean(entropy_T, context.padding_mask)
        return routing_of(chosen_TE, probs_TE, logits_TE, losses)


def normalized_tsallis_entropy(probs_TE: Tensor, q: float) -> Tensor:
    """Return Tsallis' entropy of each row, 1 for the uniform distribution; 0 where there is one expert."""
    num_experts = probs_TE.shape[1]
    if num_experts == 1:
        return probs_TE.sum(-1) * 0.0
    highest = (1 - num_experts ** (1 - q)) / (q - 1)
    return (1 - (probs_TE + _EPSILON).pow(q).sum(-1)) / (q - 1) / highest
