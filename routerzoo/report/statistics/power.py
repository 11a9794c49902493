"""What a number of seeds can show: the power of tests, and the seeds that would settle a pair.

The probabilities are exact: by the noncentral t distribution (Cohen 1988), and of two one-sided tests (Phillips 1990).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

POWER = 0.8
MOST_SEEDS = 1000


def power(difference: float, sd: float, seeds: int, level: float, *, paired: bool = True) -> float:
    """Return the probability that a two-sided t-test rejects.

    Args:
        difference: true one.
        sd: of the differences over seeds where the test is paired, and of each router otherwise.
        seeds: of each router.
        level: of the test.
        paired: or of two independent samples.
    """
    freedom, error = _freedom_and_error(sd, seeds, paired)
    half = special.stdtrit(freedom, 1 - level / 2) * _estimated_errors(freedom)
    shift = abs(difference) / error
    return float(np.mean(special.ndtr(shift - half) + special.ndtr(-shift - half)))


def power_of_equivalence(
    difference: float, sd: float, seeds: int, margin: float, level: float, *, paired: bool = True
) -> float:
    """Return the probability that two one-sided tests show a difference to be within the margin; otherwise as above."""
    freedom, error = _freedom_and_error(sd, seeds, paired)
    half = special.stdtrit(freedom, 1 - level) * _estimated_errors(freedom)
    low, high = (-margin - difference) / error, (margin - difference) / error
    return float(np.mean(np.maximum(special.ndtr(high - half) - special.ndtr(low + half), 0.0)))


def detectable_difference(sd: float, seeds: int, level: float, *, paired: bool = True) -> float:
    """Return the smallest true difference that a t-test finds with 80 % power; inf below two seeds."""
    if seeds < 2:
        return math.inf
    if sd == 0:
        return 0.0
    high = 1.0
    while power(high, 1.0, seeds, level, paired=paired) < POWER:
        high *= 2
    return float(optimize.brentq(lambda size: power(size, 1.0, seeds, level, paired=paired) - POWER, 0.0, high)) * sd


def can_show_equivalence(sd: float, seeds: int, margin: float, level: float, *, paired: bool = True) -> bool:
    """Whether two one-sided tests would succeed with this spread at least where the estimated difference is 0."""
    if seeds < 2 or math.isnan(margin):
        return False
    freedom, error = _freedom_and_error(sd, seeds, paired)
    return bool(special.stdtrit(freedom, 1 - level) * error < margin)


def seeds_for_difference(difference: float, sd: float, level: float, *, paired: bool = True) -> int | None:
    """Return how many seeds a t-test needs to find a true difference with 80 % power; None of more than 1,000."""
    return _fewest(lambda seeds: power(difference, sd, seeds, level, paired=paired))


def seeds_for_equivalence(
    difference: float, sd: float, margin: float, level: float, *, paired: bool = True
) -> int | None:
    """Return how many seeds show a true difference to be within the margin with 80 % power; None of more than 1,000."""
    if not abs(difference) < margin:
        return None
    return _fewest(lambda seeds: power_of_equivalence(difference, sd, seeds, margin, level, paired=paired))


def seeds_to_settle(difference: float, sd: float, margin: float, level: float, *, paired: bool = True) -> int | None:
    """Return how many seeds settle a pair, one way or the other, with 80 % power; None of more than 1,000.

    The true difference is taken to be the one that was estimated. It is uncertain, and the answer with it.
    """
    found = [
        seeds_for_difference(difference, sd, level, paired=paired),
        seeds_for_equivalence(difference, sd, margin, level, paired=paired),
    ]
    return min((seeds for seeds in found if seeds is not None), default=None)


def _freedom_and_error(sd: float, seeds: int, paired: bool) -> tuple[float, float]:
    return (seeds - 1.0, sd / math.sqrt(seeds)) if paired else (2 * seeds - 2.0, sd * math.sqrt(2 / seeds))


@functools.cache  # a report asks 10,000 times for a few of them
def _estimated_errors(freedom: float) -> NDArray[np.float64]:
    """Return 2,000 quantiles of the estimated standard error, by the true one: given it, the estimate is normal.

    SciPy's noncentral t distribution is NaN far from 0.
    """
    shares = (np.arange(2000) + 0.5) / 2000
    return np.asarray(np.sqrt(special.chdtri(freedom, 1 - shares) / freedom))


def _fewest(reached: Callable[[int], float]) -> int | None:
    low, high = 1, MOST_SEEDS
    if not reached(high) >= POWER:
        return None
    while high - low > 1:  # power grows with seeds
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) >= POWER else (middle, high)
    return high
