"""What a sweep is doing: a live table on a terminal, lines elsewhere."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from routerzoo.sweep import work
from routerzoo.sweep.ledger import Run

REFRESH_SECONDS = 1.0


class Progress:
    """Shows the grid while it is worked on.

    Args:
        root: folder that the runs' folders are relative to.
        slots: runs at a time.
        console: where to show it.
    """

    def __init__(self, root: Path, slots: int, console: Console | None = None) -> None:
        self.root, self.slots = root, slots
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._shown = 0.0
        self._durations: list[float] = []
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        """Show it."""
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=False)
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state."""
        if self._live is not None:
            self._live.__exit__(kind, error, trace)

    def started(self, run: Run, resumes: bool) -> None:
        """A run has been started."""
        if self._live is None:
            self.console.print(f"{'resumed' if resumes else 'started'} {run.label}: {run.folder}")

    def ended(self, run: Run, status: str, reason: str, seconds: float, runs: Sequence[Run]) -> None:
        """A run has ended."""
        if status == "finished":
            self._durations.append(seconds)
        if self._live is None:
            done = sum(other.status in ("finished", "failed") for other in runs)
            what = f"{status} {run.label} in {seconds:.0f} s"
            detail = f": {reason}" if reason else f": {headline(work.results(self.root / run.folder))}"
            self.console.print(f"[{done}/{len(runs)}] {what}{detail}", markup=False)

    def show(self, runs: Sequence[Run]) -> None:
        """Draw the table, not more often than once a second."""
        now = time.monotonic()
        if self._live is None or now - self._shown < REFRESH_SECONDS:
            return
        self._shown = now
        self._live.update(Group(self._table(runs), self._footer(runs)), refresh=True)

    def _table(self, runs: Sequence[Run]) -> Table:
        table = Table(title=str(self.root), title_justify="left")
        table.add_column("task")
        table.add_column("router")
        seeds = sorted({run.seed for run in runs})
        for seed in seeds:
            table.add_column(f"seed {seed}", justify="right", min_width=14)
        rows: dict[tuple[str, str], dict[int, Run]] = {}
        for run in runs:
            rows.setdefault((run.task, run.variant), {})[run.seed] = run
        for (task, variant), by_seed in rows.items():
            table.add_row(task, variant, *(self._cell(by_seed.get(seed)) for seed in seeds))
        return table

    def _cell(self, run: Run | None) -> Text:
        if run is None:
            return Text("")
        if run.status == "finished":
            return Text(f"✓ {headline(run.results)}", style="green")
        if run.status == "failed":
            return Text(f"✗ {run.reason[:24]}", style="red")
        if run.status == "running":
            return Text(f"▶ {progress_of(self.root / run.folder)}", style="yellow")
        return Text("·", style="dim")

    def _footer(self, runs: Sequence[Run]) -> Text:
        counts = {name: sum(run.status == name for run in runs) for name in ("finished", "running", "failed")}
        left = len(runs) - counts["finished"] - counts["failed"]
        text = f"{counts['finished']} of {len(runs)} finished, {counts['running']} running, {counts['failed']} failed"
        if self._durations and left:
            each = sum(self._durations) / len(self._durations)
            text += f"; about {_duration(each * left / self.slots)} left"
        return Text(text)


def headline(results: dict[str, Any]) -> str:
    """Return the headline metric of a run's test."""
    tested = results.get("test") or {}
    name = tested.get("headline_metric", "loss")
    return f"{name} {tested[name]:.4f}" if name in tested else "done"


def progress_of(folder: Path) -> str:
    """Return how far a run is, from the file that it keeps."""
    try:
        told = json.loads((folder / work.PROGRESS).read_text(encoding="utf-8"))
        metric = f" {told['metric']:.3f}" if told.get("metric") is not None else ""
        return f"{told['step']}/{told['total_steps']}{metric}"
    except (OSError, ValueError, KeyError, TypeError):
        return "starting"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes / 60:.1f} h" if minutes > 90 else f"{minutes:.0f} min" if minutes >= 1 else f"{seconds:.0f} s"
