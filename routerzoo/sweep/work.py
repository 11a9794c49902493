"""One run, in a process or several of its own: train, test, and record the exit status.

It is ours because it resumes and tests through the command line, in the run folders that `report` reads.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from routerzoo.runs.atomic import BACKUP, atomic_write, recover
from routerzoo.sweep.processes import num_processes

OUTCOME = "outcome.json"
LOG = "log.txt"
PROGRESS = "progress.json"
LAST = "checkpoints/last.ckpt"
BEST = "checkpoints/best.ckpt"
CELL = "cell.yaml"
LOCK = "lock"
TAKEN = "another process is at this run"


def resolve(arguments: list[str]) -> tuple[str, str]:
    """Return the whole config of a `fit` command, or why there is none."""
    from routerzoo.cli import main as cli

    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main([*arguments, "--print_config"])
    except SystemExit as ended:
        if ended.code in (0, None):
            reason = needs_more_machines(out.getvalue())
            return ("", reason) if reason else (out.getvalue(), "")
        return "", _reason(str(ended.code) if isinstance(ended.code, str) else err.getvalue())
    except Exception as error:
        return "", f"{type(error).__name__}: {error}"
    return "", "the command printed no config"


def needs_more_machines(config: str) -> str:
    """Say why a sweep cannot do a run that is on several machines; empty where it is on one."""
    nodes = yaml.safe_load(config)["trainer"].get("num_nodes", 1)
    if nodes == 1:
        return ""
    return f"trainer.num_nodes is {nodes}, but a run of a sweep is on one machine: set it to 1, or run it by hand"


def answer_all(function: Callable[[Any], Any], questions: list[Any], channel: Any) -> None:
    """Send what a function answers, one after the other; None where it raises."""
    for question in questions:
        try:
            answer = function(question)
        except Exception:
            answer = None
        channel.send(answer)
    channel.close()


def run(
    folder: str,
    test: list[str] | None,
    threads: int,
    sweep: Connection | int | None = None,
    gpus: list[int] | None = None,
) -> None:
    """Train and test what `cell.yaml` in a folder describes, from the last checkpoint if there is one.

    Everything that is printed goes into `log.txt`, and how it ended into `outcome.json`.

    Args:
        folder: of the run.
        test: further arguments of the test; None for no test.
        threads: of torch, in each process.
        sweep: reading end of a pipe that the sweep alone can write to; when that ends, so does the run.
        gpus: the only ones that the run may see.
    """
    if gpus is not None:
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[gpu] if visible else str(gpu) for gpu in gpus)
    with contextlib.suppress(OSError):
        # A group of its own: an interrupt of the terminal is the sweep's to handle, and all processes can be ended.
        os.setsid()
    _die_with(sweep)
    place = Path(folder)
    try:
        with FileLock(place / LOCK, timeout=0):  # a second process would overwrite checkpoints
            _log_into(place / LOG)
            atomic_write(place / OUTCOME, json.dumps(_outcome(place, test, threads)))
    except Timeout:
        atomic_write(place / OUTCOME, json.dumps({"status": "waiting", "reason": TAKEN}))


def _outcome(folder: Path, test: list[str] | None, threads: int) -> dict[str, Any]:
    try:
        import torch

        from routerzoo.cli import main as cli
        from routerzoo.runs.checkpoint import TERMINATED
        from routerzoo.tune_cpu import tune_cpu

        os.environ["OMP_NUM_THREADS"] = str(threads)
        os.environ[cli.PROGRESS_VARIABLE] = str(folder / PROGRESS)
        torch.set_num_threads(threads)
        if os.environ.get("ROUTERZOO_TUNE_CPU", "1") != "0":
            tune_cpu()  # as the command line does, so that a run by hand gives the same numbers
        trainer = yaml.safe_load((folder / CELL).read_text(encoding="utf-8")).get("trainer", {})
        alone = num_processes(trainer, torch.cuda.device_count()) == 1
        for command in _commands(folder, test):
            (cli.main if alone else _in_group)(command)
    except SystemExit as ended:
        if ended.code == TERMINATED:
            return {"status": "failed", "reason": "ended by SIGTERM, and saved; --retry-failed goes on from there"}
        if ended.code not in (0, None):
            print(ended.code, file=sys.stderr)
            return {"status": "failed", "reason": _reason(str(ended.code))}
    except MemoryError:
        traceback.print_exc()
        return {"status": "failed", "reason": "out of memory"}
    except BaseException as error:
        traceback.print_exc()
        first = str(error).strip().split("\n")[0]
        return {"status": "failed", "reason": f"{type(error).__name__}: {first}"}
    return {"status": "finished", "reason": ""}


def _commands(folder: Path, test: list[str] | None) -> Iterator[list[str]]:
    """Yield the commands that are left, each when the one before has ended."""
    # Progress goes through the file; a bar would only fill the log.
    rest = ["--config", str(folder / CELL), "--trainer.enable_progress_bar=false", "--run_dir", str(folder)]
    last, best = folder / LAST, folder / BEST
    if "fit" not in results(folder):
        # What was not saved starts again, with nothing of the first attempt in its logs.
        yield ["fit", *rest, *(["--ckpt_path", str(last)] if recover(last) else ["--overwrite"])]
    if test is not None:
        yield ["test", *rest, "--ckpt_path", str(best if recover(best) else last), *test]


def _in_group(command: list[str]) -> None:
    """Run a command whose process starts the others of its group: Lightning does so with the command of the first.

    Raises:
        SystemExit: it did not end well.
    """
    ended = subprocess.run([sys.executable, "-m", "routerzoo", *command], check=False).returncode
    if ended < 0:
        raise SystemExit(f"a process of the run was killed by {signal.Signals(-ended).name}")
    if ended:
        log = Path(command[command.index("--run_dir") + 1]) / LOG
        told = log.read_text(encoding="utf-8", errors="replace")[-20_000:]
        raise SystemExit(ended if ended == 143 else reason_of_group(told))


def reason_of_group(log: str) -> str:
    """Return why a run of several processes failed; what those say that lost the connection to another comes last."""
    errors = re.findall(r"(?m)^(?:\[rank\d+\]: )?((?:error|[\w.]*Error): .*)$", log)
    if causes := [error for error in errors if "/gloo/transport/" not in error]:
        return _reason(causes[-1])
    return "one of its processes was killed, as the system does when memory runs out" if errors else _reason(log)


def goes_on(folder: Path) -> bool:
    """Whether a run in this folder would go on from what was left there."""
    return any((folder / f"{LAST}{end}").exists() for end in ("", BACKUP)) or "fit" in results(folder)


def results(folder: Path) -> dict[str, Any]:
    """Return what a run has measured so far; nothing where it has not, or the file is broken."""
    try:
        content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def outcome(folder: Path, exit_code: int | None) -> tuple[str, str]:
    """Return how a run ended, from what it left and how its process ended: status and reason."""
    try:
        content = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
        return str(content["status"]), str(content["reason"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return "failed", f"killed by {name}{hint}"
    return "failed", f"the process ended with code {exit_code} and left no word; see {folder / LOG}"


def _reason(text: str) -> str:
    """Return the last line that says something, without its mark."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[-1] if lines else "no reason given").removeprefix("error: ")


def _log_into(path: Path) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def _die_with(sweep: Connection | int | None) -> None:
    """End all processes of the run when the sweep's end of a pipe closes, as it does however the sweep ends."""
    if sweep is None:
        return
    alone = os.getpgrp() != os.getpid()

    def wait() -> None:
        with contextlib.suppress(EOFError, OSError):
            if isinstance(sweep, int):
                os.read(sweep, 1)
            else:
                sweep.recv()
        if not alone:
            os.killpg(os.getpgrp(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":  # as the Ray engine starts it
    run(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sweep=0)
