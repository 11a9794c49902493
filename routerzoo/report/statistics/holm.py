"""Holm's correction for many tests (Holm 1979), with weights. SciPy has none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Corrected(NamedTuple):
    """A test after correction.

    Args:
        p: adjusted; the test rejects at `level` exactly where this is below it.
        level: that the uncorrected p is held against, so that intervals can agree with the test.
    """

    p: float
    level: float


def holm(p_values: Sequence[float], weights: Sequence[float] | None = None, level: float = 0.05) -> list[Corrected]:
    """Correct tests so that the probability of any false rejection is at most `level`.

    Args:
        p_values: NaN of a test that could not be done, which counts as one that did not reject.
        weights: of the tests, positive; a larger one takes more of the level. Equal by default.
        level: of all tests together.
    """
    weights = [1.0] * len(p_values) if weights is None else weights
    known = [1.0 if math.isnan(p) else p for p in p_values]
    order = sorted(range(len(known)), key=lambda place: known[place] / weights[place])
    left, largest, stopped = sum(weights), 0.0, math.nan
    result: list[Corrected] = [Corrected(1.0, 0.0)] * len(known)
    for place in order:
        largest = max(largest, min(1.0, known[place] * left / weights[place]))
        if largest >= level and math.isnan(stopped):
            stopped = left  # no later test is held against more
        shares = left if math.isnan(stopped) else stopped
        result[place] = Corrected(largest, level * weights[place] / shares)
        left -= weights[place]
    return result
