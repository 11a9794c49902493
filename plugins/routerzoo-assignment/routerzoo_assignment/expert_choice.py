"""Experts choose tokens (Zhou et al. 2022, https://arxiv.org/abs/2202.09368), and a form of it for decoders."""
# Shape suffixes: T tokens, D model width, E experts, K choices per token, G sequences, S tokens of a sequence,
# C tokens of an expert in a sequence, N assignments.

from __future__ import annotations

from typing import final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from routerzoo import LayerSpec, Router, Routing, RoutingContext, register_router
from routerzoo.distributed.collectives import rows_of_all_ranks
from routerzoo.functional.ragged import group_by_sequence


@register_router
@final
class ExpertChoiceRouter(Router):
    """In each sequence, every expert takes its `top_k * S / E` best tokens (rounded up), by the softmax over experts.

    Loads are equal by construction, without a loss; a token may have no expert, or many. `top_k` is the mean number of
    experts per token, the paper's capacity factor. The weight is the softmax's value.

    An expert's choice among the tokens of a sequence looks at later tokens, so this is not for decoders;
    `ExpertThresholdRouter` is. Experts choose within a sequence or image, never across a batch, where one user's tokens
    would push out another's.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: mean number of experts per token.
        init_std: standard deviation of the gate's initial weights.
    """

    paper = "Zhou et al., NeurIPS 2022, arXiv:2202.09368"
    requires = frozenset({"sequence_ids"})
    causal = False
    tokenwise = False
    compiles = False
    causal_form = "ExpertThresholdRouter"

    def __init__(self, spec: LayerSpec, *, top_k: int = 2, init_std: float = 0.02) -> None:
        super().__init__(spec, top_k=top_k)
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * init_std)

    @torch.no_grad()
    def scale_initial_logits(self, factor: float) -> None:
        """Scale the gate."""
        self.weight.mul_(factor)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Let each expert take its tokens."""
        num_experts = self.spec.num_experts
        logits_TE = F.linear(x_TD, self.weight)
        sequences = group_by_sequence(len(x_TD), context.sequence_ids, context.padding_mask, x_TD.device)
        probs_GSE = sequences.to_padded(logits_TE.softmax(-1), fill=-1.0)  # below all probabilities
        capacity_G = -(-sequences.lengths_G * self.top_k // num_experts)
        length = sequences.real_GS.shape[1]
        capacity = min(-(-length * self.top_k // num_experts), length)
        weight_GCE, chosen_GCE = probs_GSE.topk(capacity, dim=1)
        token_GCE = sequences.token_GS.unsqueeze(-1).expand_as(probs_GSE).gather(1, chosen_GCE)
        rank_C = torch.arange(capacity, device=x_TD.device)
        taken_GCE = (rank_C < capacity_G.unsqueeze(1)).unsqueeze(-1) & (token_GCE >= 0)
        expert_GCE = torch.arange(num_experts, device=x_TD.device).expand_as(token_GCE)
        return Routing(
            token_N=token_GCE.clamp_min(0).flatten(),
            expert_N=expert_GCE.where(taken_GCE, -1).flatten(),
            weight_N=weight_GCE.where(taken_GCE, 0.0).flatten(),
            logits_TE=logits_TE,
        )


@register_router
@final
class ExpertThresholdRouter(Router):
    """Expert choice for decoders: expert e takes every token whose probability is above the expert's threshold.

    The threshold follows, over training, the probability of the token that would just be among the `top_k * T / E` best
    of the batch, on all processes that train together: `tau_e <- (1 - speed) tau_e + speed * tau_e(batch)`, once per
    optimiser step, averaged over gradient accumulation, padding left out. A token's choice then needs no other token,
    in training as in evaluation, and the mean number of experts per token stays near `top_k`. In the first step each
    token takes its `top_k` best experts.

    Inspired by expert choice's use of a threshold at inference; the thresholds' rule is ours.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: mean number of experts per token.
        speed: how fast thresholds follow.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: a speed outside 0 to 1.
    """

    paper = "Zhou et al., NeurIPS 2022, arXiv:2202.09368"
    inspired_by = True
    compiles = False
    trained_buffers = frozenset({"thresholds_E", "calibrated", "batch_thresholds_E", "num_batches"})
    thresholds_E: Tensor
    calibrated: Tensor
    batch_thresholds_E: Tensor
    num_batches: Tensor

    def __init__(self, spec: LayerSpec, *, top_k: int = 2, speed: float = 0.1, init_std: float = 0.02) -> None:
        if not 0 < speed <= 1:
            raise ValueError(f"speed must be above 0 and at most 1, got {speed}")
        super().__init__(spec, top_k=top_k)
        self.speed = speed
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * init_std)
        self.register_buffer("thresholds_E", torch.zeros(spec.num_experts))
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool))
        # Of the optimiser step that is under way; nothing to keep.
        self.register_buffer("batch_thresholds_E", torch.zeros(spec.num_experts), persistent=False)
        self.register_buffer("num_batches", torch.zeros(1), persistent=False)

    @torch.no_grad()
    def scale_initial_logits(self, factor: float) -> None:
        """Scale the gate."""
        self.weight.mul_(factor)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Take every expert whose threshold the token passes."""
        logits_TE = F.linear(x_TD, self.weight)
        probs_TE = logits_TE.softmax(-1)
        best_TE = torch.zeros_like(probs_TE, dtype=torch.bool)
        best_TE = best_TE.scatter(1, probs_TE.topk(self.top_k, dim=-1).indices, True)
        chosen_TE = torch.where(self.calibrated, probs_TE > self.thresholds_E, best_TE)
        # What is no number must not look like a token without experts.
        chosen_TE = chosen_TE | (probs_TE.isnan() & best_TE)
        if self.training:
            self._observe(probs_TE.detach(), context)
        token_N, expert_N = chosen_TE.nonzero().unbind(1)
        return Routing(
            token_N=token_N,
            expert_N=expert_N,
            weight_N=probs_TE[token_N, expert_N],
            logits_TE=logits_TE,
            may_drop=False,
        )

    @torch.no_grad()
    def _observe(self, probs_TE: Tensor, context: RoutingContext) -> None:
        if context.padding_mask is not None:
            probs_TE = probs_TE[~context.padding_mask]
        probs_TE, _ = rows_of_all_ranks(probs_TE, context.process_group)
        if len(probs_TE):
            place = min(-(-len(probs_TE) * self.top_k // self.spec.num_experts), len(probs_TE) - 1)
            self.batch_thresholds_E += probs_TE.sort(dim=0, descending=True).values[place].to(self.thresholds_E.dtype)
            self.num_batches += 1

    @torch.no_grad()
    def before_optimizer_step(self) -> None:
        """Let the thresholds follow."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.batch_thresholds_E)
            dist.all_reduce(self.num_batches)
        mean_E = self.batch_thresholds_E / self.num_batches.clamp_min(1)
        speed = torch.where(self.calibrated, self.speed, 1.0) * (self.num_batches > 0)
        self.thresholds_E.lerp_(mean_E, speed.expand_as(mean_E).to(mean_E.dtype))
        self.calibrated |= (self.num_batches > 0).squeeze(0)
        self.batch_thresholds_E.zero_()
        self.num_batches.zero_()
