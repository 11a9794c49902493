"""Tests of two routers over seeds, uncorrected: t-tests, and rank tests where runs failed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special, stats

from routerzoo.report.statistics.intervals import has_spread

Name = Literal["paired t-test", "Welch's t-test", "signed-rank test", "rank-sum test", "none"]


@dataclass(frozen=True)
class PairTest:
    """A test of no difference.

    Args:
        name: of the test.
        seeds: of each router; the fewer, where they differ.
        mean: difference, the first less the second; of finished runs alone.
        p: two-sided; NaN where nothing can be tested.
        direction: sign of the difference: positive where the first is larger, failed runs being largest.
        error: standard error of the difference; NaN of a rank test.
        freedom: degrees of freedom; likewise.
        note: why nothing is tested, or what is done instead.
    """

    name: Name
    seeds: int
    mean: float
    p: float = math.nan
    direction: float = 0.0
    error: float = math.nan
    freedom: float = math.nan
    note: str = ""

    def p_equivalence(self, margin: float) -> float:
        """Return p of a difference as large as the margin: two one-sided tests (Schuirmann 1987)."""
        return float(special.stdtr(self.freedom, (abs(self.mean) - margin) / self.error))


def compare_pair(x: Sequence[float], y: Sequence[float], *, paired: bool) -> PairTest:
    """Test losses of two routers, by seed.

    Args:
        x: inf of a failed run. Where any is, ranks are compared, and failed runs have the last.
        y: likewise.
        paired: the runs at one place have the same seed, with data and initialization in common.
    """
    seeds = min(len(x), len(y))
    if not all(map(math.isfinite, [*x, *y])):
        return _rank_test(x, y, paired)
    if seeds < 2:
        mean = float(np.mean(x) - np.mean(y)) if seeds else math.nan
        return PairTest("none", seeds, mean, note=f"{'one seed' if seeds else 'no seed'} that both have")
    return _t_test(x, y, paired)


def _t_test(x: Sequence[float], y: Sequence[float], paired: bool) -> PairTest:
    one, other = np.array(x), np.array(y)
    seeds, mean = min(one.size, other.size), float(one.mean() - other.mean())
    if paired:
        differences = one - other
        is_spread = has_spread(differences, float(max(np.abs(one).max(), np.abs(other).max())))
        error, freedom = math.sqrt(differences.var(ddof=1) / seeds), seeds - 1.0
    else:
        is_spread = has_spread(one) or has_spread(other)
        parts = [float(values.var(ddof=1)) / values.size for values in (one, other)]
        error = math.sqrt(sum(parts))
        weights = [part**2 / (values.size - 1) for part, values in zip(parts, (one, other), strict=True)]
        freedom = sum(parts) ** 2 / sum(weights) if is_spread else math.nan  # Satterthwaite
    if not is_spread:
        return PairTest("none", seeds, mean, note="the difference does not vary over seeds, so its error is unknown")
    p = 2 * float(special.stdtr(freedom, -abs(mean) / error))
    return PairTest("paired t-test" if paired else "Welch's t-test", seeds, mean, p, mean, error, freedom)


def _rank_test(x: Sequence[float], y: Sequence[float], paired: bool) -> PairTest:
    """Test by all permutations, or 9,999 drawn ones where there are more."""
    one, other = np.array(x), np.array(y)
    note, seeds = "runs failed: ranks are compared, failed runs last", min(len(x), len(y))
    if paired:
        with np.errstate(invalid="ignore"):
            differences = one - other
        finished = differences[np.isfinite(differences)]
        mean = float(finished.mean()) if finished.size else math.nan
        signed = np.nan_to_num(differences, nan=0.0, posinf=math.inf, neginf=-math.inf)  # NaN where both failed
        signed = stats.rankdata(np.abs(signed)) * np.sign(signed)
        p = _permuted((signed,), "samples")
        return PairTest("signed-rank test", seeds, mean, p, float(signed.sum()), note=note)
    known = [values[np.isfinite(values)] for values in (one, other)]
    mean = float(known[0].mean() - known[1].mean()) if all(values.size for values in known) else math.nan
    ranks = stats.rankdata(np.concatenate([one, other]))
    samples = ranks[: len(x)], ranks[len(x) :]
    direction = float(samples[0].mean() - samples[1].mean()) if seeds else math.nan
    return PairTest("rank-sum test", seeds, mean, _permuted(samples, "independent"), direction, note=note)


def _permuted(samples: tuple[np.ndarray, ...], kind: Literal["samples", "independent"]) -> float:
    if min(map(len, samples)) < 2:
        return math.nan

    def mean_difference(*parts: np.ndarray, axis: int) -> np.ndarray:
        means = [part.mean(axis) for part in parts]
        return np.asarray(means[0] - (means[1] if len(means) > 1 else 0.0))

    found = stats.permutation_test(samples, mean_difference, permutation_type=kind, vectorized=True, rng=0)
    return float(found.pvalue)
