"""`FiniteLoss`: a run ends when its loss is no number, and says where that began."""

from __future__ import annotations

from typing import final

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from routerzoo.errors import UserError
from routerzoo.moe import moe_layers


@final
class FiniteLoss(Callback):
    """Stops training at a loss that is infinite or no number, before the optimiser writes it into every parameter.

    The error names the step, and the first MoE layer and parameter that are broken already, if any are.

    Args:
        every_n_steps: how often to look. Looking waits for the accelerator.
    """

    def __init__(self, every_n_steps: int = 1) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Look at the loss.

        Raises:
            UserError: it is infinite or no number.
        """
        if trainer.global_step % self.every_n_steps or bool(loss.isfinite()):
            return
        raise UserError(f"the loss is {float(loss.detach()):g} at step {trainer.global_step}: {_where(pl_module)}")


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
