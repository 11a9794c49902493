"""`ExpertNorms`: norms of the experts' outputs, and of their parameters, relative to the median expert."""
# Shape suffixes: E experts, N rows sorted by expert, D model width.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from routerzoo.metrics.base import RoutingMetric


@torch.no_grad()
def parameter_norms(experts: nn.Module, num_experts: int) -> Tensor:
    """Return the norm of each expert's parameters, float32 `[num_experts]`, without a copy of them.

    Parameters are those that are stacked over experts; a norm that is NaN counts as infinite. All are NaN where the
    weights are not at hand (offloaded, sharded or quantized).
    """
    stacked = [p for p in experts.parameters() if p.ndim and p.shape[0] == num_experts]
    at_hand = stacked and all(type(p) is nn.Parameter and not p.is_meta and p.itemsize > 1 for p in stacked)
    if not at_hand:
        return torch.full((num_experts,), torch.nan)
    # One expert at a time: a norm in another dtype than the weights' may upcast all of what it is given.
    rows = [
        torch.stack([torch.linalg.vector_norm(part, dtype=_wide(part)).float() for part in p.detach().unbind(0)])
        for p in stacked
    ]
    norms_E: Tensor = torch.linalg.vector_norm(torch.stack(rows), dim=0)
    return norms_E.nan_to_num(nan=torch.inf)


def relative_norms(norms_E: Tensor) -> Tensor:
    """Return each expert's norm over the median of those that are known; NaN stands for an expert without a token."""
    return norms_E / norms_E.nanmedian()


def norm_statistics(norms_E: Tensor) -> dict[str, Tensor]:
    """Return the `largest` and the `smallest` norm over the median; both 1 where all are equal.

    Args:
        norms_E: norms; NaN for experts that have none, such as those without a token.
    """
    relative_E = relative_norms(norms_E)
    known_E = ~norms_E.isnan()
    return {
        "largest": relative_E.masked_fill(~known_E, -torch.inf).max().where(known_E.any(), torch.nan),
        "smallest": relative_E.masked_fill(~known_E, torch.inf).min().where(known_E.any(), torch.nan),
    }


@final
class ExpertNorms(RoutingMetric):
    """Mean norm of each expert's outputs, before they are weighted.

    `largest` and `smallest` are over the median expert. An expert whose output vanishes or blows up shows here and in
    `parameter_norms` before it shows in load or loss (Step 3.5 Flash, https://arxiv.org/abs/2602.10604). Norms that are
    NaN or inf count as infinite.

    Args:
        num_experts: experts of the layer.
        options: further arguments of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = ExpertNorms(num_experts=3)
        >>> metric.update(torch.tensor([[3.0, 4.0], [5.0, 0.0], [0.0, 10.0]]), torch.tensor([2, 3, 3]))
        >>> metric.norms_E
        tensor([ 5., 10., nan])
    """

    plot_lower_bound = 0.0
    shown = ("largest", "smallest")
    unit = "norm / median expert's"
    sums_E: Tensor
    rows_E: Tensor

    def __init__(self, num_experts: int, **options: Any) -> None:
        super().__init__(**options)
        self.num_experts = num_experts
        for name in ("sums_E", "rows_E"):
            self.add_state(name, torch.zeros(num_experts, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, y_ND: Tensor, ends_E: Tensor) -> None:
        """Add rows.

        Args:
            y_ND: outputs, sorted by expert.
            ends_E: where each expert's rows end; rows behind the last one belong to none.

        Raises:
            ValueError: another number of experts.
        """
        if len(ends_E) != self.num_experts:
            raise ValueError(f"there are {len(ends_E)} experts, the metric is of num_experts = {self.num_experts}")
        norms_N = torch.linalg.vector_norm(y_ND.detach(), dim=1, dtype=_wide(y_ND)).to(self.sums_E.dtype)
        norms_N = norms_N.nan_to_num(nan=torch.inf)
        rows_N = torch.arange(len(norms_N), device=norms_N.device, dtype=ends_E.dtype)
        expert_N = torch.searchsorted(ends_E, rows_N, right=True)
        # One bin more collects the rows of no expert.
        bins = torch.zeros(self.num_experts + 1, dtype=norms_N.dtype, device=norms_N.device)
        rows_E = ends_E.diff(prepend=ends_E.new_zeros(1))
        self._add(sums_E=bins.index_add(0, expert_N, norms_N)[:-1], rows_E=rows_E)

    @property
    def norms_E(self) -> Tensor:
        """Each expert's mean norm; NaN for an expert without a row."""
        return (self.sums_E / self.rows_E).float()

    def compute(self) -> dict[str, Tensor]:
        """Return `norm_statistics` of the means."""
        return norm_statistics(self.norms_E)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class OutputHook:
    """Updates an `ExpertNorms` with all that a bank of experts returns.

    A layer that keeps its tokens' order for the experts (`low_memory`) must be told not to, or there is nothing to see;
    neither is there where experts are merged.

    Args:
        experts: the bank.
        metric: returns the metric to update, None for none now.
    """

    def __init__(self, experts: nn.Module, metric: Callable[[], ExpertNorms | None]) -> None:
        self.metric = metric
        self._handle = experts.register_forward_hook(self._record)

    def remove(self) -> None:
        """Watch no more."""
        self._handle.remove()

    def _record(self, experts: nn.Module, args: tuple[Any, ...], y_ND: Tensor) -> None:
        metric = self.metric()
        ends_E = args[1] if len(args) == 2 else None
        if metric is not None and isinstance(ends_E, Tensor) and len(ends_E) == metric.num_experts:
            metric.update(y_ND, ends_E)
