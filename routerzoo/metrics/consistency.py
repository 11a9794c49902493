"""`InterRunConsistency`: correlation of expert loads between runs."""
# Shape suffixes: M runs, E experts.

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from routerzoo.metrics.base import RoutingMetric


@final
class InterRunConsistency(RoutingMetric):
    """Mean Pearson correlation of the expert loads of several runs (X-MoE, https://arxiv.org/abs/2204.09179).

    - `consistency`: mean over all pairs of runs, each with itself included, as published.
    - `between_runs`: mean over pairs of different runs; NaN for a single run.
    - `correlations_MM`: of each pair of runs.

    A run whose experts all have the same load correlates with nothing: NaN. Experts of two runs are compared by index,
    which means something only where both start from the same experts.

    Args:
        options: further arguments of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = InterRunConsistency()
        >>> for load_E in ([1.0, 2, 3], [3.0, 2, 1]):
        ...     metric.update(torch.tensor(load_E))
        >>> metric.compute()["between_runs"]
        tensor(-1.)
    """

    higher_is_better = True
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0
    shown = ("consistency", "between_runs")
    unit = "correlation"
    loads: list[Tensor] | Tensor
    num_runs: Tensor
    num_experts: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # Vectors, since torchmetrics stands an empty one in for the list of a process without runs.
        self.add_state("loads", default=[], dist_reduce_fx="cat")
        self.add_state("num_runs", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("num_experts", torch.tensor(0), dist_reduce_fx="max")

    def update(self, load_E: Tensor) -> None:
        """Add a run's load of each expert, in any unit.

        Raises:
            ValueError: not one number per expert, or another number of experts than before.
        """
        if load_E.ndim != 1 or not len(load_E) or (len(self.loads) and len(load_E) != int(self.num_experts)):
            raise ValueError(f"expected the load of each expert of one run, got {list(load_E.shape)}")
        # Correlations do not depend on the scale; large counts do not fit into every dtype.
        load_E = load_E.detach().float()
        assert isinstance(self.loads, list)  # a tensor only while processes are synchronized
        self.loads.append((load_E / load_E.abs().max().clamp_min(torch.finfo(torch.float32).tiny)).to(self.dtype))
        self.num_runs = self.num_runs + 1
        self.num_experts = torch.full_like(self.num_experts, len(load_E))

    def compute(self) -> dict[str, Tensor]:
        """Return both means, and the correlations, `[M, M]`; NaN without any run.

        Raises:
            ValueError: other processes have runs with another number of experts.
        """
        num_runs, num_experts = int(self.num_runs), int(self.num_experts)
        device = self.num_runs.device
        if not num_runs:
            return {name: torch.tensor(torch.nan, device=device) for name in (*self.shown, "correlations_MM")}
        load_N = self.loads if isinstance(self.loads, Tensor) else torch.cat(list(self.loads))
        if len(load_N) != num_runs * num_experts:
            raise ValueError(f"the runs have different numbers of experts, {num_experts} at most")
        loads_ME = load_N.cpu().double().view(num_runs, num_experts)  # few numbers, and MPS has no float64
        correlations_MM = torch.corrcoef(loads_ME).reshape(num_runs, num_runs).float().to(device)
        pairs = ~torch.eye(num_runs, dtype=torch.bool, device=device)
        return {
            "consistency": correlations_MM.mean(),
            "between_runs": correlations_MM[pairs].mean(),
            "correlations_MM": correlations_MM,
        }

    def _draw(self, result: dict[str, Tensor], ax: Any) -> Any:
        from routerzoo.metrics.figures import heat_map

        return heat_map(result["correlations_MM"], ax, xlabel="run", ylabel="run", low=-1.0)
