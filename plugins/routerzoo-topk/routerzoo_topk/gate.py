"""TopKRouter: the configurable linear gate of today's large models (DeepSeek-AI 2024, https://arxiv.org/abs/2412.19437)."""
# Shape suffixes: T tokens, D model width, E experts, K choices per token, G groups of experts, M experts of a group.

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, final, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from routerzoo import LayerSpec, Router, Routing, RoutingContext, register_router
from routerzoo.losses import balance_loss, z_loss
from routerzoo.selection import top_k_experts

Score = Literal["softmax", "sigmoid", "sqrt_softplus"]

SCORES: dict[Score, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits_TE: logits_TE.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": lambda logits_TE: F.softplus(logits_TE).sqrt(),
}


@register_router
@final
class TopKRouter(Router):
    """Linear gate whose experts are chosen by biased scores, within the best groups, and weighted by unbiased ones.

    `s = score(x W^T (+ b))`. Experts are the k largest of `s + selection_bias`, among the experts of the `top_groups`
    groups whose two best biased scores have the largest sum (DeepSeek-V3, equations 12 to 16). The weights are the
    chosen s, divided by their sum where `renormalize`, times `scale`.

    The selection bias balances the load without a loss (Wang et al. 2024, https://arxiv.org/abs/2408.15664): before
    each optimiser step, `bias += bias_speed * sign(mean load - load)`, with the load counted over gradient accumulation
    and over all processes; padding does not count. It learns from no gradient, and stands still in evaluation.

    Training gives the losses `balance` and `z`; the generic `sequence_balance` is DeepSeek-V3's (equations 17 to 20,
    there with a coefficient of 1e-4). A coefficient applies where the task is given one.

    Where the code in transformers differs from the paper: experts outside the best groups get the score 0 there, not
    minus infinity, so that one of them wins where the bias makes all others negative. Here they never win.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: experts per token.
        score: how logits become scores.
        bias_speed: step of the selection bias; 0 for none (the buffer stays, and may be loaded).
        num_groups: groups that the experts are divided into.
        top_groups: groups that a token chooses from; by default all.
        renormalize: divide the chosen scores by their sum.
        scale: factor on the weights.
        bias: give the gate a bias, which counts in the weights too.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: a score of another name; groups that do not divide the experts, or that hold too few of them.
    """

    paper = "DeepSeek-AI 2024, arXiv:2412.19437; Wang et al. 2024, arXiv:2408.15664"
    adapted_buffers = frozenset({"selection_bias", "load_E"})
    selection_bias: Tensor
    load_E: Tensor

    def __init__(
        self,
        spec: LayerSpec,
        *,
        top_k: int = 2,
        score: Score = "softmax",
        bias_speed: float = 0.0,
        num_groups: int = 1,
        top_groups: int | None = None,
        renormalize: bool = True,
        scale: float = 1.0,
        bias: bool = False,
        init_std: float = 0.02,
    ) -> None:
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(get_args(Score))}, got {score!r}")
        if num_groups < 1 or spec.num_experts % num_groups:
            raise ValueError(f"num_groups must divide num_experts = {spec.num_experts}, got {num_groups}")
        top_groups = num_groups if top_groups is None else top_groups
        if not 1 <= top_groups <= num_groups:
            raise ValueError(f"top_groups must be between 1 and num_groups = {num_groups}, got {top_groups}")
        super().__init__(spec, top_k=top_k, max_top_k=top_groups * (spec.num_experts // num_groups))
        self.top_groups = top_groups
        self.score: Score = score
        self.bias_speed, self.num_groups, self.renormalize, self.scale = bias_speed, num_groups, renormalize, scale
        self.normalized = renormalize and scale == 1.0
        self.trains_at_top_1 = not renormalize
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * init_std)
        self.bias = nn.Parameter(torch.zeros(spec.num_experts)) if bias else None
        self.register_buffer("selection_bias", torch.zeros(spec.num_experts))
        # Of the optimiser step that is under way; nothing to keep.
        self.register_buffer("load_E", torch.zeros(spec.num_experts), persistent=False)

    @torch.no_grad()
    def scale_initial_logits(self, factor: float) -> None:
        """Scale the gate."""
        self.weight.mul_(factor)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Take the k best experts of the best groups."""
        logits_TE = F.linear(x_TD, self.weight, self.bias)
        scores_TE = SCORES[self.score](logits_TE)
        _, experts_TK = top_k_experts(self._eligible(scores_TE.detach() + self.selection_bias), self.top_k)
        weights_TK = scores_TE.gather(1, experts_TK)
        if self.renormalize:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        weights_TK = weights_TK * self.scale
        losses = {}
        if self.training:
            mask = context.padding_mask
            losses["balance"] = balance_loss(scores_TE, experts_TK, padding_mask=mask)
            losses["z"] = z_loss(logits_TE, padding_mask=mask)
            if self.bias_speed:
                kept_TK = torch.ones_like(weights_TK) if mask is None else (~mask).unsqueeze(1).expand_as(weights_TK)
                self.load_E.index_add_(0, experts_TK.flatten(), kept_TK.flatten().to(self.load_E.dtype))
        return Routing(experts_TK, weights_TK, logits_TE, losses, scores_TE, may_pad=False)

    def _eligible(self, scores_TE: Tensor) -> Tensor:
        """Rule out the experts of all but the best groups."""
        if self.top_groups == self.num_groups:
            return scores_TE
        group_size = self.spec.num_experts // self.num_groups
        scores_TGM = scores_TE.view(len(scores_TE), self.num_groups, group_size)
        groups_TG = scores_TGM.topk(min(2, scores_TGM.shape[2]), dim=-1).values.sum(-1)
        best_TG = torch.zeros_like(groups_TG, dtype=torch.bool)
        best_TG = best_TG.scatter(1, groups_TG.topk(self.top_groups, dim=-1).indices, True)
        return scores_TGM.masked_fill(~best_TG.unsqueeze(2), -torch.inf).flatten(1)

    @torch.no_grad()
    def before_optimizer_step(self) -> None:
        """Move the bias of each expert against its load."""
        if not self.bias_speed:
            return
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.load_E)
        self.selection_bias += self.bias_speed * torch.sign(self.load_E.mean() - self.load_E)
        self.load_E.zero_()
