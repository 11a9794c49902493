"""`ExpertLoad`: how balanced the experts' load is."""
# Shape suffixes: E experts.

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor

from routerzoo.metrics.base import RoutingMetric
from routerzoo.metrics.sets import check_num_experts
from routerzoo.routing import Routing


def load_statistics(counts_E: Tensor) -> dict[str, Tensor]:
    """Return statistics of the experts' load.

    With n_e the assignments of expert e and n their mean:

    - `load_max`, `load_min`: largest and smallest n_e / n; both 1 at perfect balance.
    - `load_max_violation`: `load_max - 1`, the MaxVio of Wang et al. 2024, arXiv:2408.15664.
    - `load_cv`: standard deviation of n_e over n (Shazeer et al. 2017).
    - `load_entropy`: entropy of the shares n_e / sum over its maximum log E; 1 is balanced, 0 collapsed.
    - `dead_experts`: experts that were never selected.

    Args:
        counts_E: assignments of each expert.

    Returns:
        Scalars. Without any assignment they are those of perfect balance, with all experts dead.
    """
    counts_E = counts_E.float() if counts_E.device.type == "mps" else counts_E.double()  # MPS has no float64
    total = counts_E.sum()
    num_experts = len(counts_E)
    relative_E = counts_E * num_experts / total if total > 0 else torch.ones_like(counts_E)
    share_E = relative_E / num_experts
    entropy = torch.special.entr(share_E).sum() / math.log(num_experts) if num_experts > 1 else share_E.sum()
    statistics = {
        "load_max": relative_E.max(),
        "load_min": relative_E.min(),
        "load_max_violation": relative_E.max() - 1,
        "load_cv": relative_E.std(correction=0),
        "load_entropy": entropy,
        "dead_experts": (counts_E == 0).sum(),
    }
    return {name: value.float() for name, value in statistics.items()}


@final
class ExpertLoad(RoutingMetric):
    """Assignments per expert over all updates, and `load_statistics` of them.

    Args:
        num_experts: experts of the layer.
        options: further arguments of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = ExpertLoad(num_experts=4)
        >>> experts_TK = torch.tensor([[0, 1], [2, 3]])
        >>> metric.update(Routing(experts_TK, torch.full((2, 2), 0.5)))
        >>> metric.compute()["load_entropy"]
        tensor(1.)
    """

    plot_lower_bound = 0.0
    shown = ("load_max", "load_min", "load_cv", "load_entropy")
    unit = "load / mean load; entropy"
    counts_E: Tensor

    def __init__(self, num_experts: int, **options: Any) -> None:
        super().__init__(**options)
        self.num_experts = num_experts
        self.add_state("counts_E", torch.zeros(num_experts, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, routing: Routing) -> None:
        """Count a routing's assignments.

        Raises:
            ValueError: a routing over another number of experts.
        """
        check_num_experts(routing, self.num_experts)
        self._add(counts_E=routing.expert_load(self.num_experts))

    @property
    def shares_E(self) -> Tensor:
        """Each expert's share of all assignments; NaN without any."""
        return (self.counts_E / self.counts_E.sum()).float()

    def compute(self) -> dict[str, Tensor]:
        """Return `load_statistics`."""
        return load_statistics(self.counts_E)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw each expert's load relative to the mean as a bar, the statistics of a result, or their curves.

        Args:
            val: a result of `forward` or `compute`, or a list of these; by default the load of each expert is drawn.
            ax: axes to draw into.

        Returns:
            Figure and axes.
        """
        from routerzoo.metrics.figures import load_bars

        return load_bars(self.counts_E, ax) if val is None else super().plot(val, ax)
