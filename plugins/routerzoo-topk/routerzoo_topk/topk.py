"""TopKRouter: the gate of today's large language models (DeepSeek-AI 2024, https://arxiv.org/abs/2412.19437)."""
# Shape suffixes: T tokens, D model width, E experts, K choices per token.

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from routerzoo import LayerSpec, LogitRouter, Routing, RoutingContext, register_router
from routerzoo.functional import apply_score_fn, gate_linear, topk_indices
from routerzoo.functional.topk import ScoreFunction
from routerzoo_topk.groups import checked_groups, mask_groups


@register_router
@final
class TopKRouter(LogitRouter):
    """Linear gate that selects experts by biased scores, within the best groups, and weights them by unbiased ones.

    `s = score(x W^T (+ b))`. Experts are the k largest of `s + selection_bias`, among the experts of the `top_groups`
    best groups (DeepSeek-V3, equations 12 to 16; `routerzoo_topk.groups`). The weights are the selected s, divided by
    their sum where `renormalize`, times `scale`. Selection looks at scores, since the bias is on their scale.

    The selection bias balances the load without a loss (Wang et al. 2024, https://arxiv.org/abs/2408.15664): after
    each optimizer step, `bias += bias_speed * sign(mean load - load)`. The load is counted over gradient accumulation
    and over all processes, without padding. The bias has no gradient, and evaluation leaves it alone.

    The gates of Mixtral, OLMoE, Qwen3 and gpt-oss are this one without bias and groups; `routerzoo_topk.PRESETS` has
    their arguments. The losses `sequence_balance` (DeepSeek-V3, equations 17 to 20) and `balance` count the experts of
    the largest unbiased scores in all groups, not those that were selected (equation 18; Megatron-core counts so in all
    its balance losses): once the bias has leveled the load, what is selected would leave the loss nothing to do.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: experts per token.
        score: how logits become scores.
        renormalize: divide the selected scores by their sum.
        scale: factor on the weights.
        bias: give the gate a bias, which counts in the weights too.
        bias_speed: step of the selection bias; 0 for none (the buffer stays, and may be loaded).
        num_groups: groups that the experts are divided into.
        top_groups: groups that a token selects from; by default all.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: an unknown score; groups that do not divide the experts, or that hold too few of them.
    """

    paper = "DeepSeek-AI 2024, arXiv:2412.19437; Wang et al. 2024, arXiv:2408.15664"
    trained_buffers = frozenset({"selection_bias"})
    balances_by_score = True
    selection_bias: Tensor

    def __init__(
        self,
        spec: LayerSpec,
        *,
        top_k: int = 2,
        score: ScoreFunction = "softmax",
        renormalize: bool = True,
        scale: float = 1.0,
        bias: bool = False,
        bias_speed: float = 0.0,
        num_groups: int = 1,
        top_groups: int | None = None,
        init_std: float = 0.02,
    ) -> None:
        top_groups = checked_groups(spec.num_experts, num_groups, top_groups)
        max_top_k = top_groups * (spec.num_experts // num_groups)
        super().__init__(spec, top_k=top_k, max_top_k=max_top_k, score_fn=score, renormalize=renormalize, scale=scale)
        self.bias_speed, self.num_groups, self.top_groups = bias_speed, num_groups, top_groups
        self.needs_updates = bias_speed != 0
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * init_std)
        self.bias = nn.Parameter(torch.zeros(spec.num_experts)) if bias else None
        self.register_buffer("selection_bias", torch.zeros(spec.num_experts))

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return `x W^T (+ b)`."""
        return gate_linear(x_TD, self.weight, self.bias)

    def select_experts(self, logits_TE: Tensor) -> Tensor:
        """Return the k largest biased scores of the best groups."""
        biased_TE = apply_score_fn(logits_TE.detach(), self.score_fn) + self.selection_bias
        biased_TE = biased_TE.masked_fill(logits_TE == -torch.inf, -torch.inf)
        return topk_indices(mask_groups(biased_TE, self.num_groups, self.top_groups), self.top_k)

    def statistics(self, routing: Routing, context: RoutingContext) -> Mapping[str, Tensor]:
        """Count the experts' tokens."""
        return {"load_E": routing.expert_load(self.spec.num_experts)}

    def update(self, statistics: Mapping[str, Tensor]) -> None:
        """Move the bias of each expert against its load."""
        load_E = statistics["load_E"]
        self.selection_bias += self.bias_speed * torch.sign(load_E.mean() - load_E)
