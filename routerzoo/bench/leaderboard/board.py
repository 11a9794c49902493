"""`Board`: what the record says of each router: regret over tasks, and tests that are corrected for all of the page."""
# Shape suffixes: T tasks, S seeds.

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from routerzoo.bench.controls import CONTROLS
from routerzoo.bench.leaderboard.families import OTHER
from routerzoo.bench.leaderboard.record import Record, tier
from routerzoo.bench.realistic.excess import excess_bits
from routerzoo.bench.registry import task_class
from routerzoo.bench.rows import Row
from routerzoo.bench.scores import Summary, summaries
from routerzoo.bench.task import Prediction
from routerzoo.errors import UserError
from routerzoo.report.statistics.aggregates import (
    Array,
    interquartile_mean,
    performance_profile,
    probability_of_improvement,
    stratified_bootstrap,
)
from routerzoo.report.statistics.best import Best, find_best
from routerzoo.report.statistics.comparisons import ALPHA, Comparison, Pairs, Results, compare_all
from routerzoo.report.statistics.holm import holm
from routerzoo.report.statistics.intervals import Interval, interval
from routerzoo.report.statistics.margins import metric

BASELINES = ("LinearRouter", "all processes")
"""The linear gate, as the tiers call it."""
DRAWS = 2000
"""Of the bootstrap, whose intervals are printed to two digits."""
SAME_K = 0.05
"""A router whose mean k differs from the common one by a larger share is not comparable in cost."""
OVERALL = "all tasks"
"""Stands for the mean over the tasks of the exact tier, of routers that were run in all of them."""
BOUNDS = ("oracle", "blind")
"""The controls whose regret is 0 and 1 by definition."""


@dataclass(frozen=True)
class Standing:
    """A router over the tasks of the exact tier.

    Args:
        router: label.
        family: see `family_of`; `control` of the dense network.
        tasks: that it has been run in.
        mean: of regret over tasks, with Student's interval over seeds.
        iqm: interquartile mean of the regret of all runs, with the interval of a stratified bootstrap over seeds.
        improvement: probability that a run is better than one of the baseline in the same task.
        failed: runs that failed.
        runs: of all tasks.
        k: the smallest and the largest mean k of a task, in training or evaluation.
        is_comparable: whether that is the k of all others.
        flops: training FLOPs relative to the baseline, the geometric mean over tasks.
        profile_X: share of runs with a regret of at most each of the thresholds.
    """

    router: str
    family: str
    tasks: tuple[str, ...]
    mean: Interval
    iqm: Interval
    improvement: Interval
    failed: int
    runs: int
    k: tuple[float, float]
    is_comparable: bool
    flops: float
    profile_X: tuple[float, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of a prediction.

    Args:
        task: name of the task.
        prediction: as the task declares it.
        verdict: `held` and `turned` are significant after correction for all predictions; `negligible` is a significant
            difference in the predicted direction that is shown to be within the margin.
        comparison: of the better with the worse; None where one of them was not run.
    """

    task: str
    prediction: Prediction
    verdict: str
    comparison: Comparison | None


class Board:
    """The results of a record.

    Args:
        record: of both tiers, or of one.

    Attributes:
        tasks: of the exact tier, by name.
        realistic: likewise.
        refused: the row that says why, by task and router that are not applicable.
        copies: routers whose runs of the exact tier are those of another, to the digit; by name, with that other. They
            are not compared.
        left_out: tasks without runs of a router, or of the controls that regret is measured between.

    Raises:
        UserError: all are left out.
    """

    thresholds = tuple(round(0.01 * step, 2) for step in range(121))

    def __init__(self, record: Record) -> None:
        self.record = record
        self.refused = {(row.task, row.router): row for row in record.rows if row.status == "not applicable"}
        self.found = {(summary.task, summary.router): summary for summary in summaries(record.rows)}
        self.labels: dict[str, list[str]] = {}
        for task, router in self.found:
            self.labels.setdefault(task, []).append(router)
        self.copies = self._copies()
        self.labels = {
            task: [label for label in labels if label not in self.copies or tier(task) != "exact"]
            for task, labels in self.labels.items()
            if set(labels) - CONTROLS.keys()
        }
        if not self.labels:
            raise UserError(
                "there is no task with runs of a router, and of oracle and blind of its seed: nothing to compare"
            )
        self.tasks = sorted(task for task in self.labels if tier(task) == "exact")
        self.realistic = sorted(self.labels.keys() - set(self.tasks))
        self.left_out = sorted({row.task for row in record.rows} - self.labels.keys())

    def _copies(self) -> dict[str, str]:
        made: dict[str, set[tuple[object, ...]]] = {}
        for (task, router), summary in self.found.items():
            if tier(task) == "exact" and router not in CONTROLS:
                rows = (score.row for score in summary.scores)
                made.setdefault(router, set()).update(
                    (task, row.seed, row.loss, row.nmi, row.train_flops) for row in rows
                )
        finished = [router for router, runs in made.items() if any(loss is not None for _, _, loss, *_ in runs)]
        copies: dict[str, str] = {}
        # The original is the linear gate, a router of the registry rather than a label, or what made more runs.
        labels = {name for name, family in self.record.families.items() if family == OTHER}
        order = sorted(finished, key=lambda name: (name not in BASELINES, name in labels, -len(made[name]), name))
        for place, router in enumerate(order):
            others = (other for other in order[:place] if other not in copies and made[router] <= made[other])
            if other := next(others, None):
                copies[router] = other
        return copies

    def baseline(self, task: str) -> str:
        """Return the label of the linear gate in a task; empty without one."""
        return next((label for label in BASELINES if label in self.labels[task]), "")

    def summary(self, task: str, router: str) -> Summary | None:
        """Return a router in a task; None where it was not run, or is not applicable."""
        return self.found.get((task, router))

    @cached_property
    def results(self) -> dict[str, Results]:
        """What is compared in each task: regret, and excess bits per byte in the realistic tier. Failed runs count.

        With several tasks of the exact tier there is their mean, too, by seed.
        """
        found = {task: self._results(task) for task in [*self.tasks, *self.realistic]}
        return {OVERALL: self._overall(), **found} if len(self.tasks) > 1 else found

    def _overall(self) -> Results:
        complete = set.intersection(*(set(self.labels[task]) for task in self.tasks))
        values = {}
        for router in (label for label in self.labels[self.tasks[0]] if label in complete):
            seeds, regret_TS = _regrets([self.found[task, router] for task in self.tasks])
            values[router] = dict(zip(seeds, regret_TS.mean(0).tolist(), strict=True))
        return self._compared(values, self.baseline(self.tasks[0]), "regret")

    def _results(self, task: str) -> Results:
        of_task = [self.found[task, label] for label in self.labels[task]]
        if task in self.realistic:
            values = {one.router: dict(zip(_seeds(one), excess_bits(one, of_task), strict=True)) for one in of_task}
        else:
            values = {one.router: {score.row.seed: score.regret for score in one.scores} for one in of_task}
        return self._compared(values, self.baseline(task), "bpb" if task in self.realistic else "regret")

    def _compared(self, values: dict[str, dict[int, float]], baseline: str, of: str) -> Results:
        declared = {label: baseline for label in values if label != baseline} if baseline in values else {}
        return Results(values, True, metric(of), declared)

    @cached_property
    def pairs(self) -> dict[str, Pairs]:
        """All comparisons of the page, by task, corrected together."""
        return compare_all(self.results)

    def against_baseline(self, task: str, router: str) -> Comparison | None:
        """Return a router's comparison with the linear gate; None where one of them was not run."""
        return self.pairs[task].get((router, self.baseline(task)))

    def best(self, task: str) -> Best:
        """Return the best of a task, among the routers that are comparable in cost."""
        results = self.results[task]
        known = {label: values for label, values in results.values.items() if self.is_candidate(task, label)}
        return find_best(Results(known, True, results.metric, {}), self.pairs[task])

    def is_candidate(self, task: str, router: str) -> bool:
        """Whether a router may be the best of a task: no control, with the k of all others there."""
        tasks = self.tasks if task == OVERALL else [task]
        return router not in CONTROLS and all(self.has_common_k(each, router) for each in tasks)

    def has_common_k(self, task: str, router: str) -> bool:
        """Whether a router spends, in a task, the k that all routers have that take one."""
        common = self.found[task, "blind"].mean("mean_k")
        return all(abs(k - common) <= SAME_K * common for k in self.k(task, router))

    def k(self, task: str, router: str) -> tuple[float, ...]:
        """Return mean experts per token in training and in evaluation; nothing where no run finished."""
        found = (self.found[task, router].mean(column) for column in ("train_k", "mean_k"))
        return tuple(k for k in found if not math.isnan(k))

    @cached_property
    def standings(self) -> list[Standing]:
        """Return the routers and the dense network, best first; those that were not run in all tasks come last."""
        routers = dict.fromkeys(label for task in self.tasks for label in self.labels[task] if label not in BOUNDS)
        found = [self._standing(router) for router in routers]
        return sorted(found, key=lambda one: (not self.is_complete(one), one.mean.mean, one.router))

    def is_complete(self, standing: Standing) -> bool:
        """Whether a router was run in all tasks."""
        return len(standing.tasks) == len(self.tasks)

    def _standing(self, router: str) -> Standing:
        tasks = tuple(task for task in self.tasks if (task, router) in self.found)
        of_tasks = [self.found[task, router] for task in tasks]
        _, regret_TS = _regrets(of_tasks)
        shared = [task for task in tasks if self.baseline(task)]
        improvement = Interval(math.nan, math.nan, math.nan)
        if shared and router != self.baseline(shared[0]):
            _, theirs_TS = _regrets([self.found[task, self.baseline(task)] for task in shared])
            _, ours_TS = _regrets([self.found[task, router] for task in shared])
            improvement = stratified_bootstrap(probability_of_improvement, ours_TS, theirs_TS, draws=DRAWS // 4)
        ks = [k for task in tasks for k in self.k(task, router)]
        return Standing(
            router,
            "control" if router in CONTROLS else self.record.families[router],
            tasks,
            interval(regret_TS.mean(0).tolist()),
            stratified_bootstrap(interquartile_mean, regret_TS, draws=DRAWS),
            improvement,
            sum(len(one.failures) for one in of_tasks),
            sum(len(one.scores) for one in of_tasks),
            (min(ks), max(ks)) if ks else (math.nan, math.nan),
            all(self.has_common_k(task, router) for task in tasks),
            self.flops(router, shared),
            tuple(performance_profile(regret_TS, self.thresholds).tolist()),
        )

    def flops(self, router: str, tasks: Sequence[str]) -> float:
        """Return a router's training FLOPs over those of the linear gate, the geometric mean over tasks."""
        shares = [
            self.found[task, router].mean("train_flops") / self.found[task, self.baseline(task)].mean("train_flops")
            for task in tasks
        ]
        known = [share for share in shares if math.isfinite(share)]
        return statistics.geometric_mean(known) if known else math.nan

    @cached_property
    def outcomes(self) -> list[Outcome]:
        """What became of the predictions of all tasks, which are corrected among themselves."""
        declared = [(task, told) for task in [*self.tasks, *self.realistic] for told in predictions(task)]
        compared = [self.pairs[task].get((told.better, told.worse)) for task, told in declared]
        corrected = iter(holm([found.p for found in compared if found is not None]))
        return [
            Outcome(task, told, _verdict(found, next(corrected).p) if found else "not run", found)
            for (task, told), found in zip(declared, compared, strict=True)
        ]

    @property
    def failed(self) -> list[Row]:
        """The final runs that failed."""
        return [row for row in self.record.rows if row.status == "failed"]


def _verdict(found: Comparison, p: float) -> str:
    if not p < ALPHA:
        return "inconclusive"
    if found.difference.mean > 0:
        return "turned"
    return "negligible" if found.verdict in ("equivalent", "negligibly better") else "held"


def predictions(task: str) -> tuple[Prediction, ...]:
    """Return what a task declares; nothing of somebody's own task that is not at hand."""
    try:
        return task_class(task).predictions
    except UserError:
        return ()


def title(task: str) -> str:
    """Return what tells the domain in a task; nothing of one that is not at hand."""
    try:
        return task_class(task).title
    except UserError:
        return ""


def _seeds(summary: Summary) -> list[int]:
    return [score.row.seed for score in summary.scores]


def _regrets(of_tasks: Sequence[Summary]) -> tuple[list[int], Array]:
    """Return the seeds that a router has in all of its tasks, and its regrets `[T, S]`."""
    seeds = sorted(set.intersection(*(set(_seeds(summary)) for summary in of_tasks)))
    by_seed = [{score.row.seed: score.regret for score in summary.scores} for summary in of_tasks]
    return seeds, np.array([[regrets[seed] for seed in seeds] for regrets in by_seed])
