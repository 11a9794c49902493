"""`KSchedule`: the number of active experts grows over training."""

from __future__ import annotations

from typing import Any, final

from lightning import Callback, LightningModule, Trainer

from routerzoo.errors import UserError
from routerzoo.functional.schedules import Growth, k_at
from routerzoo.moe.layer import moe_layers


@final
class KSchedule(Callback):
    """Sets `top_k` of every router before each training step; see `routerzoo.functional.schedules.k_at`.

    It is a function of the step alone, so that a resumed run goes on as it was. The last k is part of the checkpoint.

    Args:
        start: k at the first step.
        end: k at the last step.
        growth: how k grows.
    """

    def __init__(self, start: int, end: int, growth: Growth = "linear") -> None:
        k_at(0, 1, start, end, growth)  # refuses bad values now
        self.start, self.end, self.growth = start, end, growth

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a k that will be too large now, not in the middle of the run.

        Raises:
            UserError: the growth goes beyond what a router can do.
        """
        for layer in moe_layers(pl_module):
            largest, router = max(self.start, self.end), layer.router
            if largest > router.max_top_k:
                raise UserError(
                    f"KSchedule grows k to {largest}, but {type(router).__name__} of MoE layer "
                    f"{layer.spec.layer} can do {router.max_top_k} at most"
                )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set k."""
        k = k_at(trainer.global_step, int(trainer.estimated_stepping_batches), self.start, self.end, self.growth)
        for layer in moe_layers(pl_module):
            if layer.router.top_k != k:
                layer.router.top_k = k
        pl_module.log("train/top_k", float(k))
