"""`RayEngine`: the runs of a sweep on a Ray cluster. It needs `pip install 'routerzoo[ray]'`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from routerzoo.errors import UserError
from routerzoo.sweep import work
from routerzoo.sweep.code import OtherCodeError, expect_code
from routerzoo.sweep.engine import tests_of
from routerzoo.sweep.ledger import THEN, Run
from routerzoo.sweep.processes import num_processes


class RayEngine:
    """Runs as Ray tasks, each with a process or several of its own on one node, on whatever nodes the cluster has.

    The sweep's folder must be one that all nodes see, under the same path. Only the sweep itself writes the ledger.

    Args:
        slots: runs to hand to Ray at a time; Ray lets those wait that there is no room for.
        threads: of each process of a run; those of all are its CPUs for Ray.
        gpus: of each run; a fraction shares one.

    Raises:
        UserError: Ray is not installed.
    """

    def __init__(self, slots: int, threads: int, gpus: float) -> None:
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
        self.slots, self.threads = slots, threads
        self.gpus = gpus
        self._task = ray.remote(num_gpus=gpus, max_retries=0)(_in_process)
        self._running: dict[Any, tuple[Run, Path]] = {}

    def start(self, run: Run, folder: Path) -> None:
        """Hand a run to Ray."""
        (folder / work.OUTCOME).unlink(missing_ok=True)
        trainer = (yaml.safe_load(run.config) or {}).get("trainer", {})
        task = self._task.options(num_cpus=self.threads * num_processes(trainer, int(self.gpus)))
        reference = task.remote(str(folder.resolve()), tests_of(run), self.threads, run.code.split(THEN)[-1])
        self._running[reference] = (run, folder)

    def ended(self) -> list[tuple[Run, str, str]]:
        """Return the runs that have ended.

        Raises:
            OtherCodeError: a node has other sources.
        """
        if not self._running:
            return []
        done, _ = self._ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        found = []
        for reference in done:
            run, folder = self._running.pop(reference)
            try:
                found.append((run, *work.outcome(folder, self._ray.get(reference))))
            except OtherCodeError as error:
                raise getattr(error, "cause", error) from None  # which Ray has wrapped
            except Exception as error:  # the node died, or the task could not be placed
                found.append((run, "failed", f"Ray: {str(error).strip().splitlines()[0]}"))
        return found

    def stop(self) -> list[Run]:
        """Cancel what is running."""
        stopped = [run for run, _ in self._running.values()]
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running = {}
        return stopped

    def close(self) -> None:
        """Leave the cluster."""
        if self._started_it:
            self._ray.shutdown()


def _in_process(folder: str, test: list[str] | None, threads: int, code: str) -> int:
    """Do a run in a process of its own, which neither a crash nor what it leaves in memory can carry into the next.

    Raises:
        OtherCodeError: this machine has other sources than the sweep.
    """
    expect_code(code)
    # Ray sets it to the task's CPUs; a run by hand has what the sweep says.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "routerzoo.sweep.work", folder, json.dumps(test), str(threads)]
    # It reads its input, where nothing comes: that ends when this process does, even by SIGKILL, and the run too.
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE) as process:
        try:
            return process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # what is left of its group
            process.kill()
