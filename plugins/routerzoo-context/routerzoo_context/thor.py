"""ThorRouter: experts at random, in training and in evaluation (Zuo et al. 2022, https://arxiv.org/abs/2110.04260)."""
# Shape suffixes: T tokens, D model width, K experts of a token.

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor

from routerzoo import LayerSpec, Router, Routing, RoutingContext, register_router
from routerzoo.functional.gate import at_least_float32

_TABLE = 1021  # a prime, so that no period of the data meets the table's


@register_router
@final
class ThorRouter(Router):
    """Stochastic experts: in training one expert, drawn at random for each layer and pass, computes the whole batch.

    There is no gate to learn and no load to balance. What makes it work is the loss: each batch goes through the model
    twice, with other experts, and the two predictions are pulled together. That is the task's `consistency` (5.0 in the
    paper's translation experiments); without it this is a random choice.

    In evaluation the paper draws an expert for each token. Here an evaluation must give the same answer twice and must
    not depend on what else is in the batch, so a token's expert follows from its position, by a table drawn when the
    router is built (`sampled`); or all experts compute, with weight 1 / E (`ensemble`).

    Args:
        spec: sizes of the layer the router sits in.
        evaluate: one expert, or the mean of all.
    """

    paper = "Zuo et al., ICLR 2022, arXiv:2110.04260"
    requires = frozenset({"positions"})
    trainable = False
    normalized = True
    trains_at_top_1 = False
    table: Tensor

    def __init__(self, spec: LayerSpec, *, evaluate: Literal["sampled", "ensemble"] = "sampled") -> None:
        if evaluate not in ("sampled", "ensemble"):
            raise ValueError(f"evaluate must be sampled or ensemble, got {evaluate!r}")
        super().__init__(spec, top_k=1, max_top_k=1)
        self.evaluate = evaluate
        self.register_buffer("table", torch.randint(spec.num_experts, (_TABLE,)))

    def scale_initial_logits(self, factor: float) -> None:
        """Do nothing: there are no logits."""

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Draw an expert, or look it up."""
        num_tokens = len(x_TD)
        if self.training:
            drawn = torch.randint(self.spec.num_experts, (1, 1), device=x_TD.device)
            experts_TK = drawn.expand(num_tokens, 1)
        elif self.evaluate == "ensemble":
            experts_TK = torch.arange(self.spec.num_experts, device=x_TD.device).expand(num_tokens, -1)
        else:
            assert context.positions is not None  # `forward` checked what `requires` names.
            experts_TK = self.table[context.positions % _TABLE].unsqueeze(1)
        # A hidden state that is NaN must not be routed as if nothing were wrong.
        nothing_T1 = 0.0 * at_least_float32(x_TD.detach()).sum(-1, keepdim=True)
        return Routing(experts_TK, (nothing_T1 + 1.0 / experts_TK.shape[1]).expand_as(experts_TK), may_drop=False)
