"""A callback for runs that die."""

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
