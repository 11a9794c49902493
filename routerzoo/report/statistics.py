"""Comparisons over seeds: intervals, paired tests, equivalence, ranks. Holm's correction is ours: scipy has none."""
# Shape suffixes: R routers, S seeds; further axes are scipy's resamples.

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95
Verdict = Literal["better", "worse", "equivalent", "inconclusive"]


class Interval(NamedTuple):
    """A mean and its confidence interval; the bounds are NaN for a single value."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Return the mean and its Student's t interval, for values that are normal and independent.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values to average")
    mean = float(np.mean(values))
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan)
    # Not `stats.t.interval`, which is NaN where all values are equal.
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values))
    return Interval(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Comparison:
    """A router against the baseline on the same seeds.

    Args:
        difference: of the metric, in its unit; with the interval of the mean over seeds.
        seeds: how many seeds both have.
        p: of no difference (two-sided paired t-test); NaN for a single seed.
        p_adjusted: the same after Holm's correction for the number of routers compared.
        p_equivalence: of a difference as large as the margin (two one-sided tests).
        margin: in the metric's unit.
        verdict: at the 5 % level.
    """

    difference: Interval
    seeds: int
    p: float
    p_adjusted: float
    p_equivalence: float
    margin: float
    verdict: Verdict


def compare(
    values: Mapping[int, float], baseline: Mapping[int, float], margin: float, lower_is_better: bool
) -> Comparison | None:
    """Compare with the baseline, paired by seed; None without a common seed.

    Pairing removes the effect of the seed on both. The verdict is uncorrected: see `adjusted`.

    Args:
        values: metric by seed.
        baseline: likewise.
        margin: relative to the baseline's mean.
        lower_is_better: of the metric.
    """
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        return None
    differences = [values[seed] - baseline[seed] for seed in seeds]
    width = margin * abs(float(np.mean([baseline[seed] for seed in seeds])))
    mean = interval(differences)
    p = p_equivalence = math.nan
    if len(seeds) > 1 and np.ptp(differences) == 0.0:  # where a t-test divides by zero, there is no doubt
        p, p_equivalence = float(mean.mean == 0.0), float(abs(mean.mean) >= width)
    elif len(seeds) > 1:
        p = float(stats.ttest_1samp(differences, 0.0).pvalue)
        above = stats.ttest_1samp(differences, -width, alternative="greater").pvalue
        below = stats.ttest_1samp(differences, width, alternative="less").pvalue
        p_equivalence = float(max(above, below))
    comparison = Comparison(mean, len(seeds), p, p, p_equivalence, width, "inconclusive")
    return replace(comparison, verdict=_verdict(comparison, lower_is_better))


def adjusted(comparisons: Mapping[str, Comparison], lower_is_better: bool) -> dict[str, Comparison]:
    """Correct p for the number of comparisons (Holm 1979), and judge by that."""
    tested = sorted((c.p, name) for name, c in comparisons.items() if not math.isnan(c.p))
    result, largest = dict(comparisons), 0.0
    for place, (p, name) in enumerate(tested):
        largest = max(largest, min(1.0, p * (len(tested) - place)))
        changed = replace(comparisons[name], p_adjusted=largest)
        result[name] = replace(changed, verdict=_verdict(changed, lower_is_better))
    return result


def _verdict(comparison: Comparison, lower_is_better: bool) -> Verdict:
    level = 1 - LEVEL
    if comparison.p_adjusted < level:
        return "better" if (comparison.difference.mean < 0) == lower_is_better else "worse"
    return "equivalent" if comparison.p_equivalence < level else "inconclusive"


def mean_ranks(
    tables: Mapping[str, Mapping[str, Mapping[int, float]]],
    lower_is_better: Mapping[str, bool],
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return the mean rank over tasks of every router that all tasks have, with a bootstrap interval over seeds.

    Args:
        tables: metric by task, router and seed. Within a task, seeds are drawn with replacement, the same for all
            routers; ranks are of the means over the drawn seeds.
        lower_is_better: by task.
        draws: of the bootstrap.
        seed: of the bootstrap.
    """
    names = sorted(set.intersection(*(set(table) for table in tables.values()))) if tables else []
    if not names:
        return {}
    samples = []
    for task, table in tables.items():
        seeds = sorted(set.intersection(*(set(table[name]) for name in names)))
        if not seeds:
            return {}
        sign = 1 if lower_is_better[task] else -1
        samples.append(sign * np.array([[table[name][s] for s in seeds] for name in names]))

    def ranks(*samples_RS: np.ndarray, axis: int) -> Any:
        return np.mean([stats.rankdata(sample_RS.mean(axis), axis=0) for sample_RS in samples_RS], axis=0)

    center_R = ranks(*samples, axis=-1)
    if all(sample_RS.shape[1] > 1 for sample_RS in samples):
        low_R, high_R = stats.bootstrap(
            samples, ranks, n_resamples=draws, axis=-1, confidence_level=LEVEL, method="percentile", rng=seed
        ).confidence_interval
    else:
        low_R = high_R = np.full(len(names), math.nan)
    return {name: Interval(*map(float, bounds)) for name, *bounds in zip(names, center_R, low_R, high_R, strict=True)}
