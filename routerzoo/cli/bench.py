"""`python -m routerzoo bench`: compare routers in tasks whose ideal routing is known."""

from __future__ import annotations

import argparse
import inspect
import math
import os
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import get_args

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from scipy import stats

from routerzoo.bench.choices import RouterChoice, read_choices
from routerzoo.bench.controls import CONTROLS
from routerzoo.bench.engine import Engine, LocalEngine, RayEngine, survives
from routerzoo.bench.loop import work_through
from routerzoo.bench.protocol import TUNING_SEED, Budget, Cell, Protocol, make_cell, source_digest
from routerzoo.bench.realistic.byte_model import ByteLanguageModel
from routerzoo.bench.realistic.excess import domain_table, excess_table
from routerzoo.bench.realistic.scopes import SCOPES
from routerzoo.bench.registry import list_tasks, task_class
from routerzoo.bench.rows import Row, RowFile
from routerzoo.bench.run import check_passes
from routerzoo.bench.scores import Summary, regret_difference, scales, summaries
from routerzoo.bench.task import check_task
from routerzoo.cli.arguments import CommandParser
from routerzoo.errors import UserError
from routerzoo.runs.atomic import atomic_write
from routerzoo.sweep.code import code_version
from routerzoo.sweep.plan import TOLERANCE

CORE = ["LinearRouter", "HyperRouter", "StableMoERouter", "XMoERouter", "HashRouter", "RandomFrozenRouter"]
QUICK_TASKS = ["clusters", "skew", "ids", "xor"]
QUICK = Protocol(seeds=5, tuning_seeds=0)
REALISTIC = Protocol(seeds=10, tuning_seeds=3, lrs=(0.004, 0.002, 0.008))
PRESETS = {
    ("exact", False): ("exact", Protocol()),
    ("exact", True): ("quick", QUICK),
    ("realistic", False): ("realistic", REALISTIC),
    ("realistic", True): ("realistic-quick", replace(REALISTIC, seeds=2, tuning_seeds=0, steps=100)),
}
"""Folder and protocol by tier, and whether it is to be quick."""
REALISTIC_ROUTERS = ["scopes", *(name for name in CORE if name != "LinearRouter")]
"""The linear gate is there as its scopes: with the one of all processes it has the losses of its sources."""
PROTOCOL = "protocol.json"
NARROW = 100
"""In a terminal of fewer columns tables leave some out."""
LEVEL = 0.95
"""A prediction holds, or turns, where the interval of the difference by Student's t has one sign; not corrected."""

EPILOG = """\
Each task has a latent domain that decides which experts a token needs. Regret is 0 where a router does as well as one
that receives the domain label (oracle), and 1 where it does no better than a random expert for each token (blind). The
third control is a dense network of the active size. All else is equal bit for bit between the routers of a seed.

examples:
  python -m routerzoo bench --quick                         six routers, four tasks: three minutes on two cores
  python -m routerzoo bench --routers XMoERouter            one router in all tasks, tuned, 20 seeds: four CPU-minutes
  python -m routerzoo bench --routers my_package.MyRouter --tasks clusters my_task.py
  python -m routerzoo bench --routers LinearRouter '{class_path: LinearRouter, init_args: {noisy: true}, label: noisy}'
  python -m routerzoo bench --routers all                   the whole registry: an hour and a half on two cores
  python -m routerzoo bench --tier realistic                a byte-level language model, six scopes of balancing, five
                                                            routers: an hour on two cores
  python -m routerzoo bench --tier realistic --domains play python mine=notes/ --routers scopes
  python -m routerzoo bench --board bench/exact bench/realistic --out board.md     the leaderboard of what was run
The same command resumes where it was stopped. docs/bench.md explains tasks, protocol and rows.
"""


def main(args: Sequence[str]) -> None:
    """Run the command."""
    parser = CommandParser(
        prog="python -m routerzoo bench",
        description="Compare routers in small tasks whose ideal routing is known; a run takes 0.7 s on average.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--routers",
        nargs="+",
        metavar="ROUTER",
        help="names, class paths, {class_path: ..., init_args: ..., label: ..., loss_weights: ...}, all, or scopes (a "
        "linear gate balanced over each scope); by default the built-in ones",
    )
    parser.add_argument("--tier", choices=["exact", "realistic"], help="whose tasks; by default that of --tasks, exact")
    parser.add_argument(
        "--domains",
        nargs="+",
        metavar="DOMAIN",
        help="of the realistic tier: names of its own, or NAME=PATH of a text file or a folder",
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="names, or paths of task files; by default all")
    parser.add_argument("--quick", action="store_true", help="by default four tasks, 5 seeds and no tuning")
    parser.add_argument("--seeds", type=int, help="final runs of each router in each task (default: 20)")
    parser.add_argument("--tuning-seeds", type=int, help="runs of each setting that is tuned; 0 for none (default: 2)")
    parser.add_argument("--steps", type=int, help="optimizer steps of a run; by default the task's, mostly 200")
    parser.add_argument(
        "--budget",
        choices=get_args(Budget),
        default="steps",
        help="equal steps for all, or as many as take the training FLOPs of the linear gate (default: steps)",
    )
    parser.add_argument("--folder", type=Path, help="where rows go (default: bench/exact, or bench/quick)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--slots", type=int, default=cores, help="runs at a time; by default as many as cores")
    parser.add_argument("--engine", choices=["local", "ray"], default="local", help="processes here, or a Ray cluster")
    parser.add_argument("--retry-failed", action="store_true", help="make failed runs again")
    parser.add_argument("--redo-old", action="store_true", help="make runs again that other code has made")
    parser.add_argument("--list", action="store_true", help="list the tasks with what is predicted, and stop")
    parser.add_argument(
        "--board",
        nargs="+",
        type=Path,
        metavar="ROWS",
        help="make no runs: write the leaderboard of these folders or rows, with its record and pictures beside it",
    )
    parser.add_argument("--out", type=Path, default=Path("router_bench.md"), help="where --board writes the page")
    options = parser.parse_args(args)
    for name, least in (("seeds", 1), ("tuning_seeds", 0), ("steps", 2), ("slots", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.exit(2, f"error: --{name.replace('_', '-')} must be at least {least}, got {value}\n")
    if (options.seeds or 0) > TUNING_SEED:
        parser.exit(
            2, f"error: --seeds must be at most {TUNING_SEED}, where those of tuning begin, got {options.seeds}\n"
        )
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, soft_wrap=True, width=NARROW)  # a pipe has no width of its own
    if options.list:
        _list(options.tasks or list_tasks(options.tier or "exact"), console)
        return
    if options.board:
        from routerzoo.bench.leaderboard.page import publish  # it imports matplotlib, which runs do not need

        console.print("wrote " + ", ".join(map(str, publish(options.board, options.out))), markup=False)
        return
    tasks = _tasks(options)
    tier = task_class(tasks[0]).tier
    name, usual = PRESETS[tier, options.quick]
    given = {name: getattr(options, name) for name in ("seeds", "tuning_seeds", "steps")}
    protocol = replace(
        usual, budget=options.budget, **{name: value for name, value in given.items() if value is not None}
    )
    texts = options.routers or (REALISTIC_ROUTERS if tier == "realistic" else CORE)
    choices = [*map(RouterChoice, CONTROLS), *(SCOPES if "scopes" in texts else ())]
    choices += read_choices([text for text in texts if text != "scopes"])
    folder = options.folder or Path("bench") / (name if options.budget == "steps" else f"{name}-{options.budget}")
    if _bench(tasks, choices, protocol, folder, options, console):
        raise SystemExit(1)


def _tasks(options: argparse.Namespace) -> list[str]:
    """Return the tasks to do.

    Raises:
        UserError: they are of two tiers, or are not of the one that was asked for.
    """
    realistic = options.tier == "realistic" or options.domains is not None
    tasks = options.tasks or ([ByteLanguageModel.name] if realistic else QUICK_TASKS if options.quick else list_tasks())
    tasks = [str(Path(task).resolve()) if task.endswith(".py") else task for task in tasks]  # workers look there, too
    if options.domains is not None:
        if separated := next((domain for domain in options.domains if "," in domain), None):
            raise UserError(f"a domain's name and path have no comma, got {separated}: separate domains by blanks")
        paths = (domain.partition("=") for domain in options.domains)
        domains = ",".join(f"{name}={Path(path).resolve()}" if given else name for name, given, path in paths)
        tasks = [f"{task}:{domains}" for task in tasks]
    tiers = {task_class(task).tier for task in tasks} | ({options.tier} if options.tier else set())
    if len(tiers) > 1:
        raise UserError(f"the tiers {' and '.join(sorted(tiers))} have protocols of their own: bench them one by one")
    return tasks


def _bench(
    tasks: Sequence[str],
    choices: Sequence[RouterChoice],
    protocol: Protocol,
    folder: Path,
    options: argparse.Namespace,
    console: Console,
) -> int:
    """Make the runs and show what came of them; return how many failed."""
    names = [task_class(task).name for task in tasks]
    for task in tasks:
        check_task(task_class(task))
        check_passes(task_class(task))
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two tasks are called {twice[0]!r}: give one another name")
    with RowFile(folder) as file:
        _expect_protocol(folder, protocol)
        cells, refused = _cells(tasks, choices, protocol, file)
        _renew(file, cells, options, console)
        engine: Engine = RayEngine(options.slots) if options.engine == "ray" else LocalEngine(options.slots)
        previous = signal.signal(signal.SIGTERM, _interrupt)
        try:
            _work(cells, file, engine, console)
        except KeyboardInterrupt:
            raise UserError("interrupted; the same command goes on from here") from None
        finally:
            engine.close()
            signal.signal(signal.SIGTERM, previous)
        own = {(task_class(cell.task).name, cell.choice.label) for cell in cells}
        rows = [row for row in file.rows.values() if (row.task, row.router) in own]
    found = summaries(rows)
    for name, task in zip(names, tasks, strict=True):
        _show(task, [summary for summary in found if summary.task == name], protocol, console)
    for row in refused:
        console.print(f"not applicable: {row.router} in {row.task}: {row.reason}", markup=False)
    without = Counter((task, scale) for (task, _), scale in scales(rows).items() if isinstance(scale, str))
    for (name, reason), count in without.items():
        console.print(f"no regret in {name} at {count} of its seeds: {reason}", markup=False)
    failed = [row for row in rows if row.status == "failed" and row.stage == "final"]
    for (router, name, reason), count in Counter((row.router, row.task, row.reason) for row in failed).items():
        console.print(f"failed: {router} in {name}, {count} of its runs: {reason}", markup=False)
    for router, of_router in _lost_in_tuning(rows).items():
        tasks = ", ".join(dict.fromkeys(row.task for row in of_router))
        console.print(
            f"failed in tuning: {router} in {tasks}, {len(of_router)} of its runs; the first: {of_router[0].reason}",
            markup=False,
        )
    console.print(f"{len(rows)} rows in {file.path}; a failed run counts as regret 1", markup=False)
    return len(failed)


def _lost_in_tuning(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the tuning runs that failed by router, but for those whose final runs were not made for it."""
    made = {(row.task, row.router) for row in rows if row.stage == "tuning" and row.status == "finished"}
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.stage == "tuning" and row.status == "failed" and (row.task, row.router) in made:
            found.setdefault(row.router, []).append(row)
    return found


def _expect_protocol(folder: Path, protocol: Protocol) -> None:
    """Keep runs of different protocols apart.

    Raises:
        UserError: the folder's runs have another one.
    """
    path = folder / PROTOCOL
    if not path.is_file():
        atomic_write(path, protocol.text())
    elif path.read_text(encoding="utf-8") != protocol.text():
        raise UserError(f"the runs in {folder} have another protocol, see {path}: choose another --folder")


def _cells(
    tasks: Sequence[str], choices: Sequence[RouterChoice], protocol: Protocol, file: RowFile
) -> tuple[list[Cell], list[Row]]:
    """Return what is to be done, and the rows of routers that cannot do a task.

    Raises:
        UserError: the folder has rows of the same names that are something else.
    """
    code = code_version()
    # A constructor of the user's may end its process, and would end the command without a word.
    own = [choice for choice in choices if source_digest(choice.cls)]
    unsafe = [choice for choice in own if not survives(_try_out, tasks, choice, protocol, code)]
    made = [
        make_cell(task, choice, protocol, code, is_safe=choice not in unsafe) for task in tasks for choice in choices
    ]
    cells = [cell for cell in made if isinstance(cell, Cell)]
    refused = [row for row in made if isinstance(row, Row)]
    settings = {(task_class(cell.task).name, cell.choice.label): cell.settings for cell in cells}
    settings |= {(row.task, row.router): row.settings for row in refused}
    for known in file.rows.values():
        if settings.get((known.task, known.router), known.settings) != known.settings:
            raise UserError(
                f"{file.path} has rows of another {known.router} in {known.task}, with other arguments, or of another "
                "size: give the router a label, or choose another --folder"
            )
    can = {(task_class(cell.task).name, cell.choice.label) for cell in cells}
    rows = list(file.rows.values())
    file.set_aside([row for row in rows if row.status == "not applicable" and (row.task, row.router) in can])
    for row in refused:
        if row.key not in file.rows:
            file.append(row)
    return cells, refused


def _try_out(tasks: Sequence[str], choice: RouterChoice, protocol: Protocol, code: str) -> None:
    for task in tasks:
        with suppress(Exception):
            make_cell(task, choice, protocol, code)


def _renew(file: RowFile, cells: Sequence[Cell], options: argparse.Namespace, console: Console) -> None:
    """Say what has been made before, and set aside what is to be made again."""
    own = {(task_class(cell.task).name, cell.choice.label): cell for cell in cells}
    known = [row for row in file.rows.values() if (row.task, row.router) in own]
    failed = [row for row in known if row.status == "failed"]
    old = [row for row in known if row.code != own[row.task, row.router].code]
    again = (failed if options.retry_failed else []) + (old if options.redo_old else [])
    # Final runs may have another setting once runs that chose it are made again.
    tuned = {(row.task, row.router) for row in again if row.stage == "tuning"}
    again += [row for row in known if row.stage == "final" and (row.task, row.router) in tuned]
    if known:
        console.print(f"{len(known)} runs made before, {len(failed)} of them failed (--retry-failed makes them again)")
    if old and not options.redo_old:
        console.print(f"{len(old)} runs were made by other code and stay; --redo-old makes them again")
    file.set_aside(again)


def _work(cells: Sequence[Cell], file: RowFile, engine: Engine, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        total = sum(cell.num_runs for cell in cells)
        left = len(cells)
        names = {(task_class(cell.task).name, cell.choice.label) for cell in cells}
        made = sum((row.task, row.router) in names for row in file.rows.values())
        bar = progress.add_task("runs", total=total, completed=made)

        def ended(row: Row, cell: Cell, done: bool) -> None:
            progress.update(bar, advance=1, description=f"{row.task} {row.router}")
            nonlocal left
            left -= done
            if done and not console.is_terminal:
                console.print(f"done: {row.router} in {row.task}; {left} to go", markup=False)

        work_through(cells, file, engine, ended)


def _show(task: str, found: Sequence[Summary], protocol: Protocol, console: Console) -> None:
    """Print a task's table, best router first, and what became of its predictions."""
    cls = task_class(task)
    table = Table(title=f"{cls.name}: {cls.title}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("router", no_wrap=True)
    ordered = sorted(found, key=lambda summary: summary.regret)
    columns = {
        "regret": [f"{_number(s.regret, 3)} ± {_number(s.half_width, 3)}" for s in ordered],
        "NMI": [_number(s.mean("nmi"), 2) for s in ordered],
        "dead": [_number(s.mean("dead_experts"), 1) for s in ordered],
        "max load": [_number(s.mean("max_load"), 1) for s in ordered],
        "k": [_number(s.mean("mean_k"), 1) for s in ordered],
        "half at": [_number(s.steps_to_half, 0) for s in ordered],
        "GFLOPs": [_number(s.mean("train_flops") / 1e9, 1) for s in ordered],
        "seeds": [str(len(s.scores)) for s in ordered],
        "failed": [str(len(s.failures) or "") for s in ordered],
    }
    left_out = {"max load", "half at", "seeds"} if console.width < NARROW else set()
    shown = [name for name, cells in columns.items() if name not in left_out and any(cells)]
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for place, summary in enumerate(ordered):
        style = "dim" if summary.router in CONTROLS else ""
        table.add_row(summary.router, *(columns[name][place] for name in shown), style=style)
    console.print(table)
    if issubclass(cls, ByteLanguageModel):
        for table in (excess_table(found), domain_table(cls, found)):
            console.print(table)
        console.print(f"read: {cls.data()}", markup=False)
    if edges := _at_edges(ordered, protocol):
        console.print(f"  at the edge of the learning rates that were tried, so that others may be better: {edges}")
    by_name = {summary.router: summary for summary in found}
    if protocol.budget == "flops" and (unmatched := _unmatched(by_name)):
        console.print(f"  trained with other FLOPs than were counted before training: {unmatched}")
    for prediction in cls.predictions:
        if prediction.better not in by_name or prediction.worse not in by_name:
            continue
        difference, error = regret_difference(by_name[prediction.better], by_name[prediction.worse])
        seeds = min(len(by_name[name].scores) for name in (prediction.better, prediction.worse))
        sure = abs(difference) > error * float(stats.t.ppf((1 + LEVEL) / 2, max(seeds - 1, 1)))
        verdict = ("holds" if difference < 0 else "TURNED") if sure else "inconclusive"
        told = f"predicted: {prediction.better} below {prediction.worse}: {verdict} ({difference:+.3f}, standard error"
        console.print(f"  {told} {error:.3f})", markup=False)


def _at_edges(found: Sequence[Summary], protocol: Protocol) -> str:
    """Return which routers have the lowest or the highest learning rate of several; empty where none has."""
    lrs = protocol.lrs if protocol.tuning_seeds else ()
    ends = (min(lrs), max(lrs)) if len(lrs) > 1 else ()
    names = {lr: ", ".join(summary.router for summary in found if summary.scores[0].row.lr == lr) for lr in ends}
    return "; ".join(f"{lr:g} by {who}" for lr, who in names.items() if who)


def _unmatched(found: Mapping[str, Summary]) -> str:
    """Return whose training FLOPs are not those of the dense control, whose cost never changes; empty where all are."""
    flops = {name: summary.mean("train_flops") for name, summary in found.items()}
    wanted = flops.get("dense", math.nan)
    shares = {name: value / wanted for name, value in flops.items()}
    return ", ".join(f"{name} {share:.2f} times" for name, share in shares.items() if abs(share - 1) > TOLERANCE)


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else "never" if math.isinf(value) else f"{value:.{digits}f}"


def _list(tasks: Sequence[str], console: Console) -> None:
    for task in tasks:
        cls = task_class(task)
        console.print(f"[bold]{cls.name}[/bold]: {(inspect.getdoc(cls) or cls.title).partition(chr(10))[0]}")
        for prediction in cls.predictions:
            console.print(f"    {prediction.better} below {prediction.worse}: {prediction.source}", markup=False)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
