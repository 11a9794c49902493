"""`python -m routerzoo report`: say what came of a sweep."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from routerzoo.errors import UserError
from routerzoo.report.collect import read_sweep
from routerzoo.report.page import comparisons, findings, write_report
from routerzoo.report.statistics import mean_ranks


def main(args: Sequence[str]) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m routerzoo report",
        description="Compare the routers of a sweep: an HTML page that needs nothing else, Markdown and CSV. "
        "It may be run while the sweep is.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, help="the sweep's folder")
    options = parser.parse_args(args)
    console = Console(highlight=False, soft_wrap=True)
    try:
        sweep = read_sweep(options.folder)
        written = write_report(sweep)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    compared = {task.name: comparisons(sweep, task) for task in sweep.tasks}
    lower = {task.name: task.lower_is_better for task in sweep.tasks}
    ranked = mean_ranks({task.name: task.values for task in sweep.tasks}, lower) if len(sweep.tasks) > 1 else {}
    for sentence in findings(sweep, compared, ranked):
        console.print(f"- {sentence}", markup=False)
    for path in written:
        console.print(str(path), markup=False)
