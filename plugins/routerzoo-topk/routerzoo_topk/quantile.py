"""QuantileBalancingRouter: the selection bias that would have balanced the last step (Megatron-core 0.19)."""
# Shape suffixes: T tokens, D model width, E experts.

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from routerzoo import LayerSpec, LogitRouter, Routing, RoutingContext, register_router
from routerzoo.distributed.collectives import rows_of_all_ranks
from routerzoo.functional import gate_linear, topk_indices
from routerzoo.functional.topk import ScoreFunction


@register_router
@final
class QuantileBalancingRouter(LogitRouter):
    """Linear gate that selects by `logit - beta`, where beta is a quantile of the last step, and weights by scores.

    With alpha_t the (k+1)-th largest of a token's `logit - beta`, beta_e is the value that `T * k / E` of the
    `logit - alpha` of expert e exceed: had it been subtracted, each expert would have had its share of the tokens. It
    is set anew after each optimizer step, to the mean over gradient accumulation; padding does not count. The buffer
    `selection_bias` holds `-beta`. No auxiliary loss.

    Quantiles are of the tokens of all processes in `RoutingContext.process_group`, as the tasks give it; without one,
    beta is the mean of the processes' quantiles. Megatron-core also subtracts beta's mean, which changes no selection.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: experts per token.
        score: how logits become weights.
        renormalize: divide the weights by their sum.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: an unknown score.
    """

    paper = "Megatron-core 0.19, moe_utils.py"
    trained_buffers = frozenset({"selection_bias"})
    balances_by_score = True
    needs_updates = True
    selection_bias: Tensor

    def __init__(
        self,
        spec: LayerSpec,
        *,
        top_k: int = 2,
        score: ScoreFunction = "sigmoid",
        renormalize: bool = True,
        init_std: float = 0.02,
    ) -> None:
        super().__init__(spec, top_k=top_k, score_fn=score, renormalize=renormalize)
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * init_std)
        self.register_buffer("selection_bias", torch.zeros(spec.num_experts))

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return `x W^T`."""
        return gate_linear(x_TD, self.weight)

    def select_experts(self, logits_TE: Tensor) -> Tensor:
        """Return the k largest biased logits."""
        return topk_indices(logits_TE.detach() + self.selection_bias, self.top_k)

    def statistics(self, routing: Routing, context: RoutingContext) -> Mapping[str, Tensor]:
        """Return the quantiles of the batch, and 1; zeros where they are not determined."""
        logits_TE = routing.logits_TE
        assert logits_TE is not None  # every `LogitRouter` has them
        beta_E = logits_TE.new_zeros(self.spec.num_experts)
        nothing = {"beta_E": beta_E, "batches": beta_E.new_zeros(())}
        if self.top_k == self.spec.num_experts:
            return nothing
        alpha_T1 = (logits_TE + self.selection_bias).topk(self.top_k + 1, dim=-1).values[:, -1:]
        margin_TE = logits_TE - alpha_T1
        if context.padding_mask is not None:
            margin_TE = margin_TE.masked_fill(context.padding_mask.unsqueeze(1), -torch.inf)
        margin_TE, _ = rows_of_all_ranks(margin_TE, context.process_group)
        num_tokens = margin_TE.shape[0]
        if num_tokens == 0:
            return nothing
        tokens = (margin_TE[:, 0] != -torch.inf).sum()
        share = (tokens * self.top_k).div(self.spec.num_experts, rounding_mode="floor")
        place = share.clamp_max(num_tokens - 1).view(1)
        beta_E = margin_TE.sort(dim=0, descending=True).values.index_select(0, place)[0]
        # Where all is padding, or a logit is NaN, there is no quantile.
        known = beta_E.isfinite().all()
        return {"beta_E": beta_E.where(known, 0.0), "batches": known.to(beta_E.dtype)}

    def update(self, statistics: Mapping[str, Tensor]) -> None:
        """Set the bias to the mean of the batches' quantiles; keep it where there were none."""
        batches = statistics["batches"]
        beta_E = statistics["beta_E"] / batches.clamp_min(1)
        self.selection_bias.copy_(torch.where(batches > 0, beta_E.mean() - beta_E, self.selection_bias))
