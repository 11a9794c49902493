"""`MaskRouter`: the base class of routers that select as many experts as a token needs."""
# Shape suffixes: T tokens, D model width, E experts, K choices per token, N assignments.

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from routerzoo import LayerSpec, LogitRouter, Routing, RoutingContext
from routerzoo.functional import apply_score_fn, gather_weights


class MaskRouter(LogitRouter):
    """Selects the experts of a mask; a token may have any number of them.

    A subclass implements `logits` and `mask`, and `scores` where its weights are not the softmax over all experts.

    Args:
        spec: sizes of the layer that the router sits in.
    """

    renormalize = False
    compiles = False

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec, top_k=1, max_top_k=1)

    @abstractmethod
    def mask(self, logits_TE: Tensor) -> Tensor:
        """Return which experts are selected, bool `[tokens, num_experts]`."""

    def scores(self, logits_TE: Tensor) -> Tensor:
        """Return the weight that each expert has where it is selected, `[tokens, num_experts]`."""
        return apply_score_fn(logits_TE, self.score_fn)

    def select_experts(self, logits_TE: Tensor) -> Tensor:
        """Return the experts of the mask, `[tokens, num_experts]`, -1 for the others; expert 0 where logits are NaN."""
        experts_E = torch.arange(logits_TE.shape[1], device=logits_TE.device)
        nan_T1 = logits_TE.isnan().any(1, keepdim=True)
        return torch.where(torch.where(nan_T1, experts_E == 0, self.mask(logits_TE)), experts_E, -1)

    def combine_weights(self, logits_TE: Tensor, experts_TK: Tensor, *, may_drop: bool = True) -> Tensor:
        """Return the scores of given experts, `[tokens, k]`; 0 for none (-1)."""
        return gather_weights(self.scores(logits_TE), experts_TK)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route, and drop the choices of -1, which waits for the device but computes no more than was selected."""
        routing = super().route(x_TD, context)
        experts_TE, weights_TE = routing.experts_TK, routing.weights_TK
        assert experts_TE is not None
        assert weights_TE is not None
        token_N, expert_N = (experts_TE >= 0).nonzero().unbind(1)
        weight_N = weights_TE[token_N, expert_N]
        return replace(routing, experts_TK=None, weights_TK=None, token_N=token_N, expert_N=expert_N, weight_N=weight_N)
