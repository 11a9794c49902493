"""LinearRouter: the learned linear gate of sparse MoE (Shazeer et al., ICLR 2017, https://arxiv.org/abs/1701.06538)."""
# Shape suffixes: T tokens, D model width, E experts, K choices per token.

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routerzoo.functional.losses import (
    Scope,
    balance_loss,
    fields_of_scope,
    importance_loss,
    load_loss,
    scope_of,
    z_loss,
)
from routerzoo.functional.topk import (
    ScoreFunction,
    gather_weights,
    score,
    softmax_at,
    topk,
    topk_indices,
    topk_softmax,
)
from routerzoo.registry import register_router
from routerzoo.router import Router
from routerzoo.routing import LayerSpec, Routing, RoutingContext


@register_router
@final
class LinearRouter(Router):
    r"""Learned linear gate with top-k selection: the baseline that every other router is compared with.

    `z = x W^T (+ b)`, and the experts are the k largest of z. The weights are

    - softmax over all experts, renormalised over the selected ones (GShard, Mixtral). This is the same as Shazeer's
      softmax over the selected logits (equation 3).
    - with `renormalize=False`, the softmax over all experts as it is (Switch, equations 1 and 2; V-MoE, OLMoE). At
      k = 1 only this form gives the gate a gradient from the task.
    - with `score="sigmoid"`, the sigmoid of each logit (DeepSeek-V3), renormalised or not.

    Training gives the losses `balance` (Switch, equation 4; at its minimum 1 for any k) and `z` (ST-MoE, equation 5).
    `noisy=True` adds Shazeer's learned noise in training (equation 4), `N(0, 1) * (softplus(x W_n^T) + 0.01)`; the
    offset 0.01 is FastMoE's. It then gives Shazeer's losses `importance` and `load` (equations 6 to 11) too, for a task
    that is given `loss_weights: {importance: 0.1, load: 0.1}`, as they used them.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: experts per token.
        score: how logits become weights.
        renormalize: divide the selected weights by their sum. By default so where `top_k` at construction is above 1.
        bias: give the gate a bias.
        noisy: choose with learned noise in training.
        balance_scope: take balance, importance and load over the micro-batch, or in each sequence.
        init_std: standard deviation of the gate's initial weights.
    """

    paper = "Shazeer et al., ICLR 2017, arXiv:1701.06538; Fedus et al., JMLR 2022, arXiv:2101.03961"
    default_loss_weights: ClassVar[Mapping[str, float]] = {"balance": 1e-2, "z": 1e-3}

    def __init__(
        self,
        spec: LayerSpec,
        *,
        top_k: int = 2,
        score: ScoreFunction = "softmax",
        renormalize: bool | None = None,
        bias: bool = False,
        noisy: bool = False,
        balance_scope: Scope = "batch",
        init_std: float = 0.02,
    ) -> None:
        super().__init__(spec, top_k=top_k)
        self.require(*fields_of_scope(balance_scope))
        self.balance_scope: Scope = balance_scope
        self.score_function: ScoreFunction = score
        self.renormalize = top_k > 1 if renormalize is None else renormalize
        self.normalized = self.renormalize
        self.trains_at_top_1 = not self.renormalize
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * init_std)
        self.bias = nn.Parameter(torch.zeros(spec.num_experts)) if bias else None
        self.noise_weight = nn.Parameter(torch.zeros(spec.num_experts, spec.d_model)) if noisy else None

    @torch.no_grad()
    def scale_initial_logits(self, factor: float) -> None:
        """Scale the gate."""
        self.weight.mul_(factor)

    def select_experts(self, logits_TE: Tensor) -> Tensor:
        """Choose the k largest."""
        return topk_indices(logits_TE, self.top_k)

    def combine_weights(self, logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """Take the scores of the chosen logits, renormalised or not."""
        if self.score_function == "softmax" and self.renormalize:
            return softmax_at(logits_TE, experts_TK)
        return gather_weights(score(logits_TE, self.score_function), experts_TK, renormalize=self.renormalize)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Take the k largest logits of the gate."""
        clean_TE = logits_TE = F.linear(x_TD, self.weight, self.bias)
        std_TE = None
        if self.noise_weight is not None and self.training:
            std_TE = F.softplus(F.linear(x_TD, self.noise_weight)) + 0.01
            logits_TE = clean_TE + torch.randn_like(clean_TE) * std_TE
        probs_TE = None
        if self.score_function == "softmax" and self.renormalize:
            weights_TK, experts_TK = topk_softmax(logits_TE, self.top_k)
        else:
            probs_TE = score(logits_TE, self.score_function)
            weights_TK, experts_TK = topk(probs_TE, self.top_k)
            if self.renormalize:
                weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(1e-20)
        if not (self.training and context.compute_aux_losses):
            return Routing(experts_TK, weights_TK, logits_TE, may_drop=False)
        if probs_TE is None:
            probs_TE = score(logits_TE, self.score_function)
        scoped = scope_of(self.balance_scope, context)
        losses = {
            "balance": balance_loss(probs_TE, experts_TK, **scoped),
            "z": z_loss(logits_TE, padding_mask=context.padding_mask),
        }
        if std_TE is not None:
            gates_TE = torch.zeros_like(logits_TE).scatter(1, experts_TK, weights_TK)
            losses["importance"] = importance_loss(gates_TE, **scoped)
            losses["load"] = load_loss(
                clean_TE, self.top_k, noisy_logits_TE=logits_TE, noise_std=std_TE, exclude_itself=True, **scoped
            )
        return Routing(experts_TK, weights_TK, logits_TE, losses, probs_TE, may_drop=False)
