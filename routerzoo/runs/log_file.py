"""Reading the CSV log of a run."""

from __future__ import annotations

import csv
from pathlib import Path


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
