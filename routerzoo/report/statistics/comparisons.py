"""Comparisons between routers over seeds, corrected for their number over all tasks of a report.

All pairs of a task are compared, since the best is not known before. The probability of any false difference in a
report is at most 5 %, and so is that of any false equivalence. Half of each is for the declared comparisons, those with
a baseline; half for all other pairs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from routerzoo.report.statistics.holm import holm
from routerzoo.report.statistics.intervals import LEVEL, Interval, around
from routerzoo.report.statistics.margins import Metric
from routerzoo.report.statistics.pair import Name, PairTest, compare_pair

ALPHA = 0.05
INTERIM_ALPHA = 0.001
"""Level of verdicts while runs are pending (Haybittle 1971, Peto 1976): small enough to look after every seed."""
Verdict = Literal[
    "better",
    "negligibly better",
    "equivalent",
    "inconclusive",
    "negligibly worse",
    "worse",
    "failed",
    "untestable",
]


@dataclass(frozen=True)
class Results:
    """The results of a task.

    Args:
        values: the metric by router and seed; NaN of a failed run.
        lower_is_better: of the metric.
        metric: how its values are compared.
        baselines: by router, the one that it is compared with by declaration.
        paired: whether runs of one seed have data and initialization in common.
    """

    values: Mapping[str, Mapping[int, float]]
    lower_is_better: bool
    metric: Metric
    baselines: Mapping[str, str] = field(default_factory=dict)
    paired: bool = True

    def losses(self, router: str) -> dict[int, float]:
        """Return values by seed on the scale of comparison, so that smaller is better: inf of a failed run."""
        sign = 1 if self.lower_is_better else -1
        known = {seed: self.metric.compared(value) for seed, value in self.values[router].items()}
        return {seed: sign * value if math.isfinite(value) else math.inf for seed, value in known.items()}

    def has_failed(self, router: str) -> bool:
        """Whether no run of a router has finished."""
        return not any(map(math.isfinite, self.values[router].values()))


@dataclass(frozen=True)
class Comparison:
    """A router against another.

    Differences are the first's metric less the second's, on the metric's scale of comparison: bits, of perplexities.

    Args:
        difference: mean and 95 % interval, uncorrected; of finished runs alone and without bounds where runs failed.
        seeds: of each router, the failed ones included; the fewer, where they differ.
        test: that p is of.
        p: of no difference, two-sided.
        p_adjusted: corrected for all comparisons of the report.
        p_equivalence: of a difference as large as the margin.
        p_equivalence_adjusted: likewise corrected.
        margin: in the unit of the difference.
        bounds: the interval that equivalence is judged by: it is within the margin where equivalence is shown.
        bounds_level: its level of confidence: 90 % for a single comparison, more for several.
        level: that p is held against.
        error: standard error of the difference; NaN where no t-test was done.
        freedom: degrees of freedom; likewise.
        verdict: on the first router.
        note: why nothing was tested, or what was done instead.
    """

    difference: Interval
    seeds: int
    test: Name
    p: float
    p_adjusted: float
    p_equivalence: float
    p_equivalence_adjusted: float
    margin: float
    bounds: Interval
    bounds_level: float
    level: float
    error: float
    freedom: float
    verdict: Verdict
    note: str

    @property
    def is_significant(self) -> bool:
        """Whether there is a difference, after correction."""
        return self.verdict in ("better", "worse", "negligibly better", "negligibly worse")


Pairs = dict[tuple[str, str], Comparison]


def compare_all(tasks: Mapping[str, Results], alpha: float = ALPHA) -> dict[str, Pairs]:
    """Compare all pairs of every task.

    Returns:
        By task and pair, the comparison of the first with the second; a pair is there in both orders.
    """
    pairs = [(task, a, b) for task, results in tasks.items() for a, b in itertools.combinations(results.values, 2)]
    is_declared = [tasks[task].baselines.get(a) == b or tasks[task].baselines.get(b) == a for task, a, b in pairs]
    weights = [1 / is_declared.count(declared) for declared in is_declared]
    losses = {task: {name: results.losses(name) for name in results.values} for task, results in tasks.items()}
    found = [_tested(losses[task][a], losses[task][b], tasks[task].paired) for task, a, b in pairs]
    margins = [_margin(tasks[task], a, b) for task, a, b in pairs]
    of_equivalence = [test.p_equivalence(margin) for test, margin in zip(found, margins, strict=True)]
    differences, equivalences = holm([test.p for test in found], weights, alpha), holm(of_equivalence, weights, alpha)
    result: dict[str, Pairs] = {task: {} for task in tasks}
    for place, (task, a, b) in enumerate(pairs):
        test, difference, equivalence = found[place], differences[place], equivalences[place]
        level = 1 - 2 * equivalence.level
        sign = 1 if tasks[task].lower_is_better else -1
        for one, other, side in ((a, b, 1), (b, a, -1)):
            comparison = Comparison(
                around(sign * side * test.mean, test.error, test.freedom, LEVEL),
                test.seeds,
                test.name,
                test.p,
                math.nan if math.isnan(test.p) else difference.p,
                of_equivalence[place],
                math.nan if math.isnan(of_equivalence[place]) else equivalence.p,
                margins[place],
                around(sign * side * test.mean, test.error, test.freedom, level),
                level,
                difference.level,
                test.error,
                test.freedom,
                "untestable",
                test.note,
            )
            is_worse = side * test.direction > 0
            verdict = "failed" if tasks[task].has_failed(one) else _verdict(comparison, is_worse, alpha)
            result[task][one, other] = replace(comparison, verdict=verdict)
    return result


def _tested(one: Mapping[int, float], other: Mapping[int, float], paired: bool) -> PairTest:
    if not paired:
        return compare_pair(list(one.values()), list(other.values()), paired=False)
    common = sorted(one.keys() & other.keys())
    return compare_pair([one[seed] for seed in common], [other[seed] for seed in common], paired=True)


def _margin(results: Results, a: str, b: str) -> float:
    finished = [value for name in (a, b) for value in results.values[name].values() if math.isfinite(value)]
    return results.metric.width(sum(finished) / len(finished)) if finished else math.nan


def _verdict(comparison: Comparison, is_worse: bool, alpha: float) -> Verdict:
    if math.isnan(comparison.p):
        return "untestable"
    is_equivalent = comparison.p_equivalence_adjusted < alpha
    if comparison.p_adjusted < alpha:
        if is_worse:
            return "negligibly worse" if is_equivalent else "worse"
        return "negligibly better" if is_equivalent else "better"
    return "equivalent" if is_equivalent else "inconclusive"
