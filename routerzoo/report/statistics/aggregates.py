"""Summaries over tasks and seeds: those of Agarwal et al. 2021 (arXiv:2108.13264), as their package rliable has them.

All take arrays of losses or regrets, `[..., T, S]`, where smaller is better; rliable's scores are their negatives. A
failed run is inf, or what a benchmark says it is worth. rliable itself is no dependency: it is unmaintained, and needs
arch, absl and seaborn for what are a few lines of NumPy.
"""
# Shape suffixes: T tasks, S seeds, D draws of the bootstrap, X thresholds.

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from routerzoo.report.statistics.intervals import LEVEL, Interval

Array = NDArray[np.float64]
DRAWS = 5000
FEWEST_SEEDS = 5
"""Fewer tell too little of the spread to draw from them."""


def interquartile_mean(losses: Array) -> Array:
    """Return the mean of the middle half of all runs of all tasks."""
    runs = losses.reshape(*losses.shape[:-2], -1)
    return np.asarray(stats.trim_mean(runs, 0.25, axis=-1))


def optimality_gap(losses: Array, target: float = 0.0) -> Array:
    """Return the mean amount by which runs miss a target. What is better than the target makes up for nothing."""
    return np.asarray(np.maximum(losses - target, 0.0).mean((-2, -1)))


def performance_profile(losses: Array, thresholds: ArrayLike) -> Array:
    """Return the share of runs that are at or below each threshold, `[..., X]`; tasks weigh the same."""
    return np.asarray((losses[..., None] <= np.asarray(thresholds)).mean((-3, -2)))


def probability_of_improvement(one: Array, other: Array) -> Array:
    """Return the probability that a run of one router is better than one of the other, on an average task.

    All pairs of runs of a task are compared; equal ones count half (Mann-Whitney).

    Args:
        one: `[..., T, S]`.
        other: `[..., T, S']`.
    """
    x, y = one[..., :, None], other[..., None, :]
    return np.asarray(((x < y) + 0.5 * (x == y)).mean((-3, -2, -1)))


def stratified_bootstrap(
    statistic: Callable[..., Array], *losses: Array, draws: int = DRAWS, seed: int = 0, level: float = LEVEL
) -> Interval:
    """Return a statistic with its interval, from seeds drawn with replacement within each task.

    Seeds of different routers are drawn independently. For bounds that are NaN see `percentiles`.

    Args:
        statistic: of one array a router, each `[..., T, S]`, such as those above.
        losses: one array a router, `[T, S]`.
        draws: of the bootstrap.
        seed: of the bootstrap.
        level: of confidence.
    """
    generator = np.random.default_rng(seed)
    drawn = [resampled(losses_TS, draws, generator) for losses_TS in losses]
    low, high = percentiles(statistic(*drawn), [losses_TS.shape[-1] for losses_TS in losses for _ in losses_TS], level)
    return Interval(float(statistic(*losses)), float(low), float(high))


def percentiles(drawn: Array, seeds: Sequence[int], level: float) -> Array:
    """Return the bounds of a bootstrap interval along the first axis.

    They are NaN where a task has fewer than five seeds, and where all draws agree: there is no spread to judge by.

    Percentiles of few seeds are too narrow: those of mean ranks over five seeds cover the truth 84 % of the time.
    They are expanded as Student's interval of a mean is against the normal one (Hesterberg 2015, arXiv:1411.5279).

    Args:
        drawn: statistics, `[D, ...]`.
        seeds: by task.
        level: of confidence.
    """
    if min(seeds) < FEWEST_SEEDS:
        return np.full((2, *drawn.shape[1:]), np.nan)
    freedom = sum(seeds) - len(seeds)
    tail = special.ndtr(-np.sqrt(sum(seeds) / freedom) * special.stdtrit(freedom, (1 + level) / 2))
    return np.where(np.ptp(drawn, axis=0) > 0, np.quantile(drawn, [tail, 1 - tail], axis=0), np.nan)


def resampled(losses_TS: Array, draws: int, generator: np.random.Generator) -> Array:
    """Draw seeds with replacement, for each task anew; `[D, T, S]`."""
    places_DTS = generator.integers(losses_TS.shape[-1], size=(draws, *losses_TS.shape))
    return np.take_along_axis(losses_TS[None], places_DTS, axis=-1)
