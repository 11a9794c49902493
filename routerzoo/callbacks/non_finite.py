"""`StopOnNonFiniteLoss`: a run ends when its loss is no number, and says where that began."""

from __future__ import annotations

from typing import final

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from routerzoo.errors import UserError
from routerzoo.moe.layer import moe_layers


@final
class StopOnNonFiniteLoss(Callback):
    """Stops training at a loss that is infinite or no number, before the optimiser writes it into every parameter.

    The error names the step, and the first MoE layer and parameter that are broken already, if any are.

    Args:
        every_n_steps: how often to look. Looking waits for the accelerator.
        skip: leave such a step out and go on, so many times in a row at most; 0 stops at the first.
    """

    def __init__(self, every_n_steps: int = 1, skip: int = 0) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        if skip < 0:
            raise ValueError(f"skip must be at least 0, got {skip}")
        if skip and every_n_steps > 1:
            raise ValueError("steps can only be skipped where every one is looked at: leave every_n_steps out")
        self.every_n_steps, self.skip = every_n_steps, skip
        self.skipped = 0
        self._in_a_row = 0
        self._broken = False

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Look at the loss.

        Raises:
            UserError: it is infinite or no number, and the step is not to be skipped.
        """
        if trainer.global_step % self.every_n_steps or bool(loss.isfinite()):
            return
        if self._in_a_row < self.skip:
            self._broken = True
            return
        before = f", after {self._in_a_row} steps that were skipped" if self._in_a_row else ""
        raise UserError(
            f"the loss is {float(loss.detach()):g} at step {trainer.global_step}{before}: {_where(pl_module)}"
        )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Leave the step out on all processes if the loss of one was broken: without gradients nothing changes."""
        if not self.skip:
            return
        broken = trainer.strategy.reduce_boolean_decision(self._broken, all=False)
        self._broken = False
        self._in_a_row = self._in_a_row + 1 if broken else 0
        if broken:
            self.skipped += 1
            rank_zero_warn(f"step {trainer.global_step} is left out: its loss is no number ({self.skipped} so far)")
            optimizer.zero_grad(set_to_none=True)


def _where(module: LightningModule) -> str:
    for layer in moe_layers(module):
        for name, parameter in layer.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                what = f"{type(layer.router).__name__}'s {name}" if name.startswith("router.") else name
                return f"{what} of MoE layer {layer.spec.layer} is no longer finite. Try a smaller learning rate"
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return f"{name} is no longer finite. Try a smaller learning rate"
    return "all parameters are finite, so this batch, or a learning rate that is too large, did it"
