"""`RunCheckpoint`: checkpoints of a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


@final
class RunCheckpoint(ModelCheckpoint):
    """Keeps one checkpoint under a fixed name, in a folder that a resumed run writes into again.

    Args:
        folder: where it lies.
        filename: its name without suffix.
        monitor: keep the best by this metric; without one, the latest.
        mode: `min` or `max`.
        every_n_train_steps: save the latest this often, beside at the end.
    """

    def __init__(
        self,
        folder: str,
        filename: str,
        monitor: str | None = None,
        mode: str = "min",
        every_n_train_steps: int | None = None,
    ) -> None:
        super().__init__(
            dirpath=folder,
            filename=filename,
            monitor=monitor,
            mode=mode,
            every_n_train_steps=every_n_train_steps,
            # The next checkpoint takes the name of the one before.
            enable_version_counter=False,
            auto_insert_metric_name=False,
            # The metric is validation's.
            save_on_train_epoch_end=False if monitor is not None else None,
        )

    @property
    def state_key(self) -> str:
        """Name of its state in checkpoints: the same however often it saves."""
        return self._generate_state_key(monitor=self.monitor)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best score up, also where the run's folder has moved since."""

        def here(path: str) -> str:
            return str(Path(str(self.dirpath)) / Path(path).name) if path else path

        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        moved = {
            **state_dict,
            **{name: here(state_dict[name]) for name in paths},
            "best_k_models": {here(path): score for path, score in state_dict["best_k_models"].items()},
            "dirpath": self.dirpath,
        }
        super().load_state_dict(moved)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the latest at intervals, and the last step as what it is: a step within an epoch."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.monitor is None and trainer.global_step == trainer.max_steps:
            self._save_unless_saved(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end, where it is the latest that is kept."""
        if self.monitor is None:
            self._save_unless_saved(trainer)

    def _save_unless_saved(self, trainer: Trainer) -> None:
        if trainer.global_step > self._last_global_step_saved and not self._should_skip_saving_checkpoint(trainer):
            self._save_checkpoint(trainer, str(Path(str(self.dirpath)) / f"{self.filename}.ckpt"))

    def _ModelCheckpoint__warn_if_dir_not_empty(self, dirpath: Any) -> None:
        # Lightning warns of a folder that holds checkpoints; here that is what resuming means.
        pass
