"""`StopOnNonFiniteLoss`: stop on a NaN or inf loss or gradient, and name the first layer that holds NaN or inf."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import final

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from routerzoo.callbacks.steps import steps_taken
from routerzoo.errors import UserError
from routerzoo.moe.layer import inner_router, moe_layers


@final
class StopOnNonFiniteLoss(Callback):
    """Stops training on a NaN or inf loss or gradient, before the optimizer step spreads it to all parameters.

    The error names the step, and the first MoE layer and parameter that hold NaN or inf, if any do. A finite loss can
    have an infinite gradient, where a probability underflows, for example. Under `16-mixed` precision the loss alone is
    checked: there the gradient scaler expects such gradients, and skips their steps.

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
        self._start()

    def _start(self) -> None:
        self.skipped = 0
        self._in_a_row, self._last_skipped = 0, -2
        self._skips_step = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the steps of an earlier run."""
        self._start()

    def _skipped_before(self, trainer: Trainer) -> int:
        """Return how many steps in a row were skipped right before this one."""
        return self._in_a_row if self._last_skipped >= steps_taken(trainer) - 1 else 0

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check the loss.

        Raises:
            UserError: it is NaN or inf, and the step is not to be skipped.
        """
        if trainer.global_step % self.every_n_steps or bool(loss.isfinite()):
            return
        skipped = self._skipped_before(trainer)
        if skipped < self.skip or self._last_skipped == steps_taken(trainer):
            self._skips_step = True
            return
        raise UserError(
            f"the loss is {float(loss.detach()):g} at step {trainer.global_step}{_after(skipped)}: {_cause(pl_module)}"
        )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Check the gradients; skip the step on all processes if those of one, or its loss, are NaN or inf.

        Raises:
            UserError: a gradient is NaN or inf, and the step is not to be skipped.
        """
        if trainer.global_step % self.every_n_steps:
            return
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        finite = scaled or _are_finite(p for group in optimizer.param_groups for p in group["params"])
        # Processes of a sharded model have different gradients; all stop, or all skip.
        broken = trainer.strategy.reduce_boolean_decision(self._skips_step or not finite, all=False)
        self._skips_step = False
        if not broken:
            return
        skipped, step = self._skipped_before(trainer), steps_taken(trainer)
        if self._last_skipped != step:  # several optimizers share a step
            if skipped >= self.skip:
                raise UserError(
                    f"the loss is finite at step {trainer.global_step}{_after(skipped)}, but a gradient is NaN or inf: "
                    f"{_first_broken_gradient(pl_module)}. The optimizer has not used it: try a smaller learning rate "
                    "or initial scale, or set skip to skip such steps"
                )
            self._in_a_row, self._last_skipped = skipped + 1, step
            self.skipped += 1
            rank_zero_warn(
                f"skipped step {trainer.global_step}: its loss or gradient is NaN or inf ({self.skipped} so far)"
            )
        # Without gradients nothing changes.
        optimizer.zero_grad(set_to_none=True)


def _after(skipped: int) -> str:
    return f", after {skipped} skipped steps" if skipped else ""


def _are_finite(parameters: Iterable[nn.Parameter]) -> bool:
    grads = [p.grad for p in parameters if p.grad is not None]
    local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    # The norm is the fastest to compute, but overflows for large entries.
    return bool(get_total_norm(local).isfinite()) or all(bool(grad.isfinite().all()) for grad in local)


def _cause(module: LightningModule) -> str:
    for name, parameter in _named_parameters(module):
        if not bool(torch.isfinite(parameter).all()):
            return f"{name} holds NaN or inf. Try a smaller learning rate"
    return "all parameters are finite, so the cause is this batch or the learning rate"


def _first_broken_gradient(module: LightningModule) -> str:
    for name, parameter in _named_parameters(module):
        if not _are_finite([parameter]):
            return f"the first is that of {name}"
    return "it is on another process"


def _named_parameters(module: LightningModule) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters with names for people, those of MoE layers first."""
    for index, layer in enumerate(moe_layers(module)):
        for name, parameter in layer.named_parameters():
            what = f"{type(inner_router(layer)).__name__}'s {name}" if name.startswith("router.") else name
            yield f"{what} of MoE layer {index}", parameter
    yield from module.named_parameters()
