"""`FinalValidation`: validate at the last step of a run."""

from __future__ import annotations

from typing import Any, final

from lightning import Callback, LightningModule, Trainer


@final
class FinalValidation(Callback):
    """Validates at the last step, whatever the interval, so that every run has a best checkpoint and results."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Widen the loop's decision to validate, for which Lightning has no hook."""
        if stage != "fit":
            return
        loop: Any = trainer.fit_loop.epoch_loop
        inner = type(loop)._should_check_val_fx  # of the class: this is called before every fit of a trainer

        def should_validate(data_fetcher: Any) -> bool:
            # Before its first step, a resumed loop asks whether the step that it resumes from was validated.
            ends = not loop.val_loop.restarting and trainer.enable_validation and is_last_step(trainer)
            return bool(inner(loop, data_fetcher)) or ends

        loop._should_check_val_fx = should_validate


def is_last_step(trainer: Trainer) -> bool:
    """Whether a run ends with the step that it has just taken: by a limit, or because something has stopped it."""
    loop = trainer.fit_loop.epoch_loop
    if 0 <= trainer.max_steps <= trainer.global_step or (trainer.should_stop and trainer.fit_loop._can_stop_early):
        return True
    epochs = trainer.max_epochs
    return epochs not in (None, -1) and trainer.current_epoch + 1 >= epochs and loop._num_ready_batches_reached()
