"""Run folders: config, checkpoints, logs and pictures of a run, and how a later command finds them.

runs/<name>/<number>/config.yaml
checkpoints/last.ckpt, best.ckpt
logs/metrics.csv and TensorBoard's files
routing.png
results.json
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from filelock import FileLock, Timeout

from routerzoo.errors import UserError, reason_of
from routerzoo.runs.atomic import recover, remove

DEFAULT_ROOT = Path("runs")
CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
LOGS = "logs"
RESULTS = "results.json"
OWN = (CONFIG, CHECKPOINTS, LOGS, RESULTS)
"""What a folder that holds a run has, if not all of it."""
WRITTEN = (*OWN, "predictions*.jsonl", "predictions*.csv", "*.png", "look.html")
"""All that commands write into the folder of a run."""
LOCK = ".lock"
"""File that the process that trains a run holds a lock on."""
LISTED = 5


def claim(folder: Path | None, name: str, root: Path = DEFAULT_ROOT) -> tuple[Path, bool]:
    """Create a folder that no other run has; of runs that start together, each gets its own.

    Args:
        folder: the folder; None for the next number of `root/name`.
        name: of the run.
        root: folder of the runs.

    Returns:
        The folder, and whether it did not exist before.

    Raises:
        UserError: the folder holds a run, or cannot be created.
    """
    try:
        if folder is None:
            return _next_number(root / _safe(name)), True
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
        except FileExistsError:
            refuse_run(folder)
            if not folder.is_dir():
                raise
            return folder, False
    except OSError as error:
        place = root / _safe(name) if folder is None else folder
        raise UserError(
            f"cannot create the run folder {place} ({reason_of(error)}); choose another with --run_dir"
        ) from error
    return folder, True


def _next_number(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    number = max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=-1)
    while True:
        number += 1
        with contextlib.suppress(FileExistsError):
            (folder / f"{number:03d}").mkdir()
            return folder / f"{number:03d}"


def write_config(folder: Path, text: str) -> None:
    """Write the config of a new run, which marks the folder as its own.

    Raises:
        UserError: another run has done so.
    """
    try:
        with (folder / CONFIG).open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        refuse_run(folder)
    except OSError as error:
        raise UserError(f"cannot write the run's config {folder / CONFIG}: {error.strerror}") from error


def lock(folder: Path) -> FileLock:
    """Let no other process train the run in a folder, until the lock is released or this process ends.

    Raises:
        UserError: one does, or the folder cannot be written to.
    """
    held = FileLock(folder / LOCK)
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process trains the run in {folder}: wait until it ends, or stop it") from None
    except NotImplementedError:
        pass  # a file system without locks
    except OSError as error:
        raise UserError(
            f"cannot train in the run folder {folder} ({reason_of(error)}); choose another with --run_dir, and give "
            "--ckpt_path the checkpoint's file to go on from there"
        ) from error
    return held


def refuse_run(folder: Path) -> None:
    """Refuse a folder that holds a run.

    Raises:
        UserError: it does.
    """
    if not any((folder / name).exists() for name in OWN):
        return
    resume = f"resume it with --run_dir {folder} --ckpt_path last, " if has_checkpoint(folder, "last") else ""
    raise UserError(f"{folder} holds a run: {resume}replace it with --overwrite, or choose another --run_dir")


def clear(folder: Path) -> None:
    """Delete all that a run has written into its folder."""
    for pattern in WRITTEN:
        for path in folder.glob(pattern):
            remove(path)


def discard(folder: Path, whole: bool) -> None:
    """Delete what a run has written, or its whole folder, with the folders above that this leaves empty."""
    if not whole:
        clear(folder)
        remove(folder / LOCK)
        return
    remove(folder)
    with contextlib.suppress(OSError):  # other runs are there
        for above in (folder.parent, folder.parent.parent):
            if above.is_relative_to(DEFAULT_ROOT):
                above.rmdir()


def has_checkpoint(folder: Path, checkpoint: str) -> bool:
    """Whether a run has `last` or `best`."""
    return recover(folder / CHECKPOINTS / f"{checkpoint}.ckpt")


def latest_run(checkpoint: str, name: str | None = None, root: Path = DEFAULT_ROOT) -> Path:
    """Return the run that was started, or resumed, last, if it has a checkpoint of that name.

    Args:
        checkpoint: `last` or `best`.
        name: the run's name; by default any.
        root: folder of the runs.

    Raises:
        UserError: there is no such run, or it has no such checkpoint; another run's is never taken instead.
    """
    pattern = f"{_safe(name) if name is not None else '*'}/*"
    configs = sorted(root.glob(f"{pattern}/{CONFIG}"), key=_changed, reverse=True)
    if not configs:
        others = [config.parent for config in sorted(root.glob(f"*/*/{CONFIG}"), key=_changed, reverse=True)]
        found = _listed(others, checkpoint)
        ways_out = f"Train first, or choose one of another name: {found}" if found else "Train first"
        raise UserError(
            f"no checkpoint to continue from: no run matches {root / pattern}. {ways_out}, or give --ckpt_path a file"
        )
    newest, *others = (config.parent for config in configs)
    if has_checkpoint(newest, checkpoint):
        return newest
    found = _listed(others, checkpoint)
    ways_out = f"choose one that has: {found}" if found else "no other run has one either"
    raise UserError(
        f"no checkpoint to continue from: {newest}, the run that was started last, has no {checkpoint}.ckpt; {ways_out}"
    )


def _changed(path: Path) -> tuple[int, Path]:
    return path.stat().st_mtime_ns, path


def _listed(folders: list[Path], checkpoint: str) -> str:
    """Return the options that choose the first of the runs with a checkpoint; nothing if none has one."""
    found = [f"--run_dir {run}" for run in folders if has_checkpoint(run, checkpoint)]
    more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
    return f"{', '.join(found[:LISTED])}{more}"


def run_of(checkpoint: Path) -> Path:
    """Return the run folder that a checkpoint file lies in."""
    return checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else checkpoint.parent


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "run"
