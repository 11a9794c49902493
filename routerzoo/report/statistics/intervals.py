"""Confidence intervals of a mean over seeds, by Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean and its confidence interval; the bounds are NaN where the values do not give any."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float], level: float = LEVEL, *, is_share: bool = False) -> Interval:
    """Return the mean and its interval, for independent values, of finished runs.

    One value has no bounds, nor have values that are all equal: they show no spread to judge by.

    Args:
        values: normally distributed.
        level: of confidence.
        is_share: the values are in [0, 1]. The bounds, then, are Student's on the scale of log-odds (the standard error
            by the delta method), so that they stay inside.

    Raises:
        ValueError: no values, or NaN or inf among them.
    """
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"an interval needs finite values, got {list(values)}")
    mean = float(np.mean(values))
    if len(values) == 1 or not has_spread(values):
        return Interval(mean, math.nan, math.nan)
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return around(mean, error, len(values) - 1, level, is_share=is_share)


def around(mean: float, error: float, freedom: float, level: float, *, is_share: bool = False) -> Interval:
    """Return Student's interval around a mean.

    Args:
        mean: in (0, 1) if it is a share.
        error: its standard error.
        freedom: degrees of freedom.
        level: of confidence.
        is_share: as in `interval`.
    """
    quantile = float(special.stdtrit(freedom, (1 + level) / 2))
    if not is_share:
        return Interval(mean, mean - quantile * error, mean + quantile * error)
    center, half = special.logit(mean), quantile * error / (mean * (1 - mean))
    return Interval(mean, float(special.expit(center - half)), float(special.expit(center + half)))


def has_spread(values: ArrayLike, scale: float | None = None) -> bool:
    """Whether values differ by more than float32 rounds.

    Args:
        values: finite.
        scale: of the numbers that they were computed from; by default the largest of them.
    """
    known = np.asarray(values)
    return bool(np.ptp(known) > 1e-6 * (np.abs(known).max() if scale is None else scale))
