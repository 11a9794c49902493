"""What rows say: regret by seed, and means over seeds with intervals."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy import stats

from routerzoo.bench.rows import Row

FAILED_REGRET = 1.0
"""A run that failed is as good as a blind one."""


@dataclass(frozen=True)
class Score:
    """A final run beside the controls of its task and seed.

    Args:
        row: the run.
        regret: (L - L_oracle) / (L_blind - L_oracle); 0 routes as the oracle, 1 is no better than a random id.
        steps_to_half: steps from which on all evaluations along training had at most half of the blind run's final
            regret; inf where the last had more. What is lost again, as where a task turns, does not count.
    """

    row: Row
    regret: float
    steps_to_half: float


@dataclass(frozen=True)
class Summary:
    """A router in a task, over its seeds.

    Args:
        task: name of the task.
        router: label.
        scores: by seed.
    """

    task: str
    router: str
    scores: tuple[Score, ...]

    @property
    def regret(self) -> float:
        """The mean."""
        return statistics.fmean(score.regret for score in self.scores)

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval of the mean regret, by Student's t; NaN for one seed."""
        values = [score.regret for score in self.scores]
        if len(values) < 2:
            return math.nan
        quantile = float(stats.t.ppf(0.975, len(values) - 1))
        return quantile * statistics.stdev(values) / math.sqrt(len(values))

    @property
    def steps_to_half(self) -> float:
        """The median; inf where more than half of the runs never came there."""
        return statistics.median(score.steps_to_half for score in self.scores)

    @property
    def failures(self) -> list[Row]:
        """The runs that failed."""
        return [score.row for score in self.scores if score.row.status == "failed"]

    def mean(self, column: str) -> float:
        """Return the mean of a column over the runs that have a value; NaN where none has."""
        values = [value for score in self.scores if (value := getattr(score.row, column)) is not None]
        return statistics.fmean(values) if values else math.nan


def scales(rows: Iterable[Row]) -> dict[tuple[str, int], tuple[float, float] | str]:
    """Return by task and seed the losses of oracle and blind, or why there is no regret.

    Seeds of which one of the two has not been run yet are left out.
    """
    controls: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        if row.stage == "final" and row.status != "not applicable" and row.router in ("oracle", "blind"):
            controls.setdefault((row.task, row.seed), {})[row.router] = row
    found: dict[tuple[str, int], tuple[float, float] | str] = {}
    for place, pair in controls.items():
        if len(pair) < 2:
            continue
        oracle, blind = pair["oracle"], pair["blind"]
        if oracle.loss is None or blind.loss is None:
            failed = oracle if oracle.loss is None else blind
            found[place] = f"the {failed.router} control failed: {failed.reason}"
        elif not blind.loss > oracle.loss:
            found[place] = "the blind control is no worse than the oracle"
        else:
            found[place] = oracle.loss, blind.loss
    return found


def scores(rows: Iterable[Row]) -> list[Score]:
    """Return the final runs that have a regret, controls included.

    Args:
        rows: of one protocol, so that a task, a router and a seed have one final run.
    """
    final = [row for row in rows if row.stage == "final" and row.status != "not applicable"]
    known = scales(final)
    found = []
    for row in final:
        scale = known.get((row.task, row.seed))
        if not isinstance(scale, tuple):
            continue
        oracle, blind = scale
        regret = FAILED_REGRET if row.loss is None else (row.loss - oracle) / (blind - oracle)
        found.append(Score(row, regret, _steps_to(row, (oracle + blind) / 2)))
    return found


def _steps_to(row: Row, most: float) -> float:
    reached = itertools.takewhile(lambda point: point[1] <= most, reversed(row.losses()))
    return min((step for step, _ in reached), default=math.inf)


def summaries(rows: Iterable[Row]) -> list[Summary]:
    """Return each router in each task, in the order of the rows."""
    groups: dict[tuple[str, str], list[Score]] = {}
    for score in scores(rows):
        groups.setdefault((score.row.task, score.row.router), []).append(score)
    return [Summary(task, router, tuple(of_seeds)) for (task, router), of_seeds in groups.items()]


def regret_difference(one: Summary, other: Summary) -> tuple[float, float]:
    """Return the mean difference of regret, paired by seed, and its standard error; NaN below two common seeds."""
    theirs = {score.row.seed: score.regret for score in other.scores}
    differences = [score.regret - theirs[score.row.seed] for score in one.scores if score.row.seed in theirs]
    return mean_and_error(differences)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error; NaN where there are too few values."""
    if not values:
        return math.nan, math.nan
    mean = statistics.fmean(values)
    return mean, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
