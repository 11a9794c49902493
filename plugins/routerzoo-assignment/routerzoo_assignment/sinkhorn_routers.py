"""Token choice balanced by optimal transport: in vision, in S-BASE, and in rare steps of training."""
# Shape suffixes: T tokens, D model width, E experts, K choices per token, G groups of tokens, S tokens of a group.

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routerzoo import LayerSpec, Router, Routing, RoutingContext, register_router
from routerzoo.distributed.collectives import of_first_rank, rows_of_all_ranks
from routerzoo.functional.losses import Scope, fields_of_scope
from routerzoo.functional.ragged import group_by_sequence
from routerzoo.functional.topk import topk, topk_softmax
from routerzoo_assignment.sinkhorn import log_sinkhorn


class _TransportRouter(Router):
    """A linear gate, and the transport plan of its scores."""

    weight: nn.Parameter
    compiles = False

    def _make_gate(self, spec: LayerSpec, init_std: float) -> None:
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * init_std)

    @torch.no_grad()
    def scale_initial_logits(self, factor: float) -> None:
        """Scale the gate."""
        self.weight.mul_(factor)

    def _log_plan(
        self,
        scores_TE: Tensor,
        context: RoutingContext,
        scope: Scope,
        epsilon: float,
        iterations: int,
        tolerance: float,
    ) -> Tensor:
        """Return the logarithm of the plan `[T, E]`; padding keeps its scores.

        The plan of a batch is that of all processes that train together.
        """
        options = {"epsilon": epsilon, "iterations": iterations, "tolerance": tolerance}
        ids_T = context.sequence_ids if scope == "sequence" else None
        sequences = group_by_sequence(len(scores_TE), ids_T, context.padding_mask, scores_TE.device)
        if scope == "batch":
            all_RE, own = rows_of_all_ranks(scores_TE.detach()[sequences.token_R], context.process_group)
            real_1R = torch.ones(1, len(all_RE), dtype=torch.bool, device=all_RE.device)
            plan_RE = log_sinkhorn(all_RE.unsqueeze(0), real_1R, **options)[0, own]
            plan_TE = plan_RE.new_zeros(scores_TE.shape).index_copy(0, sequences.token_R, plan_RE)
        else:
            plan_GSE = log_sinkhorn(sequences.to_padded(scores_TE.detach()), sequences.real_GS, **options)
            plan_TE = sequences.to_flat(plan_GSE, len(scores_TE))
        return plan_TE if context.padding_mask is None else plan_TE.where(~context.padding_mask.unsqueeze(1), scores_TE)


@register_router
@final
class SinkhornRouter(_TransportRouter):
    """Sinkhorn token choice: experts are the k largest of a token's row of the transport plan of its image.

    The balance holds within each sequence or image, in training and in evaluation; weights are the softmax of the
    logits (Liu et al. 2024, https://arxiv.org/abs/2401.15969, "Sinkhorn TC": entropy weight 1, 20 iterations). The plan
    looks at all tokens of a sequence, so this is not for decoders. S iterations cost `iterations` passes over `[T, E]`.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: experts per token.
        epsilon: weight of the plan's entropy.
        iterations: of Sinkhorn's algorithm.
        renormalize: divide the weights by their sum.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: an entropy weight that is not positive, or no iterations.
    """

    paper = "Liu et al. 2024, arXiv:2401.15969"
    requires = frozenset({"sequence_ids"})
    causal = False
    tokenwise = False
    causal_form = "SBaseRouter in evaluation, or ExpertThresholdRouter"

    def __init__(
        self,
        spec: LayerSpec,
        *,
        top_k: int = 2,
        epsilon: float = 1.0,
        iterations: int = 20,
        renormalize: bool = False,
        init_std: float = 0.02,
    ) -> None:
        _check_transport(epsilon, iterations)
        super().__init__(spec, top_k=top_k)
        self.epsilon, self.iterations, self.renormalize = epsilon, iterations, renormalize
        self.normalized, self.trains_at_top_1 = renormalize, not renormalize
        self._make_gate(spec, init_std)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Take the k largest of the plan."""
        logits_TE = F.linear(x_TD, self.weight)
        plan_TE = self._log_plan(logits_TE, context, "sequence", self.epsilon, self.iterations, 0.0)
        _, experts_TK = topk(plan_TE, self.top_k)
        weights_TK = logits_TE.softmax(-1).gather(1, experts_TK)
        if self.renormalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(1e-20)
        return Routing(experts_TK, weights_TK, logits_TE, may_drop=False)


@register_router
@final
class SBaseRouter(_TransportRouter):
    """S-BASE: in training, experts are the k largest of the transport plan of the batch; in evaluation, of the logits.

    Weights are sigmoid(logit) for k = 1, else the softmax over all experts, not renormalised (Clark et al. 2022,
    https://arxiv.org/abs/2202.01169; the form of Megatron-core 0.19, with its tolerance of 1e-4). Its code takes the
    exponential of logits, which overflows; here it is all in the log domain. No auxiliary loss.

    Training looks at the whole batch, evaluation at a token alone. In a decoder it must therefore be allowed:
    its loss in training is flattered by what the balance gives away of later tokens, its evaluation is not.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: experts per token.
        epsilon: weight of the plan's entropy.
        iterations: of Sinkhorn's algorithm, at most.
        tolerance: stop when potentials move no further than that.
        scope: balance the batch, as published, or each sequence.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: an entropy weight that is not positive, or no iterations.
    """

    paper = "Clark et al., ICML 2022, arXiv:2202.01169"
    causal_form = "ExpertThresholdRouter"

    def __init__(
        self,
        spec: LayerSpec,
        *,
        top_k: int = 1,
        epsilon: float = 1.0,
        iterations: int = 100,
        tolerance: float = 1e-4,
        scope: Scope = "batch",
        init_std: float = 0.02,
    ) -> None:
        _check_transport(epsilon, iterations)
        super().__init__(spec, top_k=top_k)
        self.require(*fields_of_scope(scope))
        self.epsilon, self.iterations, self.tolerance, self.scope = epsilon, iterations, tolerance, scope
        self._make_gate(spec, init_std)

    @property
    def causal(self) -> bool:  # type: ignore[override]
        """Evaluation is; training balances over all tokens."""
        return not self.training

    @property
    def batch_independent(self) -> bool:  # type: ignore[override]
        """Evaluation is, and training where each sequence is balanced by itself."""
        return not self.training or self.scope == "sequence"

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Choose by the plan in training, by the logits in evaluation."""
        logits_TE = F.linear(x_TD, self.weight)
        choice_TE = logits_TE
        if self.training:
            choice_TE = self._log_plan(logits_TE, context, self.scope, self.epsilon, self.iterations, self.tolerance)
        _, experts_TK = topk(choice_TE, self.top_k)
        scores_TE = logits_TE.sigmoid() if self.top_k == 1 else logits_TE.softmax(-1)
        return Routing(experts_TK, scores_TE.gather(1, experts_TK), logits_TE, may_drop=False)


@register_router
@final
class SelectiveSinkhornRouter(_TransportRouter):
    """Selective Sinkhorn routing (SSR): now and then a training step is routed by optimal transport.

    With probability `probability` a step's experts are the k largest of the transport plan of the scores (with noise),
    weighted by the plan, renormalised over them; in all other steps, and in evaluation, they are the k largest logits
    under the softmax over them (https://arxiv.org/abs/2511.08972). No auxiliary loss. Inspired by: the paper could not
    be read in full.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: experts per token.
        probability: of a step by transport; published runs take 0.001 to 0.01.
        scores: what is transported, the logits (SSR-L) or their softmax (SSR-S).
        epsilon: weight of the plan's entropy; published 0.05 to 1.
        noise: standard deviation of what is added to the scores; published 0.1 to 4.
        iterations: of Sinkhorn's algorithm, at most.
        tolerance: stop when potentials move no further than that.
        detach: give the gate no gradient in steps by transport, as other people's code does.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: a probability outside 0 to 1, an entropy weight that is not positive, scores of another name.
    """

    paper = "arXiv:2511.08972"
    inspired_by = True
    normalized = True
    trains_at_top_1 = False
    causal_form = "LinearRouter, which it is in evaluation"

    def __init__(
        self,
        spec: LayerSpec,
        *,
        top_k: int = 2,
        probability: float = 0.01,
        scores: str = "logits",
        epsilon: float = 0.5,
        noise: float = 0.1,
        iterations: int = 100,
        tolerance: float = 1e-4,
        detach: bool = False,
        init_std: float = 0.02,
    ) -> None:
        _check_transport(epsilon, iterations)
        if not 0 <= probability <= 1:
            raise ValueError(f"probability must be between 0 and 1, got {probability}")
        if scores not in ("logits", "softmax"):
            raise ValueError(f"scores must be logits or softmax, got {scores!r}")
        super().__init__(spec, top_k=top_k)
        self.probability, self.scores, self.noise, self.detach = probability, scores, noise, detach
        self.epsilon, self.iterations, self.tolerance = epsilon, iterations, tolerance
        self._make_gate(spec, init_std)

    @property
    def causal(self) -> bool:  # type: ignore[override]
        """Evaluation is."""
        return not self.training or self.probability == 0

    @property
    def batch_independent(self) -> bool:  # type: ignore[override]
        """Evaluation is."""
        return not self.training or self.probability == 0

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Take the k largest, of the plan in chosen steps."""
        logits_TE = F.linear(x_TD, self.weight)
        if not self.training or not self._transports(context):
            weights_TK, experts_TK = topk_softmax(logits_TE, self.top_k)
            return Routing(experts_TK, weights_TK, logits_TE, may_drop=False)
        scores_TE = logits_TE if self.scores == "logits" else logits_TE.softmax(-1)
        noisy_TE = scores_TE + self.noise * torch.randn_like(scores_TE)
        plan_TE = self._log_plan(noisy_TE, context, "batch", self.epsilon, self.iterations, self.tolerance)
        _, experts_TK = topk(plan_TE, self.top_k)
        # The potentials are constants, so that the plan's gradient is its kernel's.
        kernel_TE = scores_TE.detach() if self.detach else scores_TE
        log_TE = plan_TE + (kernel_TE - scores_TE.detach()) / self.epsilon
        return Routing(experts_TK, log_TE.gather(1, experts_TK).softmax(-1), logits_TE, may_drop=False)

    def _transports(self, context: RoutingContext) -> bool:
        drawn = torch.rand(())
        if context.process_group is not None:
            drawn = of_first_rank(drawn.to(self.weight.device), context.process_group)  # all of them, or none
        return bool(drawn < self.probability)


def _check_transport(epsilon: float, iterations: int) -> None:
    if epsilon <= 0:
        raise ValueError(f"epsilon must be above 0, got {epsilon}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
