"""`StopOnNonFiniteLoss`: stop on a NaN or inf loss, and name the first layer that holds NaN or inf."""

from __future__ import annotations

from typing import final

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from routerzoo.errors import UserError
from routerzoo.moe.layer import inner_router, moe_layers


@final
class StopOnNonFiniteLoss(Callback):
    """Stops training on a NaN or inf loss, before the optimizer step spreads it to all parameters.

    The error names the step, and the first MoE layer and parameter that hold NaN or inf, if any do.

    Args:
        every_n_steps: steps between checks. A check waits for the accelerator.
        skip: skip up to so many such steps in a row; 0 stops at the first.

    Raises:
        ValueError: `every_n_steps` below 1, `skip` below 0, or both `skip` and `every_n_steps` above 1.
    """

    def __init__(self, every_n_steps: int = 1, skip: int = 0) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        if skip < 0:
            raise ValueError(f"skip must be at least 0, got {skip}")
        if skip and every_n_steps > 1:
            raise ValueError(f"skip requires that every step is checked: leave out every_n_steps = {every_n_steps}")
        self.every_n_steps, self.skip = every_n_steps, skip
        self.skipped = 0
        self._in_a_row = 0
        self._skips_step = False

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check the loss.

        Raises:
            UserError: it is NaN or inf, and the step is not to be skipped.
        """
        if trainer.global_step % self.every_n_steps or bool(loss.isfinite()):
            return
        if self._in_a_row < self.skip:
            self._skips_step = True
            return
        after = f", after {self._in_a_row} skipped steps" if self._in_a_row else ""
        raise UserError(
            f"the loss is {float(loss.detach()):g} at step {trainer.global_step}{after}: {_cause(pl_module)}"
        )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Skip the step on all processes if the loss of one is NaN or inf: without gradients nothing changes."""
        if not self.skip:
            return
        skips = trainer.strategy.reduce_boolean_decision(self._skips_step, all=False)
        self._skips_step = False
        self._in_a_row = self._in_a_row + 1 if skips else 0
        if skips:
            self.skipped += 1
            rank_zero_warn(f"skipped step {trainer.global_step}: its loss is NaN or inf ({self.skipped} so far)")
            optimizer.zero_grad(set_to_none=True)


def _cause(module: LightningModule) -> str:
    for index, layer in enumerate(moe_layers(module)):
        for name, parameter in layer.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                what = f"{type(inner_router(layer)).__name__}'s {name}" if name.startswith("router.") else name
                return f"{what} of MoE layer {index} holds NaN or inf. Try a smaller learning rate"
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return f"{name} holds NaN or inf. Try a smaller learning rate"
    return "all parameters are finite, so the cause is this batch or the learning rate"
