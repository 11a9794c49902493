"""`python -m routerzoo report`: say what came of a sweep."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from routerzoo.cli.parser_errors import CommandParser
from routerzoo.errors import UserError
from routerzoo.report.collect import read_sweep
from routerzoo.report.page import write_report
from routerzoo.runs.atomic import is_writable
from routerzoo.sweep.ledger import FILE


def main(args: Sequence[str]) -> None:
    """Run the command."""
    parser = CommandParser(
        prog="python -m routerzoo report",
        description="Compare the routers of a sweep: an HTML page that needs nothing else, Markdown and CSV. "
        "It may be run while the sweep is.",
    )
    parser.add_argument("folder", type=Path, help="the sweep's folder")
    options = parser.parse_args(args)
    console = Console(highlight=False, soft_wrap=True)
    try:
        report = write_report(read_sweep(_writable(options.folder)))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
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
