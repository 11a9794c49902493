"""`InterRunConsistency`: correlation of expert loads between runs."""
# Shape suffixes: M runs, E experts.

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from torchmetrics import Metric


@final
class InterRunConsistency(Metric):
    """Mean Pearson correlation of the expert loads of several runs (X-MoE, https://arxiv.org/abs/2204.09179).

    - `consistency`: mean over all pairs of runs, each with itself included, as published.
    - `between_runs`: mean over pairs of different runs; NaN for a single run.

    Experts of two runs are compared by index, which means something only where both start from the same experts.

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

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    loads: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("loads", default=[], dist_reduce_fx="cat")

    def update(self, load_E: Tensor) -> None:
        """Add a run's load of each expert, in any unit.

        Raises:
            ValueError: not one number per expert, or another number of experts than before.
        """
        if load_E.ndim != 1 or (self.loads and load_E.shape != self.loads[0].shape[1:]):
            raise ValueError(f"expected the load of each expert of one run, got {list(load_E.shape)}")
        self.loads.append(load_E.detach().double().unsqueeze(0))

    def correlations(self) -> Tensor:
        """Return the correlation of each pair of runs, `[M, M]`.

        Raises:
            ValueError: there has been no update.
        """
        if not len(self.loads):
            raise ValueError("InterRunConsistency has no runs: update it with the load of each first")
        loads = self.loads if isinstance(self.loads, Tensor) else torch.cat(list(self.loads))
        return torch.corrcoef(loads).reshape(len(loads), len(loads)).float()

    def compute(self) -> dict[str, Tensor]:
        """Return both means."""
        correlations_MM = self.correlations()
        pairs = ~torch.eye(len(correlations_MM), dtype=torch.bool, device=correlations_MM.device)
        return {"consistency": correlations_MM.mean(), "between_runs": correlations_MM[pairs].mean()}

    def plot(self, val: Tensor | None = None, ax: Any = None) -> Any:
        """Draw the correlation of each pair of runs, by default those computed; return figure and axes."""
        from routerzoo.metrics.figures import heat_map

        return heat_map(self.correlations() if val is None else val, ax, xlabel="run", ylabel="run", low=-1.0)
