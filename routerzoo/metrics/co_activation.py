"""`CoActivation`: co-activated experts."""
# Shape suffixes: T tokens, E experts.

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from routerzoo.metrics.base import RoutingMetric
from routerzoo.metrics.sets import expert_sets
from routerzoo.routing import Routing


@final
class CoActivation(RoutingMetric):
    """Entry (i, j) is the share of expert i's tokens that expert j is selected for too, `N_ij / N_i`.

    OLMoE, equation 6 (https://arxiv.org/abs/2409.02060). It is not symmetric: a rare expert may always come with a
    frequent one. The diagonal is 1; rows of experts without a token are 0. By chance an entry is about
    `(k - 1) / (E - 1)`.

    Args:
        num_experts: experts of the layer.
        options: further arguments of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = CoActivation(num_experts=3)
        >>> metric.update(Routing(torch.tensor([[0, 1], [0, 2]]), torch.full((2, 2), 0.5)))
        >>> metric.compute()
        tensor([[1.0000, 0.5000, 0.5000],
                [1.0000, 1.0000, 0.0000],
                [1.0000, 0.0000, 1.0000]])
    """

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    unit = "share of an expert's tokens"
    pairs_EE: Tensor

    def __init__(self, num_experts: int, **options: Any) -> None:
        super().__init__(**options)
        self.num_experts = num_experts
        self.add_state("pairs_EE", torch.zeros(num_experts, num_experts, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, routing: Routing) -> None:
        """Count a routing's pairs.

        Raises:
            ValueError: a soft or merged routing, or one over another number of experts.
        """
        chosen_TE = expert_sets(routing, self.num_experts).float()
        self._add(pairs_EE=chosen_TE.T @ chosen_TE)

    def compute(self) -> Tensor:
        """Return the shares, `[E, E]`."""
        return (self.pairs_EE / self.pairs_EE.diagonal().unsqueeze(1).clamp_min(1)).float()

    def _numbers(self, result: Tensor) -> dict[str, Tensor]:
        shares_EE = self._without_diagonal(result, 0.0)
        # Means do not say much: at a fixed k, rows add up to k - 1.
        return {"most co-activated pair": shares_EE.max(), "median pair": shares_EE.median()}

    def _draw(self, result: Tensor, ax: Any) -> Any:
        from routerzoo.metrics.figures import heat_map

        return heat_map(self._without_diagonal(result, torch.nan), ax, xlabel="co-activated expert", ylabel="expert")

    def _without_diagonal(self, shares_EE: Tensor, value: float) -> Tensor:
        return shares_EE.reshape(self.num_experts, self.num_experts).clone().fill_diagonal_(value)
