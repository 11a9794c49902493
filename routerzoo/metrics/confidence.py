"""`GateConfidence`: entropy and margin of the gate's distribution over experts."""
# Shape suffixes: T tokens, E experts.

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor

from routerzoo.metrics.base import RoutingMetric
from routerzoo.metrics.sets import check_num_experts
from routerzoo.routing import Routing


@final
class GateConfidence(RoutingMetric):
    """Means over tokens of

    - `gate_entropy`: entropy of the softmax over all experts' logits over its maximum log E (RMoE, arXiv:2408.06793),
      from 0 (one expert has all the probability) to 1 (uniform). It depends on the scale of the logits as much as on
      which experts they prefer.
    - `gate_margin`: largest minus second largest probability (LibMoE, arXiv:2411.00918).
    - `active_experts`: experts per token.

    The first two are NaN for a router without logits.

    Args:
        num_experts: experts of the layer.
        options: further arguments of `torchmetrics.Metric`.
    """  # noqa: D415 (the summary ends in a list)

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    shown = ("gate_entropy", "gate_margin")
    unit = "mean over tokens"
    entropy: Tensor
    margin: Tensor
    scored: Tensor
    assignments: Tensor
    tokens: Tensor

    def __init__(self, num_experts: int, **options: Any) -> None:
        super().__init__(**options)
        self.num_experts = num_experts
        for name in ("entropy", "margin", "scored", "assignments", "tokens"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, routing: Routing) -> None:
        """Add a routing's tokens. Tokens without an expert, such as padding, are left out.

        Raises:
            ValueError: a routing over another number of experts.
        """
        check_num_experts(routing, self.num_experts)
        if routing.experts_TK is None:
            return
        chosen_T = (routing.experts_TK >= 0).sum(-1)
        real_T = chosen_T > 0
        self._add(assignments=chosen_T.sum(), tokens=real_T.sum())
        if routing.logits_TE is None:
            return
        probs_TE = routing.logits_TE.detach().float().softmax(-1)
        entropy_T = torch.special.entr(probs_TE).sum(-1) / math.log(max(self.num_experts, 2))
        top_T2 = probs_TE.topk(min(2, self.num_experts), dim=-1).values
        margin_T = top_T2[:, 0] - (top_T2[:, 1] if self.num_experts > 1 else 0)
        self._add(entropy=(entropy_T * real_T).sum(), margin=(margin_T * real_T).sum(), scored=real_T.sum())

    def compute(self) -> dict[str, Tensor]:
        """Return the means."""
        return {
            "gate_entropy": (self.entropy / self.scored).float(),
            "gate_margin": (self.margin / self.scored).float(),
            "active_experts": (self.assignments / self.tokens.clamp_min(1)).float(),
        }
