"""Engines: who does the runs. Local processes here; a Ray cluster in `ray_engine`.

`LocalEngine` is ours because a `ProcessPoolExecutor` loses all of its workers when the system kills one.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import yaml

from routerzoo.sweep import work
from routerzoo.sweep.ledger import Run
from routerzoo.sweep.processes import gpus_needed


class Engine(Protocol):
    """Does runs, several at a time."""

    slots: int
    """How many at a time."""

    def start(self, run: Run, folder: Path) -> None:
        """Start a run in its folder."""

    def ended(self) -> list[tuple[Run, str, str]]:
        """Return the runs that have ended since it was last asked: each with status and reason."""

    def stop(self) -> list[Run]:
        """Stop all; return those that had not ended."""

    def close(self) -> None:
        """Let go of everything."""


class LocalEngine:
    """Processes of this machine, forked from a server that has imported everything: a run starts within a second.

    A run of several processes is a group of them: it ends as a whole, however it ends.

    Args:
        slots: runs at a time.
        threads: of each process of a run.
        gpus: GPUs of this machine, which runs take turns on.
        gpus_per_run: of each run, at least, if its config takes any.
    """

    def __init__(self, slots: int, threads: int, gpus: int = 0, gpus_per_run: float = 1.0) -> None:
        self.slots, self.threads, self.gpus, self.gpus_per_run = slots, threads, gpus, gpus_per_run
        self._context = multiprocessing.get_context("forkserver")
        # Imported once, before the first fork. Nothing of it may start threads or touch an accelerator.
        self._context.set_forkserver_preload(["routerzoo.sweep.preloaded"])
        self._running: list[tuple[Run, Path, BaseProcess, list[int] | None]] = []
        # Runs read from it; nobody writes. It closes when this process ends, even by SIGKILL, and the runs end too.
        self._for_runs, self._kept = self._context.Pipe(duplex=False)
        # What a run's threads are to be must be known before the server loads its libraries.
        os.environ["OMP_NUM_THREADS"] = str(threads)

    def start(self, run: Run, folder: Path) -> None:
        """Fork a process for a run."""
        (folder / work.OUTCOME).unlink(missing_ok=True)
        gpus = self._least_used_gpus(run)
        arguments = (str(folder), tests_of(run), self.threads, self._for_runs, gpus)
        process = self._context.Process(target=work.run, args=arguments)
        process.start()
        self._running.append((run, folder, process, gpus))

    def _least_used_gpus(self, run: Run) -> list[int] | None:
        """Return the GPUs that a run is to see; None where there are none, so that nothing is hidden."""
        if not self.gpus:
            return None
        used = [gpu for *_, gpus in self._running for gpu in gpus or ()]
        needed = gpus_needed((yaml.safe_load(run.config) or {}).get("trainer", {}))
        needed = max(needed, math.ceil(self.gpus_per_run)) if needed else 0
        return sorted(sorted(range(self.gpus), key=used.count)[:needed])

    def ended(self) -> list[tuple[Run, str, str]]:
        """Return the runs whose processes have ended."""
        found = [entry for entry in self._running if not entry[2].is_alive()]
        self._running = [entry for entry in self._running if entry not in found]
        for _, _, process, _ in found:
            _end(process)
        return [(run, *work.outcome(folder, process.exitcode)) for run, folder, process, _ in found]

    def stop(self) -> list[Run]:
        """Kill what is running: checkpoints are whole at any moment, so that nothing is gained by asking."""
        stopped = []
        for run, _, process, _ in self._running:
            _end(process)
            stopped.append(run)
        self._running = []
        return stopped

    def close(self) -> None:
        """Nothing is left open: the server ends with this process."""

    def resolve(self, commands: list[list[str]]) -> list[tuple[str, str]]:
        """Return the whole config of each `fit` command, or why there is none; see `work.resolve`."""
        return [answer or ("", "the process that reads configs died") for answer in self.ask(work.resolve, commands)]

    def ask(self, function: Callable[[Any], Any], questions: Sequence[Any]) -> list[Any]:
        """Return what a function answers, in a process of its own; None where it raised or died."""
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=work.answer_all, args=(function, list(questions), sender))
        process.start()
        sender.close()
        answers: list[Any] = []
        with contextlib.suppress(EOFError):
            for _ in questions:
                answers.append(receiver.recv())
        process.join()
        return answers + [None] * (len(questions) - len(answers))


def tests_of(run: Run) -> list[str] | None:
    """Return further arguments of a run's test; None for a trial, which is not tested."""
    return run.test if run.stage == "final" else None


def _end(process: BaseProcess) -> None:
    """Kill what is left of a run's processes."""
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it has gone, or has not made its group yet
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
