"""`KSchedule`: change k over training."""

from __future__ import annotations

import sys
from typing import Any, final

from lightning import Callback, LightningModule, Trainer

from routerzoo.callbacks.steps import planned_steps, steps_taken
from routerzoo.errors import UserError
from routerzoo.functional.schedules import Growth, k_at
from routerzoo.moe.layer import inner_router, moe_layers


@final
class KSchedule(Callback):
    """Sets `top_k` of every router before each training step; see `routerzoo.functional.schedules.k_at`.

    The length of the run is read once, when training starts. The schedule depends on the step alone, so that a resumed
    run continues it; checkpoints hold the current k, a buffer of each router.

    Args:
        start: k at the first step.
        end: k at the last step.
        growth: how k grows.

    Raises:
        ValueError: k below 1, or an unknown growth.
    """

    def __init__(self, start: int, end: int, growth: Growth = "linear") -> None:
        k_at(0, 1, start, end, growth)  # checks the arguments
        self.start, self.end, self.growth = start, end, growth
        self._total_steps = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plan the run.

        Raises:
            UserError: k exceeds what a router can do, or the run has no end.
        """
        largest = max(self.start, self.end)
        for index, layer in enumerate(moe_layers(pl_module)):
            router = inner_router(layer)
            if largest > router.max_top_k:
                raise UserError(
                    f"KSchedule sets k to {largest}, but {type(router).__name__} of MoE layer {index} can do "
                    f"{router.max_top_k} at most"
                )
        total_steps = planned_steps(trainer)
        if total_steps is None:
            raise UserError("KSchedule needs to know when the run ends: set trainer.max_steps or trainer.max_epochs")
        self._total_steps = total_steps
        if (dynamo := sys.modules.get("torch._dynamo")) is not None:
            # A model that was compiled takes k for a number that may change, and is not compiled again for each.
            dynamo.config.allow_unspec_int_on_nn_module = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set k."""
        k = k_at(steps_taken(trainer), self._total_steps, self.start, self.end, self.growth)
        for layer in moe_layers(pl_module):
            router = inner_router(layer)
            if router.top_k != k:
                router.top_k = k
        pl_module.log("train/top_k", float(k))
