"""What the runs of a sweep show: comparisons, the best router, ranks, and what more seeds could show."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from routerzoo.report.collect import Sweep, Task
from routerzoo.report.statistics.best import Best, find_best
from routerzoo.report.statistics.comparisons import ALPHA, INTERIM_ALPHA, Comparison, Pairs, Results, compare_all
from routerzoo.report.statistics.intervals import Interval, interval
from routerzoo.report.statistics.margins import metric
from routerzoo.report.statistics.power import can_show_equivalence, detectable_difference, seeds_to_settle
from routerzoo.report.statistics.ranks import improvement, mean_ranks
from routerzoo.sweep.plan import TOLERANCE


@dataclass(frozen=True)
class Outlook:
    """What a pair's number of seeds can show, at its spread and after correction; `power` has the assumptions.

    Args:
        detectable: true difference that is found with 80 % power; NaN without a t-test.
        can_show_equivalence: whether equivalence can be shown at all with so many seeds.
        seeds_to_settle: seeds of each router, those at hand included; None where 1,000 do not do, or nothing is known.
    """

    detectable: float
    can_show_equivalence: bool
    seeds_to_settle: int | None


@dataclass(frozen=True)
class TaskAnalysis:
    """What the runs of a task show.

    Args:
        task: the runs.
        results: its numbers, as they are compared.
        pairs: comparisons of every router with every other.
        best: the best router, and which may be as good.
        alpha: level of the verdicts of the report.
    """

    task: Task
    results: Results
    pairs: Pairs
    best: Best
    alpha: float

    def against_baseline(self, variant: str) -> Comparison | None:
        """Return the comparison with the baseline; None of the baseline itself, or without one."""
        return self.pairs.get((variant, self.results.baselines.get(variant, "")))

    def against_best(self, variant: str) -> Comparison | None:
        """Return the comparison with the best; None of the best itself."""
        return self.pairs.get((variant, self.best.router or ""))

    def mean(self, variant: str) -> Interval:
        """Return the mean of a variant's finished runs, with its 95 % interval; NaN without any."""
        values = self.task.finished(variant)
        if not values:
            return Interval(math.nan, math.nan, math.nan)
        return interval(values, is_share=self.results.metric.kind == "share")

    def outlook(self, comparison: Comparison) -> Outlook:
        """Return what a comparison's number of seeds can show, at the level of a finished report."""
        if math.isnan(comparison.error):
            return Outlook(math.nan, False, None)
        paired, scale = self.results.paired, ALPHA / self.alpha
        sd = comparison.error * math.sqrt(comparison.seeds if paired else comparison.seeds / 2)
        level, of_equivalence = scale * comparison.level, scale * (1 - comparison.bounds_level) / 2
        return Outlook(
            detectable_difference(sd, comparison.seeds, level, paired=paired),
            can_show_equivalence(sd, comparison.seeds, comparison.margin, of_equivalence, paired=paired),
            seeds_to_settle(comparison.difference.mean, sd, comparison.margin, level, paired=paired),
        )

    def correlation(self, one: str, other: str) -> float:
        """Return the correlation of two routers over seeds: what pairing by seed is worth; NaN where unknown."""
        x, y = self.results.losses(one), self.results.losses(other)
        seeds = [seed for seed in x if seed in y and math.isfinite(x[seed] + y[seed])]
        values = np.array([[x[seed], y[seed]] for seed in seeds])
        if len(seeds) < 3 or not np.ptp(values, axis=0).all():
            return math.nan
        return float(np.corrcoef(values.T)[0, 1])

    def open_pairs(self) -> Iterator[tuple[str, Comparison]]:
        """Yield the routers that may be as good as the best, with their comparisons with it."""
        for name in self.best.open:
            yield name, self.pairs[name, self.best.router or ""]

    def unequal(self) -> dict[str, list[str]]:
        """Return the variants that were trained with another k or other FLOPs than the baseline, by `k` and `FLOPs`."""
        found: dict[str, list[str]] = {"k": [], "FLOPs": []}
        for name, baseline in self.results.baselines.items():
            if baseline not in self.results.values:
                continue
            own, other = self.task.budget(name), self.task.budget(baseline)
            if abs(own.k - other.k) > TOLERANCE * other.k:
                found["k"].append(name)
            if abs(own.flops - other.flops) > TOLERANCE * other.flops:
                found["FLOPs"].append(name)
        return {key: names for key, names in found.items() if names}


@dataclass(frozen=True)
class Analysis:
    """What the runs of a sweep show.

    Args:
        tasks: by name.
        ranks: mean rank over tasks by router, of those that all tasks have; empty for a single task.
        improvements: by router, how probable it is that a run is better than one of the baseline, on an average task.
        is_provisional: runs are pending: verdicts are held against a stricter level, since the report is not the last.
        alpha: the level.
    """

    tasks: Mapping[str, TaskAnalysis]
    ranks: Mapping[str, Interval]
    improvements: Mapping[str, Interval]
    is_provisional: bool
    alpha: float


def analyze(sweep: Sweep) -> Analysis:
    """Compare the routers of a sweep."""
    is_provisional = bool(sweep.pending_trials) or any(run.status in ("waiting", "running") for run in sweep.runs)
    alpha = INTERIM_ALPHA if is_provisional else ALPHA
    results = {task.name: results_of(sweep, task) for task in sweep.tasks}
    compared = compare_all(results, alpha)
    tasks = {
        task.name: TaskAnalysis(
            task,
            results[task.name],
            compared[task.name],
            find_best(results[task.name], compared[task.name]),
            alpha,
        )
        for task in sweep.tasks
    }
    main = {task.name: results[task.name] for task in sweep.main_tasks()}
    baselines = {name: baseline for known in main.values() for name, baseline in known.baselines.items()}
    improvements = {name: improvement(main, name, baseline) for name, baseline in baselines.items()}
    ranks = mean_ranks(main) if len(main) > 1 else {}
    return Analysis(tasks, ranks, improvements, is_provisional, alpha)


def results_of(sweep: Sweep, task: Task) -> Results:
    """Return a task's numbers as they are compared."""
    baselines = {name: sweep.baseline for name in task.values if name != sweep.baseline}
    return Results(task.values, task.lower_is_better, metric(task.metric, sweep.margins), baselines, task.paired)
