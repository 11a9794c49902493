"""`Row`: what one run of the benchmark leaves, a line of `rows.csv`; `RowFile`: that file, appended to."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args, get_type_hints

from filelock import FileLock, Timeout

from routerzoo.errors import UserError
from routerzoo.runs.atomic import atomic_write

Stage = Literal["tuning", "final"]
Status = Literal["finished", "failed", "not applicable"]


@dataclass(frozen=True)
class Row:
    """One run. Columns without a value are empty: what a router has not, and what a failed run did not reach.

    Args:
        task: name of the task.
        router: label of the router or control (`oracle`, `blind`, `dense`).
        stage: `tuning` rows choose the learning rate and the auxiliary weight, on seeds of their own; results are
            the `final` ones.
        seed: of everything that the run draws.
        steps: optimizer steps.
        lr: the peak learning rate.
        aux_scale: factor on the router's published coefficients of auxiliary losses; 1 where it has none.
        status: `not applicable` where the router cannot do the task; such a router has one row, of seed 0.
        reason: why it failed or is not applicable, in a sentence.
        loss: mean loss on fresh tokens after training; the squared error, or nats per token.
        nmi: mutual information of domain and first choice over the domain's entropy, of the tokens with a domain.
            A token's first choice is the expert with its largest weight.
        dead_experts: experts with less than a tenth of an equal share of the load.
        max_load: largest load of an expert, over an equal share.
        load_entropy: entropy of the load over its largest value: the utilization of the experts, 1 where all are equal.
        nmi_by_layer: `nmi` of each layer, separated by blanks.
        loss_by_domain: mean loss of each domain's tokens, in the order of the domains, separated by blanks.
        k: experts per token as the router declares them; empty where it chooses their number itself.
        mean_k: experts per token in the final evaluation.
        train_k: mean of that over the evaluations along training.
        need_correlation: correlation over tokens of experts chosen and experts needed, where the task tells the need
            and either varies.
        parameters: trainable ones of the model.
        active_parameters: all parameters, less those of the experts that a token does not choose, on average.
        train_flops: three times the forward pass's operations per token, averaged over the evaluations along
            training, times the tokens trained on.
        seconds: CPU time of the run.
        curve: losses along training, as `step:loss` separated by blanks. Those of evaluation tokens drawn for that
            point of training.
        code: version and digest of the sources that made the row.
        settings: digest of the task's sizes and sources and the router's class and arguments.
    """

    task: str
    router: str
    stage: Stage
    seed: int
    steps: int
    lr: float
    aux_scale: float
    status: Status
    reason: str = ""
    loss: float | None = None
    nmi: float | None = None
    dead_experts: float | None = None
    max_load: float | None = None
    load_entropy: float | None = None
    nmi_by_layer: str = ""
    loss_by_domain: str = ""
    k: int | None = None
    mean_k: float | None = None
    train_k: float | None = None
    need_correlation: float | None = None
    parameters: int | None = None
    active_parameters: int | None = None
    train_flops: float | None = None
    seconds: float | None = None
    curve: str = ""
    code: str = ""
    settings: str = ""

    @property
    def key(self) -> tuple[str, str, str, int, int, float, float]:
        """What tells a run from the others of its folder."""
        return self.task, self.router, self.stage, self.seed, self.steps, self.lr, self.aux_scale

    def losses(self) -> list[tuple[int, float]]:
        """Return the curve: steps taken, and the loss there."""
        points = (point.partition(":") for point in self.curve.split())
        return [(int(step), float(loss)) for step, _, loss in points]


COLUMNS = [field.name for field in fields(Row)]
_TYPES: dict[str, type] = {
    name: next((kind for kind in (int, float) if kind in (hint, *get_args(hint))), str)
    for name, hint in get_type_hints(Row).items()
}


def parse_row(cells: dict[str, str]) -> Row:
    """Return the row that a line of the file holds.

    Raises:
        ValueError: a cell that is not of its column's type.
    """
    values: dict[str, Any] = {}
    for name, text in cells.items():
        kind = _TYPES[name]
        values[name] = text if kind is str else None if text == "" else kind(text)
    return Row(**values)


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file, of each run the last one, in the order in which they came first.

    A last line without an end is left out: its writer was killed.

    Raises:
        UserError: a file with other columns, or with a line that is no row.
    """
    content = path.read_bytes()
    try:
        whole = content[: content.rfind(b"\n") + 1].decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text: {error}") from None
    reader = csv.DictReader(io.StringIO(whole, newline=""))
    if whole and reader.fieldnames != COLUMNS:
        raise UserError(f"{path} has other columns than this version of routerzoo writes: choose another --folder")
    rows: dict[tuple[Any, ...], Row] = {}
    for cells in reader:
        try:
            row = parse_row(cells)
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}, line {reader.line_num}, is no row of a benchmark: {error}") from None
        rows[row.key] = row
    return list(rows.values())


def row_text(row: Row) -> str:
    """Return a row as a line of the file."""
    cells = [_cell(getattr(row, name)) for name in COLUMNS]
    return _line(cells)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.10g}"
    return re.sub(r"\s+", " ", str(value))


def _line(cells: Sequence[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(cells)
    return buffer.getvalue()


class RowFile:
    """The rows of a folder, which one process at a time appends to. Each row is on the disk when `append` returns.

    Args:
        folder: of the benchmark; it is created.

    Raises:
        UserError: another process has it open, or what is there is no such file.

    Attributes:
        rows: what the file holds, by key.
    """

    NAME, REPLACED = "rows.csv", "replaced.csv"

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / self.NAME
        self._lock = FileLock(folder / "lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise UserError(f"another process is at {folder}: wait for it, or choose another --folder") from None
        try:
            self.rows = {row.key: row for row in self._read()}
            self._file = self.path.open("a", encoding="utf-8", newline="")
            if self._file.tell() == 0:
                self._write(_line(COLUMNS))
        except BaseException:
            self._lock.release()
            raise

    def _read(self) -> list[Row]:
        if not self.path.exists():
            return []
        rows = read_rows(self.path)
        whole = self.path.read_bytes().rfind(b"\n") + 1
        os.truncate(self.path, whole)  # what is behind it was being written when its writer was killed
        return rows

    def append(self, row: Row) -> Row:
        """Add a row; return it as the file has it, with its numbers rounded."""
        text = row_text(row)
        self._write(text)
        (cells,) = csv.reader([text])
        kept = parse_row(dict(zip(COLUMNS, cells, strict=True)))
        self.rows[kept.key] = kept
        return kept

    def set_aside(self, rows: Iterable[Row]) -> None:
        """Let runs be made again: move their rows to `replaced.csv`."""
        moved = {row.key: row for row in rows}
        if not moved:
            return
        with (self.path.parent / self.REPLACED).open("a", encoding="utf-8", newline="") as file:
            file.write("".join([_line(COLUMNS) if file.tell() == 0 else "", *map(row_text, moved.values())]))
        self.rows = {key: row for key, row in self.rows.items() if key not in moved}
        self._file.close()
        atomic_write(self.path, _line(COLUMNS) + "".join(map(row_text, self.rows.values())))
        self._file = self.path.open("a", encoding="utf-8", newline="")

    def _write(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._lock.release()
