"""Run folders: config, checkpoints, logs and pictures of a run, and how a later command finds them.

runs/<name>/<number>/config.yaml
checkpoints/last.ckpt, best.ckpt
logs/metrics.csv and TensorBoard's files
routing.png
results.json
"""

from __future__ import annotations

import re
from pathlib import Path

from routerzoo.errors import UserError

DEFAULT_ROOT = Path("runs")
CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"


def new_run(name: str, root: Path = DEFAULT_ROOT) -> Path:
    """Return the next free folder for a run of that name, without creating it."""
    folder = root / _safe(name)
    numbers = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    return folder / f"{max(numbers, default=-1) + 1:03d}"


def latest_run(checkpoint: str, name: str | None = None, root: Path = DEFAULT_ROOT) -> Path:
    """Return the latest run that has a checkpoint of that name.

    Args:
        checkpoint: `last` or `best`.
        name: the run's name; by default any.
        root: folder of the runs.

    Raises:
        UserError: there is no such run.
    """
    pattern = f"{_safe(name) if name is not None else '*'}/*/{CHECKPOINTS}/{checkpoint}.ckpt"
    found = list(root.glob(pattern))
    if not found:
        raise UserError(
            f"no checkpoint to continue from: nothing matches {root / pattern}. Train first, or give --ckpt_path a file"
        )
    # Runs of one name are ordered by number, others by time.
    newest = max(found, key=lambda path: (0, path.parts[-3]) if name is not None else (path.stat().st_mtime, ""))
    return newest.parent.parent


def run_of(checkpoint: Path) -> Path:
    """Return the run folder that a checkpoint file lies in."""
    return checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else checkpoint.parent


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "run"
