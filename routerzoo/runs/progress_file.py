"""`ProgressFile`: progress of a run, in a file for other processes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, final

from lightning import Callback, LightningModule, Trainer

from routerzoo.runs.atomic import atomic_write
from routerzoo.tasks.base import MoETask

WRITE_SECONDS = 1.0


@final
class ProgressFile(Callback):
    """Writes step, total steps and the latest headline metric to a JSON file, about once a second.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._written = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the file."""
        now = time.monotonic()
        if not trainer.is_global_zero or now - self._written < WRITE_SECONDS or not isinstance(pl_module, MoETask):
            return
        self._written = now
        metric = trainer.callback_metrics.get(f"train/{pl_module.headline_metric}")
        progress = {
            "step": trainer.global_step,
            "total_steps": pl_module.total_steps,
            "metric": None if metric is None else float(metric),
        }
        atomic_write(self.path, json.dumps(progress))
