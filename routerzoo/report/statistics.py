"""Comparisons over seeds: intervals, paired tests, equivalence, ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95
Verdict = Literal["baseline", "better", "worse", "equivalent", "cannot tell"]


class Interval(NamedTuple):
    """A mean and its confidence interval; the bounds are NaN for a single value."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Return the mean and its interval by Student's t, for values that are normal and independent.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values to average")
    mean = float(np.mean(values))
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan)
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Comparison:
    """A router against the baseline on the same seeds.

    Args:
        difference: of the metric, in its unit; with the interval of the mean over seeds.
        seeds: how many seeds both have.
        p: that there is no difference (two-sided paired t-test); NaN where one seed cannot say.
        p_adjusted: the same after Holm's correction for the number of routers compared.
        p_equivalence: that the difference is as large as the margin (two one-sided tests).
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

    Pairing takes out what the seed does to both. The verdict is without correction: see `adjusted`.

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
    if len(seeds) > 1:
        error = float(np.std(differences, ddof=1)) / math.sqrt(len(seeds))
        if error == 0.0:  # the same on every seed: there is nothing left to doubt
            p, p_equivalence = float(mean.mean == 0.0), float(abs(mean.mean) >= width)
        else:
            freedom = len(seeds) - 1
            p = float(2 * stats.t.sf(abs(mean.mean) / error, freedom))
            p_equivalence = float(stats.t.sf((width - abs(mean.mean)) / error, freedom))
    comparison = Comparison(mean, len(seeds), p, p, p_equivalence, width, "cannot tell")
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
    return "equivalent" if comparison.p_equivalence < level else "cannot tell"


def ranks(values: Mapping[str, float], lower_is_better: bool) -> dict[str, float]:
    """Return ranks from 1, the best; equal values share the mean of theirs."""
    signed = [value if lower_is_better else -value for value in values.values()]
    return dict(zip(values, map(float, stats.rankdata(signed)), strict=True))


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
    common = {}
    for task, table in tables.items():
        seeds = sorted(set.intersection(*(set(table[name]) for name in names)))
        if not seeds:
            return {}
        common[task] = np.array([[table[name][s] for s in seeds] for name in names])
    generator = np.random.default_rng(seed)

    def once(resample: bool) -> np.ndarray:
        rows = []
        for task, values in common.items():
            places = generator.integers(values.shape[1], size=values.shape[1]) if resample else slice(None)
            means = values[:, places].mean(1)
            rows.append(stats.rankdata(means if lower_is_better[task] else -means))
        return np.asarray(np.mean(rows, axis=0))

    centre = once(False)
    if any(values.shape[1] < 2 for values in common.values()):
        return {name: Interval(float(centre[i]), math.nan, math.nan) for i, name in enumerate(names)}
    drawn = np.stack([once(True) for _ in range(draws)])
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return {name: Interval(float(centre[i]), float(low[i]), float(high[i])) for i, name in enumerate(names)}
