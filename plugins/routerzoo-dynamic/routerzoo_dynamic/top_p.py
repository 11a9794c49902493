"""TopPRouter: as many experts as hold a share of the probability (Huang et al. 2024, arXiv:2403.07652)."""
# Shape suffixes: T tokens, D model width, E experts.

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routerzoo import LayerSpec, Router, Routing, RoutingContext, register_router
from routerzoo.functional.losses import balance_loss, masked_mean, scope_of
from routerzoo.functional.topk import gather_weights
from routerzoo_dynamic.chosen import choices, routing_of


@register_router
@final
class TopPRouter(Router):
    """Experts in the order of their probability, until their probabilities sum to the threshold.

    The expert that crosses the threshold is among them. Weights are the softmax over all experts, not renormalised
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
    default_loss_weights: ClassVar[Mapping[str, float]] = {"balance": 1e-2, "entropy": 1e-4}
    compiles = False

    def __init__(self, spec: LayerSpec, *, threshold: float = 0.4, init_std: float = 0.02) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}")
        super().__init__(spec, top_k=1, max_top_k=1)
        self.threshold = threshold
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * init_std)

    @torch.no_grad()
    def scale_initial_logits(self, factor: float) -> None:
        """Scale the gate."""
        self.weight.mul_(factor)

    def select_experts(self, logits_TE: Tensor) -> Tensor:
        """Choose until the probabilities reach the threshold; -1 for the others."""
        return choices(nucleus(logits_TE.softmax(-1), self.threshold))

    def combine_weights(self, logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """Take the softmax over all experts at the chosen ones."""
        return gather_weights(logits_TE.softmax(-1), experts_TK)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Take experts until their probabilities reach the threshold."""
        logits_TE = F.linear(x_TD, self.weight)
        probs_TE = logits_TE.softmax(-1)
        chosen_TE = nucleus(probs_TE, self.threshold)
        losses = {}
        if self.training and context.compute_aux_losses:
            mask = context.padding_mask
            entropy_T = torch.special.entr(probs_TE).sum(-1)
            losses["balance"] = balance_loss(probs_TE, choices(chosen_TE), **scope_of("batch", context))
            losses["entropy"] = masked_mean(entropy_T, mask)
        return routing_of(chosen_TE, probs_TE, logits_TE, losses)


def nucleus(probs_TE: Tensor, threshold: float) -> Tensor:
    """Return which experts are needed for their probabilities to reach the threshold, bool `[T, E]`."""
    sorted_TE, order_TE = probs_TE.detach().sort(dim=-1, descending=True, stable=True)
    before_TE = sorted_TE.cumsum(-1) - sorted_TE
    kept_TE = before_TE < threshold
    kept_TE[:, :1] = True
    return torch.zeros_like(kept_TE).scatter(1, order_TE, kept_TE)
