"""RLRouter: routing as a policy that is rewarded by the model's predictions (Clark et al. 2022, arXiv:2202.01169)."""
# Shape suffixes: T tokens, D model width, E experts, K choices per token, H hidden units.

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routerzoo import LayerSpec, Router, Routing, RoutingContext, register_router
from routerzoo.functional.losses import balance_loss, masked_mean, scope_of
from routerzoo.functional.topk import gather_weights, topk_indices

_CARRIED = "routerzoo_assignment.RLRouter.value"


@register_router
@final
class RLRouter(Router):
    """RL-R: a token's expert is sampled from the softmax of a linear gate, and rewarded by its log-likelihood.

    In training k experts are drawn without replacement, in evaluation the k largest are taken; each has weight 1 / k,
    so that the gate learns from the reward R alone, the log-likelihood of the token's target under the whole model:
    `policy = -(R - V) log p(experts)`, with a baseline V that a small network learns from the hidden state,
    `value = (R - V)^2 / 2`, `entropy = -H(p)`, and the `balance` loss. R is known only after the forward pass: see
    `Router.feedback`. An image's tokens all have its label's log-likelihood.

    Inspired by: "unified scaling laws for routed language models" (https://arxiv.org/abs/2202.01169) could be read
    second-hand only; the coefficients, the weight 1 / k and k above 1 are ours.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: experts per token.
        value_dim: width H of the baseline's hidden layer.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: a width below 1.
    """

    paper = "Clark et al., ICML 2022, arXiv:2202.01169"
    inspired_by = True
    normalized = True
    trains_at_top_1 = False
    wants_feedback = True
    default_loss_weights: ClassVar[Mapping[str, float]] = {
        "policy": 1e-2,
        "value": 1e-2,
        "entropy": 1e-3,
        "balance": 1e-2,
    }

    def __init__(self, spec: LayerSpec, *, top_k: int = 1, value_dim: int = 64, init_std: float = 0.02) -> None:
        if value_dim < 1:
            raise ValueError(f"value_dim must be at least 1, got {value_dim}")
        super().__init__(spec, top_k=top_k)
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * init_std)
        self.baseline = nn.Sequential(nn.Linear(spec.d_model, value_dim), nn.ReLU(), nn.Linear(value_dim, 1))

    @torch.no_grad()
    def scale_initial_logits(self, factor: float) -> None:
        """Scale the gate."""
        self.weight.mul_(factor)

    def select_experts(self, logits_TE: Tensor) -> Tensor:
        """Choose the k largest, as evaluation does."""
        return topk_indices(logits_TE, self.top_k)

    def combine_weights(self, logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """Give each the same weight, whatever its logit."""
        return gather_weights(torch.ones_like(logits_TE), experts_TK, renormalize=True)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Sample experts, or take the most likely."""
        logits_TE = F.linear(x_TD, self.weight)
        # The k largest of logits with Gumbel noise are k draws without replacement.
        noise_TE = -torch.empty_like(logits_TE).exponential_().log() if self.training else 0.0
        experts_TK = topk_indices(logits_TE.detach() + noise_TE, self.top_k)
        # A hidden state that is no number must not be routed as if nothing were wrong.
        weights_TK = (x_TD.detach().sum(-1, keepdim=True) * 0.0 + 1.0 / self.top_k).expand(-1, self.top_k)
        losses = {}
        if self.training and context.compute_aux_losses:
            losses["balance"] = balance_loss(logits_TE.softmax(-1), experts_TK, **scope_of("batch", context))
            # The baseline looks at the model, and does not change it.
            context.carry[_CARRIED, self.spec.layer] = self.baseline(x_TD.detach()).squeeze(-1)
        return Routing(experts_TK, weights_TK, logits_TE, losses, may_drop=False)

    def feedback(self, routing: Routing, context: RoutingContext, token_losses_T: Tensor) -> Mapping[str, Tensor]:
        """Reward the experts that were drawn."""
        value_T = context.carry[_CARRIED, self.spec.layer]
        assert routing.logits_TE is not None
        assert routing.experts_TK is not None
        log_TE = routing.logits_TE.log_softmax(-1)
        chosen_T = gather_weights(log_TE, routing.experts_TK).sum(-1)
        advantage_T = -token_losses_T.to(value_T.dtype) - value_T
        mask = context.padding_mask
        return {
            "policy": masked_mean(-advantage_T.detach() * chosen_T, mask),
            "value": masked_mean(advantage_T.square() / 2, mask),
            "entropy": masked_mean((log_TE.exp() * log_TE).sum(-1), mask),
        }
