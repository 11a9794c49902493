"""RLRouter: routing as a policy that is rewarded by the model's predictions (Clark et al. 2022, arXiv:2202.01169)."""
# Shape suffixes: T tokens, D model width, E experts, K choices per token, H hidden units.

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from routerzoo import LayerSpec, LogitRouter, LossWeight, Routing, RoutingContext, register_router
from routerzoo.functional import gate_linear, gather_weights, topk_indices
from routerzoo.functional.losses import masked_mean


@register_router
@final
class RLRouter(LogitRouter):
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
    wants_feedback = True
    default_loss_weights: Mapping[str, float | LossWeight] = {
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

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return `x W^T`."""
        return gate_linear(x_TD, self.weight)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Sample experts, or take the most likely."""
        logits_TE = self.logits(x_TD, context)
        # The k largest of logits with Gumbel noise are k draws without replacement.
        noise_TE = -torch.empty_like(logits_TE).exponential_().log() if self.training else 0.0
        experts_TK = topk_indices(logits_TE.detach() + noise_TE, self.top_k)
        if self.training and context.compute_aux_losses:
            # The baseline looks at the model, and does not change it.
            x_TD = x_TD.detach().to(logits_TE.dtype)
            context.carry.setdefault(self, []).append(self.baseline(x_TD).squeeze(-1))
        return Routing(
            experts_TK, self.combine_weights(logits_TE, experts_TK, may_drop=False), logits_TE, may_drop=False
        )

    def combine_weights(self, logits_TE: Tensor, experts_TK: Tensor, *, may_drop: bool = True) -> Tensor:
        """Return the same weight for each expert, 0 for none (-1); NaN where a logit is."""
        ones_TE = torch.ones_like(logits_TE).masked_fill(logits_TE.isnan(), torch.nan)
        return gather_weights(ones_TE, experts_TK, renormalize=True, may_drop=may_drop)

    def feedback(self, routing: Routing, context: RoutingContext, token_losses_T: Tensor) -> Mapping[str, Tensor]:
        """Reward the experts that were drawn."""
        assert routing.logits_TE is not None
        assert routing.experts_TK is not None
        # A layer that is called several times has a baseline of each call.
        call = next((p.call for p in context.routings if p.routing.for_losses is routing), -1)
        value_T = context.carry[self][call]
        log_TE = routing.logits_TE.log_softmax(-1)
        selected_T = gather_weights(log_TE, routing.experts_TK).sum(-1)
        advantage_T = -token_losses_T.to(value_T.dtype) - value_T
        mask = context.padding_mask
        return {
            "policy": masked_mean(-advantage_T.detach() * selected_T, mask),
            "value": masked_mean(advantage_T.square() / 2, mask),
            "entropy": masked_mean((log_TE.exp() * log_TE).sum(-1), mask),
        }
