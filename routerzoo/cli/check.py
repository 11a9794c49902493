"""`python -m routerzoo check`: the conformance kit from the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from routerzoo.cli.parser_errors import CommandParser
from routerzoo.registry import UnknownRouterError, list_routers, router_class
from routerzoo.testing import CHECKS, QUICK_EXAMPLES, RouterCheckError, run_checks


def main(args: Sequence[str]) -> None:
    """Check routers, show what holds, and exit with 1 where anything does not."""
    parser = CommandParser(
        prog="python -m routerzoo check",
        description="Check that routers keep the contract and have the properties that they declare.",
    )
    parser.add_argument("routers", nargs="*", metavar="ROUTER", help="names of routers; all, where none is given")
    parser.add_argument(
        "--examples",
        type=int,
        default=QUICK_EXAMPLES,
        help=f"random sizes that each check is tried on, beside the usual ones (default: {QUICK_EXAMPLES})",
    )
    parser.add_argument("--device", default="cpu", help="where the routers run (default: cpu)")
    options = parser.parse_args(args)
    names = options.routers or list_routers()
    try:
        for name in names:
            router_class(name)
    except UnknownRouterError as error:
        parser.exit(2, f"error: {error}\n")
    try:
        import hypothesis  # noqa: F401 (what the checks draw sizes with)
    except ImportError:
        parser.exit(2, "error: the checks need hypothesis: pip install 'routerzoo[testing]', or '.[testing]' here\n")
    console = Console(highlight=False, soft_wrap=True)
    broken = [name for name in names if not _check(name, options.examples, options.device, console)]
    if broken:
        sys.exit(1)


def _check(name: str, examples: int, device: str, console: Console) -> bool:
    results = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name, total=len(CHECKS))
        for result in run_checks(name, examples=examples, device=device):
            results.append(result)
            progress.update(task, advance=1, description=f"{name}: {result.check}")
    failures = [result for result in results if result.failure]
    if failures:
        console.print(str(RouterCheckError(name, failures)), style="red", markup=False)
    else:
        console.print(f"{name} passes all {len(CHECKS)} checks: {', '.join(CHECKS)}", markup=False)
    return not failures
