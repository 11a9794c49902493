"""`RayEngine`: the runs of a sweep on a Ray cluster. It needs `pip install 'routerzoo[ray]'`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from routerzoo.errors import UserError
from routerzoo.sweep import work
from routerzoo.sweep.ledger import Run


class RayEngine:
    """Runs as Ray tasks, each a process of its own, on whatever nodes the cluster has.

    The sweep's folder must be one that all nodes see, under the same path. Only the sweep itself writes the ledger.

    Args:
        slots: runs to hand to Ray at a time; Ray lets those wait that there is no room for.
        threads: of each run, which are its CPUs for Ray.
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
        self._task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0)(_in_process)
        self._running: dict[Any, tuple[Run, Path]] = {}

    def start(self, run: Run, folder: Path) -> None:
        """Hand a run to Ray."""
        (folder / work.OUTCOME).unlink(missing_ok=True)
        reference = self._task.remote(str(folder.resolve()), run.test, self.threads)
        self._running[reference] = (run, folder)

    def ended(self) -> list[tuple[Run, str, str]]:
        """Return the runs that have ended."""
        if not self._running:
            return []
        done, _ = self._ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        found = []
        for reference in done:
            run, folder = self._running.pop(reference)
            try:
                found.append((run, *work.outcome(folder, self._ray.get(reference))))
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


def _in_process(folder: str, test: list[str], threads: int) -> int:
    """Do a run in a process of its own, which neither a crash nor what it leaves in memory can carry into the next."""
    import os

    # Ray sets it to the task's CPUs; a run by hand has what the sweep says.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "routerzoo.sweep.work", folder, json.dumps(test), str(threads)]
    process = subprocess.Popen(command, env=environment)
    try:
        return process.wait()
    finally:
        process.kill()
