"""`AppendingCSVLogger`: a CSV log that a resumed run continues."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any, final

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers.csv_logs import CSVLogger, ExperimentWriter

from routerzoo.runs.atomic import atomic_write


class _AppendingWriter(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        # Lightning's writer deletes an existing file.
        path = Path(self.metrics_file_path)
        if path.is_file():
            self.metrics_keys, _ = read_log(path)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        # Lightning truncates the file first: a run that is killed then loses its log.
        path = Path(self.metrics_file_path)
        _, rows = read_log(path)
        atomic_write(path, _table(fieldnames, rows))


def read_log(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns of a log, and its rows without those that are damaged.

    A crash may cut the last row. Our fields hold no line breaks: whatever is damaged is so in its own line.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    names, rows = _fields(lines[0]) if lines else [], []
    for line in lines[1:]:
        row = dict(zip(names, _fields(line), strict=False))
        if len(row) == len(names) and row.get("step", "").isdecimal():
            rows.append(row)
    return names, rows


def _fields(line: str) -> list[str]:
    try:
        return next(csv.reader([line]), [])
    except csv.Error:  # a field that is too long
        return []


def _table(names: list[str], rows: list[dict[str, Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=names, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@final
class AppendingCSVLogger(CSVLogger):
    """Lightning's CSV logger, except that it appends to an existing file rather than deleting it."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer."""
        if self._experiment is None:
            self._experiment = _AppendingWriter(log_dir=self.log_dir)
        return self._experiment

    @rank_zero_only
    def forget_after(self, step: int) -> None:
        """Drop the rows from this step on: a run that resumes there writes them again."""
        path = Path(self.log_dir) / ExperimentWriter.NAME_METRICS_FILE
        if not path.is_file():
            return
        names, rows = read_log(path)
        atomic_write(path, _table(names, [row for row in rows if int(row["step"]) < step]))
