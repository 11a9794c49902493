"""Scaling laws over training compute, L = a C^-b + c: a router's own a; exponent b and floor c shared by all.

The shape is that of Hoffmann et al. 2022 (arXiv:2203.15556) in compute alone. c is the entropy of the data, which no
router changes; with b shared, too, a router's gain is the same at every budget: the multiplier (a_0 / a)^(1/b). Whether
it is, that of each budget's means alone shows: routers that overtake each other have no single multiplier.
"""
# Shape suffixes: R routers, B budgets, S seeds, D draws of the bootstrap, N points.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from routerzoo.report.statistics.intervals import LEVEL, Interval

Array = NDArray[np.float64]
DRAWS = 1000
LAWLESS = 0.05
"""Above this share of draws without a law there are no intervals."""
SMALLEST = 1e-9
"""Coefficient of a loss at the floor or below."""
SAME_BUDGET = 1.5
"""Means whose FLOPs differ by a larger factor are of different budgets."""
FEWEST_BUDGETS = 3
"""As many as a router's curve has parameters."""
_EXPONENTS = np.geomspace(0.01, 3.0, 400)


@dataclass(frozen=True)
class ScalingFit:
    """A fit, and those of the bootstrap.

    Args:
        routers: in the order of `a_DR`.
        b: exponent, by draw; the first is that of the means, in all three.
        c: floor.
        a_DR: coefficients at a compute of `unit`.
        unit: FLOPs.
        worst: largest distance of a mean loss from its curve.
        points: router and training FLOPs of each mean.
        local_DN: the coefficient that each mean has by itself, at `b` and `c`.
    """

    routers: Sequence[str]
    b: Array
    c: Array
    a_DR: Array
    unit: float
    worst: float
    points: Sequence[tuple[str, float]]
    local_DN: Array

    @property
    def exponent(self) -> Interval:
        """The shared exponent."""
        return _interval(self.b)

    def curve(self, router: str, compute: ArrayLike) -> tuple[Array, Array, Array]:
        """Return the loss at each compute, and the bounds of its 95 % interval."""
        share = np.asarray(compute, dtype=float) / self.unit
        a = self.a_DR[:, self.routers.index(router), None]
        loss = a * share ** -self.b[:, None] + self.c[:, None]
        low, high = _bounds(loss)
        return loss[0], low, high

    def multiplier(self, router: str, baseline: str) -> Interval:
        """Return by how much more compute the baseline needs for the same loss; below 1 it needs less."""
        own, other = (self.a_DR[:, self.routers.index(name)] for name in (router, baseline))
        return _interval((other / own) ** (1 / self.b))

    def multipliers(self, router: str, baseline: str) -> dict[float, Interval]:
        """Return the multiplier of each budget alone, by the baseline's training FLOPs; NaN where a router has none."""
        own, other = (
            {compute: self.local_DN[:, place] for place, (who, compute) in enumerate(self.points) if who == name}
            for name in (router, baseline)
        )
        found = {}
        for compute in sorted(other):
            near = min(own, key=lambda flops: abs(np.log(flops / compute)))
            is_same = max(near / compute, compute / near) <= SAME_BUDGET
            ratio = other[compute] / own[near] if is_same else np.full(1, np.nan)
            found[compute] = _interval(ratio ** (1 / self.b[: len(ratio)]))
        return found

    def turns(self, router: str, baseline: str) -> bool:
        """Whether a router is ahead of the baseline at one budget and behind at another, each beyond its interval."""
        found = self.multipliers(router, baseline).values()
        return any(one.low > 1 for one in found) and any(one.high < 1 for one in found)


def fit_scaling(
    losses: Mapping[str, Mapping[float, Mapping[int, float]]], draws: int = DRAWS, seed: int = 0
) -> ScalingFit | None:
    """Fit least squares to mean losses, with intervals by a multiplier bootstrap.

    A draw adds, to each mean, the deviations of its seeds times normal numbers, which all routers share at a budget: a
    seed is the same in all of them. The numbers of a budget are divided as in Student's t, so that few seeds have
    wide intervals. With a single seed at some budget, or where a draw in twenty has no law, bounds are NaN.

    Args:
        losses: by router, training FLOPs and seed; smaller is better.
        draws: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        None where routers with three budgets are missing, or loss does not fall with compute.
    """
    routers = [name for name, found in losses.items() if len(found) >= FEWEST_BUDGETS]
    points = [(place, compute, losses[name][compute]) for place, name in enumerate(routers) for compute in losses[name]]
    if not points:
        return None
    who_N, compute_N = (np.array(values) for values in zip(*(point[:2] for point in points), strict=True))
    mean_N = np.array([np.mean(list(by_seed.values())) for *_, by_seed in points])
    drawn = mean_N[None]
    if all(len(by_seed) > 1 for *_, by_seed in points):
        drawn = np.concatenate([drawn, _drawn(points, mean_N, draws, np.random.default_rng(seed))])
    unit = float(np.exp(np.log(compute_N).mean()))
    b, coefficients = _least_squares(np.eye(len(routers))[who_N], compute_N / unit, drawn)
    a_DR, c = coefficients[:, :-1], coefficients[:, -1]
    usable = (a_DR > 0).all(1) & (b < _EXPONENTS[-1]) & (b > _EXPONENTS[0])
    if not usable[0]:
        return None
    if usable.mean() < 1 - LAWLESS:
        usable[1:] = False
    fitted_N = a_DR[0, who_N] * (compute_N / unit) ** -b[0] + c[0]
    local_DN = (drawn - c[:, None]) * (compute_N / unit) ** b[:, None]
    return ScalingFit(
        routers,
        b[usable],
        c[usable],
        a_DR[usable],
        unit,
        float(np.abs(fitted_N - mean_N).max()),
        [(routers[who], compute) for who, compute, _ in points],
        np.maximum(local_DN, SMALLEST)[usable],  # a draw of few seeds may be below the floor
    )


def _drawn(
    points: Sequence[tuple[int, float, Mapping[int, float]]], mean_N: Array, draws: int, generator: np.random.Generator
) -> Array:
    multipliers: dict[tuple[int, ...], Array] = {}
    drawn_DN = np.empty((draws, len(points)))
    for point, (*_, by_seed) in enumerate(points):
        seeds = tuple(sorted(by_seed))
        key = (_budget(points, point), *seeds)
        if key not in multipliers:
            chi_D1 = generator.chisquare(len(seeds) - 1, size=(draws, 1))
            multipliers[key] = generator.normal(size=(draws, len(seeds))) / np.sqrt(len(seeds) * chi_D1)
        deviation_S = np.array([by_seed[seed] for seed in seeds]) - mean_N[point]
        drawn_DN[:, point] = mean_N[point] + multipliers[key] @ deviation_S
    return drawn_DN


def _budget(points: Sequence[tuple[int, float, Mapping[int, float]]], place: int) -> int:
    """Return which of its router's budgets a point is: budgets of routers may differ a little."""
    router, compute, _ = points[place]
    return sorted(other for who, other, _ in points if who == router).index(compute)


def _least_squares(own_NR: Array, compute_N: Array, loss_DN: Array) -> tuple[Array, Array]:
    """Return exponents and, for these, coefficients and floor, 0 at least: given b the problem is linear."""
    best_D = np.full(len(loss_DN), np.inf)
    b_D, found = np.ones(len(loss_DN)), np.zeros((len(loss_DN), own_NR.shape[1] + 1))
    for b in _EXPONENTS:
        falling_NR = own_NR * compute_N[:, None] ** -b
        with_floor = np.column_stack([falling_NR, np.ones(len(compute_N))])
        solution = np.linalg.lstsq(with_floor, loss_DN.T, rcond=None)[0].T
        without = np.linalg.lstsq(falling_NR, loss_DN.T, rcond=None)[0].T
        without = np.column_stack([without, np.zeros(len(without))])
        solution = np.where(solution[:, -1:] < 0, without, solution)
        error_D = ((solution @ with_floor.T - loss_DN) ** 2).sum(1)
        better = error_D < best_D
        best_D, b_D = np.where(better, error_D, best_D), np.where(better, b, b_D)
        found = np.where(better[:, None], solution, found)
    return b_D, found


def _bounds(drawn: Array) -> tuple[Array, Array]:
    if len(drawn) == 1:
        return np.full(drawn.shape[1:], np.nan), np.full(drawn.shape[1:], np.nan)
    low, high = np.quantile(drawn[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high


def _interval(drawn: Array) -> Interval:
    low, high = _bounds(drawn)
    return Interval(float(drawn[0]), float(low), float(high))
