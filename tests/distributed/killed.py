"""Callbacks for runs that die, or are asked to."""

import os
import signal

from lightning import Callback


class KillAfter(Callback):
    """Kill the process after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step >= self.steps:
            os.kill(os.getpid(), signal.SIGKILL)


class AskedToEndInValidation(Callback):
    """Ask the process of one rank to end, in the middle of the validation after so many steps."""

    def __init__(self, steps: int, rank: int = 0) -> None:
        self.steps, self.rank = steps, rank

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if (trainer.global_step, batch_idx, trainer.global_rank) == (self.steps, 0, self.rank):
            os.kill(os.getpid(), signal.SIGTERM)
