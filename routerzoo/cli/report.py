"""`python -m routerzoo report`: say what came of a sweep, or of single runs."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from routerzoo.cli.arguments import CommandParser
from routerzoo.errors import UserError
from routerzoo.report.collect import read_sweep
from routerzoo.report.page import Report, write_report
from routerzoo.report.single_runs import read_runs
from routerzoo.report.watch import watch
from routerzoo.runs.atomic import is_writable
from routerzoo.sweep.ledger import FILE


def main(args: Sequence[str]) -> None:
    """Run the command."""
    parser = CommandParser(
        prog="python -m routerzoo report",
        description="Compare the routers of a sweep, or of single runs: an HTML page that needs nothing else, Markdown "
        "and CSV.",
    )
    parser.add_argument("folders", type=Path, nargs="+", help="the sweep's folder, or those of runs of fit")
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=30.0,
        metavar="SECONDS",
        help="while a sweep runs, write the page again so often (30), and let it load itself again",
    )
    parser.add_argument("--out", type=Path, default=Path("reports/runs"), help="where a report of single runs goes")
    parser.add_argument("--baseline", help="of single runs: the label that the others are compared with")
    options = parser.parse_args(args)
    if options.watch is not None and not options.watch > 0:
        parser.error(f"--watch must be a positive number of seconds, got {options.watch:g}")
    console = Console(highlight=False, soft_wrap=True)
    try:
        _report(options, console)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


def _report(options: argparse.Namespace, console: Console) -> None:
    first = options.folders[0]
    sweeps = [folder for folder in options.folders if (folder / FILE).is_file()]
    if len(options.folders) > 1 or (first / "config.yaml").is_file():
        if sweeps:
            raise UserError(f"{sweeps[0]} is a sweep's folder: report one sweep, or several runs")
        if options.watch is not None:
            raise UserError("--watch is for the folder of a sweep")
        _say(write_report(read_runs(options.folders, options.out, options.baseline)), console)
    elif options.watch is None:
        _say(write_report(read_sweep(_writable(first))), console)
    elif not sweeps or not is_writable(first):
        raise UserError(f"{first} is not the folder of a sweep that can be written to, as --watch needs")
    else:
        console.print(f"writing {first / 'report.html'} every {options.watch:g} s until the sweep ends", markup=False)
        reports: list[Report] = []
        left = watch(first, options.watch, reports.append)
        _say(reports[-1], console)
        if left:
            raise UserError(f"nobody works on the sweep, and {left} runs are left; the sweep's command goes on")


def _say(report: Report, console: Console) -> None:
    for decision in report.decisions:
        console.print(f"{decision.title}: {decision.answer}", markup=False)
    for sentence in report.findings:
        console.print(f"- {sentence}", markup=False)
    for path in report.files:
        console.print(str(path), markup=False)


def _writable(folder: Path) -> Path:
    """Return the folder, or else a copy of what a report reads, below the working directory."""
    if not (folder / FILE).is_file() or is_writable(folder):
        return folder
    copy = Path("reports") / folder.resolve().name
    print(f"{folder} cannot be written to: the report goes to {copy}")
    for path in folder.rglob("*"):
        if path.is_file() and not {"checkpoints", "overlays"} & set(path.parts) and not path.name.startswith("events."):
            target = copy / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return copy
