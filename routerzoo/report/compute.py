"""Quality against training FLOPs: the points of a task at all its budgets, and what scaling laws say of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from routerzoo.report.analysis import Analysis, TaskAnalysis
from routerzoo.report.collect import Sweep
from routerzoo.report.statistics.intervals import Interval, interval
from routerzoo.report.statistics.scaling import FEWEST_BUDGETS, ScalingFit, fit_scaling
from routerzoo.sweep.plan import TOLERANCE

BUDGET_AXES = ("max_steps", "max_epochs")
"""Axes of a grid that are budgets: what differs in these alone is one scaling curve."""


@dataclass(frozen=True)
class Compute:
    """A task at all its budgets.

    Args:
        name: of the task, without its budget.
        parts: the task at each budget.
        points: mean metric by router and training FLOPs.
        losses: likewise of losses, on the scale of the fit.
        fit: None where there is none.
        why_not: a sentence, where there is none.
        unit: of the losses.
    """

    name: str
    parts: Sequence[TaskAnalysis]
    points: dict[tuple[str, float], Interval]
    losses: dict[tuple[str, float], Interval]
    fit: ScalingFit | None
    why_not: str
    unit: str

    @property
    def is_equal(self) -> bool:
        """Whether all training took the same FLOPs, but for what is not worth a word."""
        flops = [flops for _, flops in self.points]
        return not flops or max(flops) <= (1 + TOLERANCE) * min(flops)


def by_compute(sweep: Sweep, analysis: Analysis) -> list[Compute]:
    """Return the tasks by their compute, those that differ in budget alone as one."""
    groups: dict[str, list[TaskAnalysis]] = {}
    for task in sweep.main_tasks():
        rest = [part for part in task.setting.split() if part.partition("=")[0] not in BUDGET_AXES]
        groups.setdefault(" ".join([task.base or task.name, *rest]), []).append(analysis.tasks[task.name])
    return [_compute(name, parts) for name, parts in groups.items()]


def _compute(name: str, parts: Sequence[TaskAnalysis]) -> Compute:
    points, means = {}, {}
    losses: dict[str, dict[float, dict[int, float]]] = {}
    for part in parts:
        shift = 1.0 if part.results.metric.kind == "share" else 0.0  # errors, of hits
        for router in part.results.values:
            flops = part.task.budget(router).flops
            known = {seed: loss + shift for seed, loss in part.results.losses(router).items() if math.isfinite(loss)}
            if known and not math.isnan(flops):
                points[router, flops] = part.mean(router)
                means[router, flops] = interval(list(known.values()))
                losses.setdefault(router, {})[flops] = known
    results, budgets = parts[0].results, max((len(found) for found in losses.values()), default=0)
    fit, why = None, ""
    if budgets < FEWEST_BUDGETS:
        why = f"A scaling law needs {FEWEST_BUDGETS} budgets; here {'is one' if budgets == 1 else f'are {budgets}'}."
    elif not results.lower_is_better and results.metric.kind != "share":
        why = f"A scaling law is that of a loss, and nothing says how {parts[0].task.metric} is one."
    elif (fit := fit_scaling(losses)) is None:
        why = "No power law fits: the loss does not fall with compute in all routers."
    unit = "error rate" if results.metric.kind == "share" else results.metric.unit
    return Compute(name, parts, points, means, fit, why, unit)
