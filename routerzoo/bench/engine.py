"""Who does the runs: long-lived processes of this machine, or a Ray cluster.

A run takes less than a second, and a process with torch takes several to start, so that a worker takes many runs. A
`ProcessPoolExecutor` would lose all workers when the system kills one; here its run alone is lost, and named.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from routerzoo.bench import work
from routerzoo.bench.protocol import Job
from routerzoo.bench.rows import Row
from routerzoo.errors import UserError
from routerzoo.sweep.code import OtherCodeError

RUN_SECONDS = 900.0
"""A run that takes longer is ended, and failed."""


class Engine(Protocol):
    """Does runs, several at a time."""

    slots: int
    """How many at a time."""

    def start(self, job: Job) -> None:
        """Start a run; there must be a free slot."""

    def ended(self, timeout: float) -> list[Row]:
        """Wait until a run has ended, or for some seconds; return the rows of all that have."""

    def close(self) -> None:
        """Stop what is running, and let go of everything."""


@dataclass
class _Worker:
    process: BaseProcess
    channel: Connection
    job: Job | None = None
    started: float = 0.0


class LocalEngine:
    """Processes of this machine, of one thread each.

    Args:
        slots: how many.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._context = _forkserver()
        self._workers: list[_Worker] = []

    def start(self, job: Job) -> None:
        """Hand a run to a free worker, a new one where there is none."""
        free = [worker for worker in self._workers if worker.job is None and worker.process.is_alive()]
        worker = free[0] if free else self._hired()
        worker.job, worker.started = job, time.monotonic()
        worker.channel.send(job)

    def _hired(self) -> _Worker:
        here, there = self._context.Pipe()
        process = self._context.Process(target=work.serve, args=(there,), daemon=True)
        process.start()
        there.close()
        self._workers.append(_Worker(process, here))
        return self._workers[-1]

    def ended(self, timeout: float) -> list[Row]:
        """Return the rows of ended runs; those whose worker died are failed."""
        busy = {worker.channel: worker for worker in self._workers if worker.job is not None}
        rows = []
        for channel in wait(list(busy), timeout):
            worker = busy.pop(channel)  # type: ignore[call-overload]
            try:
                rows.append(worker.channel.recv())
                worker.job = None
            except (EOFError, OSError):
                worker.process.join()
                rows.append(self._lost(worker, _cause(worker.process.exitcode)))
        for worker in busy.values():
            if time.monotonic() - worker.started > RUN_SECONDS:
                worker.process.kill()
                worker.process.join()
                rows.append(self._lost(worker, f"took longer than {RUN_SECONDS:.0f} s"))
        return rows

    def _lost(self, worker: _Worker, reason: str) -> Row:
        self._workers.remove(worker)
        worker.channel.close()
        assert worker.job is not None
        return worker.job.row(status="failed", reason=reason)

    def close(self) -> None:
        """Kill the workers: no row is half written by them."""
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
            worker.channel.close()
        self._workers = []


def survives(function: Callable[..., object], *args: Any) -> bool:
    """Whether a process outlives a call of a function."""
    process = _forkserver().Process(target=function, args=args)
    process.start()
    process.join()
    return process.exitcode == 0


def _forkserver() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    # Imported once, before the first fork.
    context.set_forkserver_preload(["routerzoo.bench.work"])
    os.environ["OMP_NUM_THREADS"] = "1"  # known before the server loads its libraries
    return context


def _cause(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        return f"killed by {name}" + (", as the system does when memory runs out" if name == "SIGKILL" else "")
    return f"its process ended with code {exit_code}"


class RayEngine:
    """Ray tasks of one CPU each, whose processes Ray keeps for the next ones. All nodes have sources and task files.

    Args:
        slots: runs to hand to Ray at a time; Ray lets those wait that there is no room for.

    Raises:
        UserError: Ray is not installed.
    """

    def __init__(self, slots: int) -> None:
        try:
            import ray
        except ImportError:
            raise UserError("the engine ray needs Ray: pip install 'routerzoo[ray]'") from None
        self._ray: Any = ray
        self._started_it = not ray.is_initialized()
        if self._started_it:
            try:
                ray.init(address="auto", log_to_driver=False)  # what `ray start` has started
            except ConnectionError:
                ray.init(log_to_driver=False)
        self.slots = slots
        self._task = ray.remote(num_cpus=1, max_retries=0)(work.do_elsewhere)
        self._running: dict[Any, Job] = {}

    def start(self, job: Job) -> None:
        """Hand a run to Ray."""
        self._running[self._task.remote(job)] = job

    def ended(self, timeout: float) -> list[Row]:
        """Return the rows of ended runs; those whose process or node died are failed.

        Raises:
            OtherCodeError: a node has other sources.
        """
        if not self._running:
            return []
        done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout)
        rows = []
        for reference in done:
            job = self._running.pop(reference)
            try:
                rows.append(self._ray.get(reference))
            except OtherCodeError as error:
                raise getattr(error, "cause", error) from None  # which Ray has wrapped
            except Exception as error:
                rows.append(job.row(status="failed", reason=f"Ray: {str(error).strip().splitlines()[0]}"))
        return rows

    def close(self) -> None:
        """Cancel what is running, and leave the cluster."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running = {}
        if self._started_it:
            self._ray.shutdown()
