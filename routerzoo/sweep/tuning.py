"""Successive halving (Jamieson and Talwalkar 2016): which trials to make, given those that have ended.

The trials are runs of the sweep's ledger, so that tuning resumes as everything does. Each rung's are runs of their own,
from the first step to the end of their learning-rate schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from routerzoo.sweep.ledger import Run
from routerzoo.sweep.plan import STEPS, Cell, Tune, shown_values


class Tuning:
    """The tuning of a router at its place in the grid.

    Args:
        base: the place, with the configs of the trials.
        tune: how it is tuned.
        steps: of a trial in the last rung.
    """

    def __init__(self, base: Cell, tune: Tune, steps: int) -> None:
        self.base, self.tune, self.steps = base, tune, steps
        self.rung = 0
        self.failed = False
        """Whether no trial of a rung has finished."""
        self.history: list[dict[str, Any]] = []
        """The trials that have ended, in their order: a table."""
        self._alive = tune.points()

    @property
    def is_over(self) -> bool:
        """Whether it is known what is best, or that nothing is."""
        return self.failed or self.rung == self.tune.rungs

    @property
    def best(self) -> dict[str, Any] | None:
        """The config values that were best; None before it is over, or where it has failed."""
        return self._alive[0] if self.is_over and not self.failed else None

    @property
    def _steps(self) -> int:
        share = int(self.tune.factor ** (self.tune.rungs - 1 - self.rung))
        return max(round(self.steps / share), 1)

    def cells(self) -> list[Cell]:
        """Return the trials of the present rung, those of a point side by side."""
        if self.is_over:
            return []
        return [
            self.base.having(
                {STEPS: self._steps, **point, "seed_everything": seed},
                seed=seed,
                stage="trial",
                note=" ".join([*shown_values({**point, STEPS: self._steps}), "trial"]),
            )
            for point in self._alive
            for seed in self.tune.seeds
        ]

    def advance(self, score_of: Callable[[Cell], float | None]) -> bool:
        """Go on to the next rung, if all trials of this one have ended; return whether they have.

        Args:
            score_of: a trial's score, the smaller the better; infinite where it has failed, None before it has ended.
        """
        cells = self.cells()
        scores = [score for cell in cells if (score := score_of(cell)) is not None]
        if self.is_over or len(scores) < len(cells):
            return False
        seeds = len(self.tune.seeds)
        of_points = [failures_and_mean(scores[place : place + seeds]) for place in range(0, len(scores), seeds)]
        order = sorted(range(len(of_points)), key=of_points.__getitem__)  # equal ones in the order of the space
        last = self.rung == self.tune.rungs - 1
        kept = order[: 1 if last else -(-len(order) // self.tune.factor)]
        for place, (cell, score) in enumerate(zip(cells, scores, strict=True)):
            self.history.append(
                {
                    "task": cell.task,
                    "router": " ".join([cell.router, *shown_values(cell.settings)]),
                    "rung": self.rung + 1,
                    "steps": self._steps,
                    **self._alive[place // seeds],
                    "seed": cell.seed,
                    "validation": abs(score),  # of accuracies the score is negative
                    "kept": place // seeds in kept,
                }
            )
        self.failed = of_points[order[0]][0] == seeds
        self._alive = [self._alive[place] for place in kept]
        self.rung += 1
        return True


def failures_and_mean(scores: Sequence[float]) -> tuple[int, float]:
    """Return what settings are ordered by: how many runs failed, which have inf, and the mean of the others."""
    finished = [score for score in scores if math.isfinite(score)]
    return len(scores) - len(finished), fmean(finished) if finished else math.inf


def trial_score(run: Run) -> float | None:
    """Return a trial's best validation metric, the smaller the better; infinite if it failed, None before its end."""
    if run.status == "failed":
        return math.inf
    if run.status != "finished":
        return None
    trained = run.results.get("fit", {})
    value = trained.get(f"best {trained.get('headline_metric')}")
    if value is None or not math.isfinite(value):
        return math.inf
    return -value if trained["higher_is_better"] else float(value)
