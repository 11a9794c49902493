"""SelectiveSinkhornRouter: optimal transport in rare steps of training (https://arxiv.org/abs/2511.08972)."""
# Shape suffixes: T tokens, D model width, E experts, K choices per token.

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from routerzoo import ByMode, LayerSpec, LogitRouter, Routing, RoutingContext, register_router
from routerzoo.distributed.collectives import of_first_rank
from routerzoo.functional import gate_linear, topk_softmax
from routerzoo_assignment.transport import check_transport, transport_plan


@register_router
@final
class SelectiveSinkhornRouter(LogitRouter):
    """Selective Sinkhorn routing (SSR): now and then a training step is routed by optimal transport.

    With probability `probability` a step's experts are the k largest of the transport plan of the scores (with noise),
    weighted by the plan, renormalized over them; in all other steps, and in evaluation, they are the k largest logits
    under the softmax over them. No auxiliary loss. Inspired by: the paper could not be read in full.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: experts per token.
        probability: of a step by transport; published runs take 0.001 to 0.01.
        scores: what is transported, the logits (SSR-L) or their softmax (SSR-S).
        epsilon: weight of the plan's entropy; published 0.05 to 1.
        noise: standard deviation of what is added to the scores; published 0.1 to 4.
        iterations: of Sinkhorn's algorithm, at most.
        tolerance: stop when potentials move no further than that.
        detach: give the gate no gradient in steps by transport, as third-party code does.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: a probability outside 0 to 1, an entropy weight that is not positive, scores of another name.
    """

    paper = "arXiv:2511.08972"
    inspired_by = True
    causal_form = "LinearRouter, which it is in evaluation"
    compiles = False
    checked_with: ClassVar[Mapping[str, Any]] = {"probability": 1.0}  # by default no check would meet the transport

    def __init__(
        self,
        spec: LayerSpec,
        *,
        top_k: int = 2,
        probability: float = 0.01,
        scores: Literal["logits", "softmax"] = "logits",
        epsilon: float = 0.5,
        noise: float = 0.1,
        iterations: int = 100,
        tolerance: float = 1e-4,
        detach: bool = False,
        init_std: float = 0.02,
    ) -> None:
        check_transport(epsilon, iterations)
        if not 0 <= probability <= 1:
            raise ValueError(f"probability must be between 0 and 1, got {probability}")
        if scores not in ("logits", "softmax"):
            raise ValueError(f"scores must be logits or softmax, got {scores!r}")
        super().__init__(spec, top_k=top_k)
        self.causal = self.batch_independent = ByMode(training=probability == 0)
        self.probability, self.scores, self.noise, self.detach = probability, scores, noise, detach
        self.epsilon, self.iterations, self.tolerance = epsilon, iterations, tolerance
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * init_std)

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return `x W^T`."""
        return gate_linear(x_TD, self.weight)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Select and weight by the plan in some steps of training."""
        if not self.training or not self._transports(context):
            return super().route(x_TD, context)
        logits_TE = self.logits(x_TD, context)
        scores_TE = logits_TE if self.scores == "logits" else logits_TE.softmax(-1)
        plan_TE = transport_plan(
            scores_TE + self.noise * torch.randn_like(scores_TE),
            context,
            scope="batch",
            epsilon=self.epsilon,
            iterations=self.iterations,
            tolerance=self.tolerance,
        )
        if not self.detach:
            # The potentials are constants, so that the plan's gradient is its kernel's.
            plan_TE = plan_TE + (scores_TE - scores_TE.detach()) / self.epsilon
        weights_TK, experts_TK = topk_softmax(plan_TE, self.top_k)
        return Routing(experts_TK, weights_TK, logits_TE, may_drop=False)

    def _transports(self, context: RoutingContext) -> bool:
        drawn = torch.rand(())
        if context.process_group is not None:
            drawn = of_first_rank(drawn.to(self.weight.device), context.process_group)  # all of them, or none
        return bool(drawn < self.probability)
