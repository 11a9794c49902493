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
from routerzoo.distributed.collectives import rows_of_all_ranks, sum_over_ranks
from routerzoo.functional.losses import balance_loss, importance_loss, load_loss, scope_of, z_loss
from routerzoo.functional.topk import gather_weights, topk

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

    Quantile balancing (Megatron-core 0.19) sets the bias instead of stepping it: experts are chosen by `logit - beta`,
    where, with alpha_t the (k+1)-th largest of a token's `logit - beta`, beta_e is the value that T * k / E of the
    `logit - alpha` of expert e exceed, over all processes; an average over gradient accumulation, taken anew each step.

    Training gives the losses `balance` and `z`, with `noise` also `importance` and `load`, with `orthogonal` also
    `orthogonality`: the sum of `|W W^T - I|` (SimBal, https://arxiv.org/abs/2506.14038, coefficient 0.1). The generic
    `sequence_balance` is DeepSeek-V3's (equations 17 to 20, there with a coefficient of 1e-4). A coefficient applies
    where the task is given one.

    Where the code in transformers differs from the paper: experts outside the best groups get the score 0 there, not
    minus infinity, so that one of them wins where the bias makes all others negative. Here they never win.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: experts per token.
        score: how logits become scores.
        bias_speed: step of the selection bias; 0 for none (the buffer stays, and may be loaded).
        quantile_balancing: set the selection bias to the quantile that balances the last step.
        num_groups: groups that the experts are divided into.
        top_groups: groups that a token chooses from; by default all.
        renormalize: divide the chosen scores by their sum.
        scale: factor on the weights.
        bias: give the gate a bias, which counts in the weights too.
        input_jitter: in training, multiply the gate's input with random numbers in `1 - jitter .. 1 + jitter` (Switch).
        noise: in training, choose and weigh by logits with normal noise of standard deviation 1 / E (V-MoE).
        sample_choices: in training, keep each choice but the first with probability `2 * weight` (GShard's second).
        orthogonal: start from orthogonal rows, and give the loss that keeps them so; for at most d_model experts.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: a score of another name; groups that do not divide the experts, or that hold too few of them.
    """

    paper = "DeepSeek-AI 2024, arXiv:2412.19437; Wang et al. 2024, arXiv:2408.15664"
    trained_buffers = frozenset({"selection_bias", "load_E", "quantile_E", "num_quantiles"})
    selection_bias: Tensor
    load_E: Tensor
    quantile_E: Tensor
    num_quantiles: Tensor

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
        quantile_balancing: bool = False,
        input_jitter: float = 0.0,
        noise: bool = False,
        sample_choices: bool = False,
        orthogonal: bool = False,
        init_std: float = 0.02,
    ) -> None:
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(get_args(Score))}, got {score!r}")
        if num_groups < 1 or spec.num_experts % num_groups:
            raise ValueError(f"num_groups must divide num_experts = {spec.num_experts}, got {num_groups}")
        top_groups = num_groups if top_groups is None else top_groups
        if not 1 <= top_groups <= num_groups:
            raise ValueError(f"top_groups must be between 1 and num_groups = {num_groups}, got {top_groups}")
        if quantile_balancing and (bias_speed or num_groups > 1):
            raise ValueError(
                "quantile_balancing sets the bias by itself, over all experts: leave bias_speed and num_groups out"
            )
        if not 0 <= input_jitter < 1:
            raise ValueError(f"input_jitter must be at least 0 and below 1, got {input_jitter}")
        if orthogonal and spec.num_experts > spec.d_model:
            raise ValueError(
                f"{spec.num_experts} experts cannot be orthogonal in d_model = {spec.d_model}: leave orthogonal off"
            )
        super().__init__(spec, top_k=top_k, max_top_k=top_groups * (spec.num_experts // num_groups))
        self.top_groups = top_groups
        self.score: Score = score
        self.bias_speed, self.num_groups, self.renormalize, self.scale = bias_speed, num_groups, renormalize, scale
        self.quantile_balancing, self.input_jitter, self.noise = quantile_balancing, input_jitter, noise
        self.sample_choices, self.orthogonal = sample_choices, orthogonal
        self.trains_at_top_1 = not renormalize
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * init_std)
        if orthogonal:
            nn.init.orthogonal_(self.weight)
        self.bias = nn.Parameter(torch.zeros(spec.num_experts)) if bias else None
        self.register_buffer("selection_bias", torch.zeros(spec.num_experts))
        # Of the optimiser step that is under way; nothing to keep.
        self.register_buffer("load_E", torch.zeros(spec.num_experts), persistent=False)
        self.register_buffer("quantile_E", torch.zeros(spec.num_experts), persistent=False)
        self.register_buffer("num_quantiles", torch.zeros(1), persistent=False)

    @property
    def normalized(self) -> bool:  # type: ignore[override]
        """Whether a token's weights sum to 1; not where choices are left out."""
        return self.renormalize and self.scale == 1.0 and not (self.sample_choices and self.training)

    @torch.no_grad()
    def scale_initial_logits(self, factor: float) -> None:
        """Scale the gate."""
        self.weight.mul_(factor)

    def select_experts(self, logits_TE: Tensor) -> Tensor:
        """Choose the k best biased scores of the best groups."""
        scores_TE = logits_TE if self.quantile_balancing else SCORES[self.score](logits_TE)
        biased_TE = (scores_TE.detach() + self.selection_bias).masked_fill(logits_TE == -torch.inf, -torch.inf)
        return topk(self._eligible(biased_TE), self.top_k)[1]

    def combine_weights(self, logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """Take the unbiased scores of the chosen experts."""
        return gather_weights(SCORES[self.score](logits_TE), experts_TK, renormalize=self.renormalize) * self.scale

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Take the k best experts of the best groups."""
        if self.input_jitter and self.training:
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.input_jitter, 1 + self.input_jitter)
        clean_TE = logits_TE = F.linear(x_TD, self.weight, self.bias)
        if self.noise and self.training:
            logits_TE = clean_TE + torch.randn_like(clean_TE) / self.spec.num_experts
        scores_TE = SCORES[self.score](logits_TE)
        biased_TE = (logits_TE if self.quantile_balancing else scores_TE).detach() + self.selection_bias
        _, experts_TK = topk(self._eligible(biased_TE), self.top_k)
        weights_TK = scores_TE.gather(1, experts_TK)
        if self.renormalize:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        if self.training:
            self._observe(logits_TE.detach(), biased_TE, experts_TK, context)
        losses = self._losses(clean_TE, logits_TE, scores_TE, experts_TK, context) if self.training else {}
        if self.sample_choices and self.training:
            left_out_TK = torch.rand_like(weights_TK) >= 2 * weights_TK
            left_out_TK[:, 0] = False
            experts_TK, weights_TK = experts_TK.masked_fill(left_out_TK, -1), weights_TK.masked_fill(left_out_TK, 0.0)
        may_drop = self.sample_choices and self.training
        return Routing(experts_TK, weights_TK * self.scale, clean_TE, losses, scores_TE, may_drop=may_drop)

    def _losses(
        self, clean_TE: Tensor, logits_TE: Tensor, scores_TE: Tensor, experts_TK: Tensor, context: RoutingContext
    ) -> dict[str, Tensor]:
        if not context.compute_aux_losses:
            return {}
        mask = context.padding_mask
        losses = {
            "balance": balance_loss(scores_TE, experts_TK, **scope_of("batch", context)),
            "z": z_loss(clean_TE, padding_mask=mask),
        }
        if self.noise:
            losses["importance"] = importance_loss(clean_TE.softmax(-1), **scope_of("batch", context))
            losses["load"] = load_loss(clean_TE, self.top_k, noisy_logits_TE=logits_TE, **scope_of("batch", context))
        if self.orthogonal:
            identity_EE = torch.eye(self.spec.num_experts, device=clean_TE.device, dtype=self.weight.dtype)
            losses["orthogonality"] = (self.weight @ self.weight.T - identity_EE).abs().sum()
        return losses

    @torch.no_grad()
    def _observe(self, logits_TE: Tensor, biased_TE: Tensor, experts_TK: Tensor, context: RoutingContext) -> None:
        """Take down what the next bias is made of."""
        padding_mask = context.padding_mask
        if self.bias_speed:
            kept_TK = torch.ones(experts_TK.shape, device=experts_TK.device, dtype=self.load_E.dtype)
            if padding_mask is not None:
                kept_TK = kept_TK.masked_fill(padding_mask.unsqueeze(1), 0.0)
            self.load_E.index_add_(0, experts_TK.flatten(), kept_TK.flatten())
        if self.quantile_balancing and self.top_k < self.spec.num_experts and len(logits_TE):
            alpha_T1 = biased_TE.topk(self.top_k + 1, dim=-1).values[:, -1:]
            margin_TE = logits_TE - alpha_T1
            tokens = torch.tensor(len(logits_TE), device=logits_TE.device)
            if padding_mask is not None:
                margin_TE = margin_TE.masked_fill(padding_mask.unsqueeze(1), -torch.inf)
                tokens = (~padding_mask).sum()
            margin_TE, _ = rows_of_all_ranks(margin_TE, context.process_group)
            tokens = sum_over_ranks(tokens, context.process_group)
            share = (tokens * self.top_k).div(self.spec.num_experts, rounding_mode="floor")
            threshold_1E = margin_TE.sort(dim=0, descending=True).values.index_select(
                0, share.clamp_max(len(margin_TE) - 1).view(1)
            )
            # A quantile that padding or a batch without tokens leaves open says nothing.
            known = threshold_1E.isfinite().all()
            self.quantile_E += torch.where(known, threshold_1E[0], 0.0).to(self.quantile_E.dtype)
            self.num_quantiles += known

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
        distributed = dist.is_available() and dist.is_initialized()
        if self.is_frozen:
            return
        if self.bias_speed:
            if distributed:
                dist.all_reduce(self.load_E)
            self.selection_bias += self.bias_speed * torch.sign(self.load_E.mean() - self.load_E)
            self.load_E.zero_()
        if self.quantile_balancing:
            if distributed:
                dist.all_reduce(self.quantile_E)
                dist.all_reduce(self.num_quantiles)
            mean_E = self.quantile_E / self.num_quantiles.clamp_min(1)
            self.selection_bias.copy_(torch.where(self.num_quantiles > 0, -mean_E, self.selection_bias))
            self.quantile_E.zero_()
            self.num_quantiles.zero_()
