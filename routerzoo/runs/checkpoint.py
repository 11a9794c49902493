"""`RunCheckpoint`: checkpoints of a run folder."""

from __future__ import annotations

import contextlib
import copy
import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, final

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from routerzoo.runs.final_validation import is_last_step

TERMINATED = 143
"""Exit code of a run that SIGTERM stopped, as shells report it."""
SAVE_SECONDS = 60.0
"""Time after which the latest is saved, whatever the step."""
SAVE_SHARE = 20
"""So many times as long as saving takes lies between two saves by time."""


class StopSignal(SIGTERMException):
    """A signal has ended the run at a step that is saved.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)  # as shells report it
        self.number = number


@final
class RunCheckpoint(ModelCheckpoint):
    """Keeps one checkpoint under a fixed name, which a resumed run overwrites.

    The latest is saved once a step is trained, logged and validated: at intervals, after the first step, after each
    validation, and once a minute, so that a run that is killed loses little. On SIGTERM and on Ctrl-C the run finishes
    its step, saves it, and exits; a second Ctrl-C ends it at once.

    Args:
        folder: of the checkpoint.
        filename: its name without suffix.
        monitor: keep the best by this metric; without one, the latest.
        mode: `min` or `max`.
        every_n_train_steps: steps between saves of the latest, which is saved at the end too.
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
        self._steps = 0
        self._signal: int | None = None
        self._handler: Any = None
        self._validated = False
        self._saved_at = self._pause = 0.0

    @property
    def state_key(self) -> str:
        """Name of the state in checkpoints: the same whatever the interval of saves."""
        return self._generate_state_key(monitor=self.monitor)

    @property
    def saved_step(self) -> int:
        """Step of the checkpoint that this run has saved last, 0 for none."""
        return int(self._last_global_step_saved)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score, also where the run's folder was moved."""

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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hook into the end of a step, for which Lightning has no hook."""
        super().setup(trainer, pl_module, stage)
        if self.monitor is not None or stage != "fit":
            return
        loop: Any = trainer.fit_loop.epoch_loop
        inner = type(loop).on_advance_end  # of the class: this is called before every fit of a trainer

        def on_advance_end(data_fetcher: Any) -> None:
            self._at_step_end(trainer, functools.partial(inner, loop, data_fetcher))

        loop.on_advance_end = on_advance_end

        def on_sigterm(number: Any, frame: Any) -> None:
            launcher = trainer.strategy.launcher
            if launcher is not None and self._signal is None:
                launcher.kill(number)
            self._signal = number
            if trainer.sanity_checking:  # there is nothing to save
                raise StopSignal(number)

        # Lightning's handler broadcasts amid other collectives, and each process stops where it is. Here they agree at
        # the end of a step.
        self._signal = None
        signals: Any = trainer._signal_connector
        signals._sigterm_notifier_fn = on_sigterm

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count optimizer steps from where a resumed run continues, and wait for Ctrl-C."""
        super().on_train_start(trainer, pl_module)
        self._steps, self._validated = trainer.global_step, False
        self._saved_at, self._pause = time.monotonic(), SAVE_SECONDS
        # Before, there is nothing to save.
        if self.monitor is None and threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._on_interrupt)

    def _on_interrupt(self, number: int, frame: Any) -> None:
        if self._signal is not None:
            raise KeyboardInterrupt
        self._signal = number

    def _stop_waiting(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave Ctrl-C to who had it before, unless it is what has ended the run: more of it must not disturb."""
        super().on_exception(trainer, pl_module, exception)
        if not isinstance(exception, KeyboardInterrupt):
            self._stop_waiting()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best; the latest is saved at the end of the step."""
        super().on_validation_end(trainer, pl_module)
        self._validated = not trainer.sanity_checking

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save nothing yet: the step's metrics are not logged, and validation may follow.

        A run that is killed in between, and resumes from here, would lack both.
        """

    def _at_step_end(self, trainer: Trainer, log_and_validate: Callable[[], None]) -> None:
        steps_before = self._steps
        validation: Any = trainer.fit_loop.epoch_loop.val_loop
        validated_before = copy.deepcopy(validation.batch_progress)
        log_and_validate()
        self._steps = trainer.global_step
        if self._steps == steps_before:  # gradients are accumulated
            return
        due = self._validated or steps_before == 0 or self._steps == trainer.max_steps
        due = due or self._steps % max(self._every_n_train_steps, 1) == 0
        stops, late = self._signal is not None, time.monotonic() - self._saved_at >= self._pause
        late = late or is_last_step(trainer)  # once the epoch is over, its loops would not resume in its middle
        # All processes or none: they write a checkpoint together.
        asked = trainer.strategy.reduce_boolean_decision(stops or late, all=False)
        if due or asked:
            with _as_in_on_train_batch_end(trainer, validated_before):
                self._save_unless_saved(trainer)
            self._validated = False
        if asked and trainer.strategy.reduce_boolean_decision(stops, all=False):
            raise StopSignal(self._signal or signal.SIGTERM)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end, where the latest is kept."""
        if self.monitor is None:
            self._save_unless_saved(trainer)
        self._stop_waiting()

    def _save_unless_saved(self, trainer: Trainer) -> None:
        if trainer.global_step > self._last_global_step_saved and not self._should_skip_saving_checkpoint(trainer):
            start = time.monotonic()
            self._save_checkpoint(trainer, str(Path(str(self.dirpath)) / f"{self.filename}.ckpt"))
            self._saved_at = time.monotonic()
            self._pause = max(SAVE_SECONDS, SAVE_SHARE * (self._saved_at - start))

    def _ModelCheckpoint__warn_if_dir_not_empty(self, dirpath: Any) -> None:
        # Lightning warns of a folder that holds checkpoints; a resumed run's does.
        pass


@contextlib.contextmanager
def _as_in_on_train_batch_end(trainer: Trainer, validated_before: Any) -> Iterator[None]:
    """Count batches as Lightning's loops do in that hook, the state that they resume from."""
    loop: Any = trainer.fit_loop.epoch_loop
    validated, loop.val_loop.batch_progress = loop.val_loop.batch_progress, validated_before
    counts = (loop.batch_progress.total, loop.batch_progress.current)
    loop._batches_that_stepped -= 1
    for count in counts:
        count.completed -= 1
    try:
        yield
    finally:
        loop.val_loop.batch_progress = validated
        loop._batches_that_stepped += 1
        for count in counts:
            count.completed += 1
