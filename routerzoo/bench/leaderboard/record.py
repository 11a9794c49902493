"""`Record`: what the repository keeps of a benchmark, small enough to commit and diff.

Three tables, of which the page follows byte for byte: `NAME.csv` has the final rows, without curves and rounded;
`NAME_tuning.csv` a line for each setting that was tuned; `NAME_routers.csv` the families, so that the page does not
depend on which plugins are installed.
"""

from __future__ import annotations

import csv
import functools
import io
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from routerzoo.bench.controls import CONTROLS
from routerzoo.bench.leaderboard.families import family_of
from routerzoo.bench.realistic.scopes import SCOPES
from routerzoo.bench.registry import task_class
from routerzoo.bench.rows import COLUMNS, Row, RowFile, read_rows, row_text
from routerzoo.errors import UserError
from routerzoo.runs.atomic import atomic_write

DIGITS = 6
"""Significant ones that are kept."""


@dataclass(frozen=True)
class Tuned:
    """The tuning runs of a setting.

    Args:
        task: name of the task.
        router: label.
        steps: optimizer steps of each run.
        lr: learning rate.
        aux_scale: factor on the coefficients of auxiliary losses.
        runs: how many, failed ones included.
        failed: how many failed.
        loss: the mean of those that finished; None where none did.
        seconds: CPU time of all.
    """

    task: str
    router: str
    steps: int
    lr: float
    aux_scale: float
    runs: int
    failed: int
    loss: float | None
    seconds: float


@dataclass(frozen=True)
class Record:
    """A benchmark's results.

    Args:
        rows: final ones, and those of routers that are not applicable.
        tuning: by setting.
        families: by router; scopes of balancing have none.
    """

    rows: tuple[Row, ...]
    tuning: tuple[Tuned, ...]
    families: dict[str, str]

    @property
    def seconds(self) -> float:
        """CPU time of all runs."""
        return sum(row.seconds or 0.0 for row in self.rows) + sum(setting.seconds for setting in self.tuning)

    def write(self, path: Path) -> None:
        """Write the three tables; `path` is that of the first."""
        atomic_write(path, _line(COLUMNS) + "".join(map(row_text, self.rows)))
        names = [field.name for field in fields(Tuned)]
        lines = [[_cell(getattr(setting, name)) for name in names] for setting in self.tuning]
        atomic_write(_beside(path, "tuning"), "".join(map(_line, [names, *lines])))
        atomic_write(_beside(path, "routers"), "".join(map(_line, [["router", "family"], *self.families.items()])))


def read_record(paths: Sequence[Path]) -> Record:
    """Read folders of benchmarks, `rows.csv` files, or a record that was written before.

    Raises:
        UserError: one is missing, there are no rows, or two of the same task, router and seed.
    """
    rows: list[Row] = []
    tuning: list[Tuned] = []
    families: dict[str, str] = {}
    for given in paths:
        path = given / RowFile.NAME if given.is_dir() else given
        if not path.is_file():
            raise UserError(f"there are no rows at {path}: give the folder of a benchmark, or its rows")
        rows += read_rows(path)
        if _beside(path, "tuning").is_file():
            tuning += map(_parsed, _read(_beside(path, "tuning")))
        if _beside(path, "routers").is_file():
            families |= {cells["router"]: cells["family"] for cells in _read(_beside(path, "routers"))}
    if not rows:
        raise UserError(f"{' and '.join(map(str, paths))} hold no rows")
    final = sorted((_thinned(row) for row in rows if row.stage == "final"), key=lambda row: row.key)
    for one, other in itertools.pairwise(final):
        if (one.task, one.router, one.seed) == (other.task, other.router, other.seed):
            raise UserError(
                f"there are two runs of seed {one.seed} of {one.router} in {one.task}: give the rows of one protocol"
            )
    labels = sorted({row.router for row in final} - CONTROLS.keys() - {scope.label for scope in SCOPES})
    families = {label: families.get(label) or family_of(label) for label in labels}
    return Record(tuple(final), (*tuning, *_summarized(rows)), families)


@functools.cache
def tier(task: str) -> str:
    """Return the tier of a task; that of somebody's own, which is not at hand, is exact."""
    try:
        return task_class(task).tier
    except UserError:
        return "exact"


def _thinned(row: Row) -> Row:
    """Leave out what no result follows from: curves, and losses by domain where the domains are all alike."""
    numbers = {name: value for name, value in vars(row).items() if isinstance(value, float)}
    rounded: dict[str, Any] = {name: _rounded(value) for name, value in numbers.items()}
    losses = row.loss_by_domain if tier(row.task) == "realistic" else ""
    return replace(row, curve="", loss_by_domain=losses, **rounded)


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _summarized(rows: Iterable[Row]) -> list[Tuned]:
    groups: dict[tuple[str, str, int, float, float], list[Row]] = {}
    for row in rows:
        if row.stage == "tuning":
            groups.setdefault((row.task, row.router, row.steps, row.lr, row.aux_scale), []).append(row)
    found = []
    for key, runs in sorted(groups.items()):
        losses = [row.loss for row in runs if row.loss is not None]
        loss = _rounded(sum(losses) / len(losses)) if losses else None
        seconds = _rounded(sum(row.seconds or 0.0 for row in runs))
        found.append(Tuned(*key, len(runs), len(runs) - len(losses), loss, seconds))
    return found


def _parsed(cells: dict[str, str]) -> Tuned:
    values: dict[str, Any] = dict(cells)
    values |= {name: int(cells[name]) for name in ("steps", "runs", "failed")}
    values |= {name: float(cells[name]) for name in ("lr", "aux_scale", "seconds")}
    return Tuned(**{**values, "loss": float(cells["loss"]) if cells["loss"] else None})


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.stem}_{what}.csv")


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.{DIGITS}g}" if isinstance(value, float) else str(value)


def _line(cells: Iterable[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()
