"""Rewrite the report of a sweep while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from routerzoo.report.collect import read_sweep
from routerzoo.report.page import Report, write_report
from routerzoo.sweep.ledger import Ledger

PATIENCE = 10
"""A sweep that nobody works on may be about to start: it is looked at so often, if it is not complete."""
IDLE_SECONDS = 3.0


def watch(folder: Path, seconds: float, told: Callable[[Report], None]) -> int:
    """Write the report again and again, until nobody works on the sweep any more.

    Args:
        folder: of the sweep.
        seconds: between two reports; a browser loads the page again as often.
        told: called with every report.

    Returns:
        How many runs the sweep has left undone.
    """
    idle = 0
    while True:
        is_worked_on = Ledger(folder).is_worked_on()
        sweep = read_sweep(folder, may_be_empty=True)
        pending = sum(run.status in ("waiting", "running") for run in sweep.runs) + sweep.pending_trials
        idle = 0 if is_worked_on else idle + 1
        has_ended = idle >= (PATIENCE if pending or not sweep.runs else 2)  # between two rungs nothing is pending
        told(write_report(sweep, refresh=None if has_ended else seconds))
        if has_ended:
            return pending
        time.sleep(IDLE_SECONDS if idle else seconds)
