"""The controls that regret is measured between: `oracle`, `blind`, and `dense` of equal active size."""
# Shape suffixes: T tokens, E experts, K choices per token.

from __future__ import annotations

import torch
from torch import Tensor

from routerzoo.router import Router
from routerzoo.routing import LayerSpec, Routing, RoutingContext

ORACLE_EXPERTS = "oracle experts"
"""Where the run leaves the ideal choices in a context's `carry`, for `OracleRouter`."""


class Control(Router):
    """A router without weights, whose parts are those of all others."""

    trainable = False

    def __init__(self, spec: LayerSpec, *, top_k: int = 2) -> None:
        super().__init__(spec, top_k=top_k)

    def scale_initial_logits(self, factor: float) -> None:
        """Nothing to scale."""


class OracleRouter(Control):
    """Ideal routing: the experts that the task names, with equal weights."""

    normalized = True

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route to the experts in the context."""
        experts_TK: Tensor = context.carry[ORACLE_EXPERTS]
        chosen_TK = experts_TK >= 0
        weights_TK = chosen_TK / chosen_TK.sum(1, keepdim=True).clamp_min(1)
        return Routing(experts_TK, weights_TK.to(x_TD.dtype))


class BlindRouter(Control):
    """k random experts for each token, anew in each pass: what routing is worth without any information."""

    normalized = True

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Draw experts from the global generator."""
        experts_TK = torch.rand(len(x_TD), self.spec.num_experts).topk(self.top_k).indices
        return Routing(experts_TK, x_TD.new_full(experts_TK.shape, 1 / self.top_k), may_drop=False)


class DenseRouter(Control):
    """The same k experts for every token, added up: a dense feed-forward network of equal active size."""

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route to the first k experts."""
        experts_TK = torch.arange(self.top_k).expand(len(x_TD), -1)
        return Routing(experts_TK, x_TD.new_ones(experts_TK.shape), may_drop=False)


CONTROLS: dict[str, type[Control]] = {"oracle": OracleRouter, "blind": BlindRouter, "dense": DenseRouter}
"""By the name that rows have."""
