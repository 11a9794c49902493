"""Engines: who does the runs. Local processes here; a Ray cluster in `ray_engine`.

`LocalEngine` is ours because a `ProcessPoolExecutor` loses all of its workers when the system kills one.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

from routerzoo.sweep import work
from routerzoo.sweep.ledger import Run


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

    Args:
        slots: runs at a time.
        threads: of each.
        gpus: GPUs of this machine, which runs take turns on.
    """

    def __init__(self, slots: int, threads: int, gpus: int = 0) -> None:
        self.slots, self.threads, self.gpus = slots, threads, gpus
        self._context = multiprocessing.get_context("forkserver")
        # Imported once, before the first fork. Nothing of it may start threads or touch an accelerator.
        self._context.set_forkserver_preload(["routerzoo.sweep.preloaded"])
        self._running: list[tuple[Run, Path, BaseProcess, int | None]] = []
        # Runs read from it; nobody writes. It closes when this process ends, even by SIGKILL, and the runs end too.
        self._for_runs, self._kept = self._context.Pipe(duplex=False)
        # What a run's threads are to be must be known before the server loads its libraries.
        os.environ["OMP_NUM_THREADS"] = str(threads)

    def start(self, run: Run, folder: Path) -> None:
        """Fork a process for a run."""
        (folder / work.OUTCOME).unlink(missing_ok=True)
        gpu = self._least_used_gpu()
        arguments = (str(folder), run.test, self.threads, self._for_runs, gpu)
        process = self._context.Process(target=work.run, args=arguments)
        process.start()
        self._running.append((run, folder, process, gpu))

    def _least_used_gpu(self) -> int | None:
        used = [gpu for *_, gpu in self._running]
        return min(range(self.gpus), key=used.count, default=None)

    def ended(self) -> list[tuple[Run, str, str]]:
        """Return the runs whose processes have ended."""
        found = [entry for entry in self._running if not entry[2].is_alive()]
        self._running = [entry for entry in self._running if entry not in found]
        for _, _, process, _ in found:
            process.join()
        return [(run, *work.outcome(folder, process.exitcode)) for run, folder, process, _ in found]

    def stop(self) -> list[Run]:
        """Kill what is running: checkpoints are whole at any moment, so that nothing is gained by asking."""
        stopped = []
        for run, _, process, _ in self._running:
            process.kill()
            process.join()
            stopped.append(run)
        self._running = []
        return stopped

    def close(self) -> None:
        """Nothing is left open: the server ends with this process."""

    def resolve(self, commands: list[list[str]]) -> list[tuple[str, str]]:
        """Return the whole config of each `fit` command, or why there is none; see `work.resolve`."""
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=work.resolve_all, args=(commands, sender))
        process.start()
        sender.close()
        answers: list[tuple[str, str]] = []
        try:
            answers.extend(receiver.recv() for _ in commands)
        except EOFError:
            answers += [("", "the process that reads configs died")] * (len(commands) - len(answers))
        process.join()
        return answers
