"""`python -m routerzoo sweep`: run a grid, and go on where it was stopped."""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import os
import re
import shlex
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from routerzoo.cli.arguments import TRUST_VARIABLE, CommandParser
from routerzoo.cli.configs import find_config
from routerzoo.errors import UserError
from routerzoo.runs.atomic import atomic_write
from routerzoo.sweep import work
from routerzoo.sweep.code import code_version
from routerzoo.sweep.engine import Engine, LocalEngine
from routerzoo.sweep.entries import Entries
from routerzoo.sweep.ledger import Ledger, Run
from routerzoo.sweep.plan import Plan, read_plan
from routerzoo.sweep.processes import gpus_needed, num_processes
from routerzoo.sweep.progress import Progress
from routerzoo.sweep.room import KEEP, Room, shown_size, size_of
from routerzoo.sweep.tuning import Tuning

PLAN = "plan.json"
TUNING = "tuning.csv"
POLL_SECONDS = 0.2
BEAT_SECONDS = 10.0
TAKEN_SECONDS = 5.0
"""After so long a run that another process held is tried again."""


def main(args: Sequence[str]) -> None:
    """Run the command."""
    parser = CommandParser(
        prog="python -m routerzoo sweep",
        description="Run a grid of routers, tasks, seeds and anything else that a config holds. The same command goes "
        "on where it was stopped, however it was.",
    )
    parser.add_argument("--config", type=Path, required=True, help="the sweep: a YAML file, see configs/sweeps")
    parser.add_argument("--folder", type=Path, help="where everything goes; by default sweeps/ and the file's name")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--workers", type=int, help="runs at a time; by default as many as there are cores, or GPUs")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process of a run; by default 1")
    parser.add_argument("--engine", choices=["local", "ray"], default="local", help="processes here, or a Ray cluster")
    parser.add_argument("--gpus", type=float, default=0.0, help="GPUs of each run; for Ray a fraction shares one")
    parser.add_argument("--keep", choices=KEEP, default="all", help="checkpoints of finished runs that stay")
    parser.add_argument("--print", action="store_true", dest="show", help="print the runs as commands, and stop")
    parser.add_argument("--retry-failed", action="store_true", help="do failed runs again")
    parser.add_argument("--trust", action="store_true", help="let configs name classes of any package")
    parser.add_argument("--redo-old", action="store_true", help="do runs again that other code has made")
    options = parser.parse_args(args)
    for name in ("workers", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.exit(2, f"error: --{name} must be at least 1, got {value}\n")
    if options.gpus < 0 or (options.gpus > 1 and options.gpus % 1):
        parser.exit(2, f"error: --gpus must be a whole number, or a fraction below 1, got {options.gpus:g}\n")
    if options.trust:
        os.environ[TRUST_VARIABLE] = "1"  # of the processes that are started from here
    try:
        plan = read_plan(find_config(str(options.config)))
        folder = options.folder or Path("sweeps") / options.config.stem
        missing = _sweep(plan, folder, cores, options)
    except (UserError, OSError) as error:  # the latter names a file, and what the system has against it
        raise SystemExit(f"error: {error}") from None
    if missing:
        raise SystemExit(1)


def _sweep(plan: Plan, folder: Path, cores: int, options: argparse.Namespace) -> int:
    """Return how many points of the grid have no result: their runs failed, or their configs were refused."""
    console = Console(highlight=False, soft_wrap=True)
    gpus = torch.cuda.device_count() if options.engine == "local" else 0
    local = LocalEngine(1, options.threads, gpus, max(options.gpus, 1.0))
    ledger = Ledger(folder)
    code = code_version()
    entries = Entries(plan, folder, ledger, local, code, console)
    rows = _enter(entries, folder, ledger)
    told = {"config": str(plan.path), "baseline": plan.baseline, "margins": dict(plan.margins)}
    told |= {"budget": plan.budget, "unequal": entries.unequal}
    atomic_write(folder / PLAN, json.dumps(told, indent=2) + "\n")
    if options.show:
        _print_commands(folder, ledger.runs(), options.threads, console)
        if not entries.is_complete:
            console.print("# further trials, and the final runs at what is best, follow from the results of these")
        for label, reason in entries.refused.items():
            console.print(f"# refused: {label}: {reason}", markup=False)
        return len(entries.refused)
    local.slots = options.workers or _fitting(rows, cores, gpus, options)
    if options.retry_failed:
        ledger.retry_failed()
    if options.redo_old:
        for run in ledger.redo(code, lambda run: _set_aside(folder / run.folder, run.code)):
            _write_config(folder / run.folder, run.config)
    if options.retry_failed or options.redo_old:
        rows = _enter(entries, folder, ledger)  # other trials may be the best then
    planned = [run for run in ledger.runs() if run.planned]
    _say_what_is_known(planned, entries.refused, code, console)
    room = Room(folder, options.keep)
    for run in planned:
        if run.status in ("finished", "failed"):
            room.ended(folder / run.folder, run.status, run.stage)
    engine: Engine = local
    if options.engine == "ray":
        from routerzoo.sweep.ray_engine import RayEngine

        engine = RayEngine(options.workers or 10_000, options.threads, options.gpus)
    try:
        with Progress(folder, min(engine.slots, max(len(planned), 1)), console) as progress:
            while True:
                _work_through(folder, ledger, engine, progress, room, code)
                before = {row["key"] for row in rows}
                rows = _enter(entries, folder, ledger)
                if {row["key"] for row in rows} == before:
                    break
    finally:
        engine.close()
    if entries.tunings:
        _write_tuning(folder, entries.tunings, console)
    planned = [run for run in ledger.runs() if run.planned]
    counts = Counter(run.status for run in planned if run.stage == "final")
    counts["refused"] = len(entries.refused)
    trials = Counter(run.status for run in planned if run.stage == "trial")
    counts["trials"], counts["failed trials"] = trials["finished"], trials["failed"]
    summary = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()) if count)
    console.print(f"{summary}; {shown_size(size_of(folder))} in {folder}.", markup=False)
    if not entries.is_complete:
        console.print("Tuning is not over: another sweep is at its trials. The same command goes on from here.")
    console.print(f"What came of it: python -m routerzoo report {shlex.quote(str(folder))}", markup=False)
    for run in planned:
        if run.status == "failed" and run.stage == "final":
            console.print(f"failed: {run.label}: {run.reason} ({folder / run.folder / work.LOG})", markup=False)
    return int(counts["failed"] + counts["refused"] + (not entries.is_complete))


def _enter(entries: Entries, folder: Path, ledger: Ledger) -> list[dict[str, Any]]:
    """Write the runs that are known by now into the ledger, and their configs into their folders."""
    rows = entries.rows()
    for row in rows:
        _write_config(folder / row["folder"], row["config"])
    ledger.plan(rows)
    atomic_write(folder / "refused.json", json.dumps(entries.refused, indent=2) + "\n")
    return rows


def _fitting(rows: Sequence[dict[str, Any]], cores: int, gpus: int, options: argparse.Namespace) -> int:
    """Return how many runs to do at a time.

    Raises:
        UserError: a run needs more GPUs than there are.
    """
    # Seeds differ in nothing else.
    configs = {(row["task"], row["variant"]): row["config"] for row in rows}
    trainers: list[dict[str, Any]] = [yaml.safe_load(config)["trainer"] for config in configs.values()]
    if gpus and (each := max(map(gpus_needed, trainers), default=0)):
        each = max(each, int(options.gpus), 1)
        if each > gpus:
            raise UserError(
                f"a run needs {each} GPUs, and this machine has {gpus}: set trainer.devices, or --engine ray"
            )
        return gpus // each
    processes = max((num_processes(trainer) for trainer in trainers), default=1)
    return max(cores // (int(options.threads) * processes), 1)


def _write_tuning(folder: Path, tunings: Sequence[Tuning], console: Console) -> None:
    """Write the trials as a table, and say what was chosen."""
    rows = [row for tuning in tunings for row in tuning.history]
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    atomic_write(folder / TUNING, text.getvalue())
    for tuning in tunings:
        if tuning.best is not None:
            values = ", ".join(f"{key} {value}" for key, value in tuning.best.items())
            console.print(f"tuned {tuning.base.task} {tuning.base.variant}: {values}", markup=False)


def _write_config(place: Path, config: str) -> None:
    place.mkdir(parents=True, exist_ok=True)
    if not (place / work.CELL).is_file():
        atomic_write(place / work.CELL, config)


def _set_aside(place: Path, code: str) -> None:
    """Rename a run's folder, so that the run neither goes on from what other code has left nor loses it."""
    if place.is_dir():
        name = f"{place.name}.by-{re.sub(r'[^A-Za-z0-9.+]+', '-', code)}"
        taken = itertools.count(2)
        target = place.with_name(name)
        while target.exists():
            target = place.with_name(f"{name}.{next(taken)}")
        place.rename(target)


def _print_commands(folder: Path, runs: Sequence[Run], threads: int, console: Console) -> None:
    for run in runs:
        if not run.planned:
            continue
        place = folder / run.folder
        test = " ".join(map(shlex.quote, run.test))
        trust = f"{TRUST_VARIABLE}=1 " if os.environ.get(TRUST_VARIABLE, "0") != "0" else ""
        python = f"{trust}OMP_NUM_THREADS={threads} python -m routerzoo"
        console.print(f"# {run.label}", markup=False)
        by_hand = shlex.quote(str(Path("by-hand") / place.name))
        fit = f"{python} fit --config {shlex.quote(str(place / work.CELL))} --run_dir {by_hand}"
        tests = f" && {python} test --run_dir {by_hand} --ckpt_path best {test}" if run.stage == "final" else ""
        console.print(f"{fit}{tests}".rstrip(), markup=False)


def _say_what_is_known(planned: Sequence[Run], refused: dict[str, str], code: str, console: Console) -> None:
    counts = Counter(run.status for run in planned)
    console.print(f"{len(planned)} runs; {counts['finished']} finished before, {counts['failed']} failed before")
    if old := [run for run in planned if run.status == "finished" and run.code != code]:
        console.print(
            f"[yellow]{len(old)} finished runs were made by other code ({old[0].code}; this is {code}). They stay, and "
            "the report says so; --redo-old does them again[/yellow]"
        )
    if counts["failed"]:
        console.print("--retry-failed does failed runs again")
    for label, reason in refused.items():
        console.print(f"refused: {label}: {reason}", markup=False)


def _work_through(folder: Path, ledger: Ledger, engine: Engine, progress: Progress, room: Room, code: str) -> None:
    """Do runs until none is left that nobody is at, or no room for one."""
    started: dict[str, tuple[float, Path]] = {}
    taken: dict[str, float] = {}  # runs that some other process holds, and when that was seen
    beaten = 0.0
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        while True:
            for run, status, reason in engine.ended():
                place = folder / run.folder
                if reason == work.TAKEN:
                    ledger.finish(run.key, "waiting", reason)
                    del started[run.key]
                    taken[run.key] = time.time()
                    continue
                measured = work.results(place) if status == "finished" else {}
                if status == "finished" and ("test" if run.stage == "final" else "fit") not in measured:
                    status, reason = "failed", f"finished without results; see {place / work.LOG}"
                ledger.finish(run.key, status, reason, measured)
                room.ended(place, status, run.stage)
                seconds = time.time() - started.pop(run.key)[0]
                progress.ended(run, status, reason, seconds, [r for r in ledger.runs() if r.planned])
            taken = {key: seen for key, seen in taken.items() if time.time() - seen < TAKEN_SECONDS}
            while len(started) < engine.slots:
                lacks = room.lacks([place for _, place in started.values()])
                if lacks and started:
                    break  # what is under way may leave less than it takes now
                if (claimed := ledger.claim(code, taken, work.goes_on)) is None:
                    break
                if lacks:
                    ledger.finish(claimed.key, "waiting", lacks)
                    raise UserError(f"{lacks}; the same command goes on from here")
                place = folder / claimed.folder
                resumes = work.goes_on(place)
                started[claimed.key] = (time.time(), place)
                engine.start(claimed, place)
                progress.started(claimed, resumes)
            if not started and not taken:
                return
            if time.time() - beaten > BEAT_SECONDS:
                ledger.beat()
                beaten = time.time()
            progress.show([run for run in ledger.runs() if run.planned])
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        for run in engine.stop():
            ledger.finish(run.key, "waiting", "interrupted")
        raise UserError("interrupted; the same command goes on from here") from None
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
