"""`RouterHooks`: updates the routers of any `LightningModule` once per optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer

from routerzoo.callbacks.steps import planned_steps, steps_taken
from routerzoo.moe.attach import RouterUpdates, attach
from routerzoo.moe.averaging import copy_router_state
from routerzoo.moe.layer import MoE, inner_router, moe_layers

AVERAGING = (WeightAveraging, StochasticWeightAveraging)
"""Lightning's callbacks that average weights."""


@final
class RouterHooks(Callback):
    """Does for a `LightningModule` what `routerzoo.attach` does for a loop of one's own.

    Each MoE layer is updated with the steps of the optimizer that trains it (the first one, where none does); manual
    optimization and several optimizers work as automatic optimization does. Router state is copied to the averaged
    models of Lightning's `WeightAveraging` (`EMAWeightAveraging` and others) and `StochasticWeightAveraging`. The tasks
    of routerzoo have this callback already.

    Args:
        token_counts: int64 `[vocab_size]`, how often each token id occurs in the training split; by default what the
            `token_counts()` of the module, or else of its data module, returns, where one has that method.
    """

    def __init__(self, token_counts: Tensor | None = None) -> None:
        self.token_counts = token_counts
        self._updates: list[RouterUpdates] = []
        self._steps: list[int] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the optimizers; the number of steps is fixed from here on."""
        self._detach()
        total_steps = planned_steps(trainer)
        by_optimizer = list(_layers_by_optimizer(pl_module, trainer.optimizers))
        if trainer.global_step == 0:  # the callback may have been in another fit
            self._steps = []
        if len(self._steps) != len(by_optimizer):  # a fit that is resumed with this callback, and began without it
            self._steps = [steps_taken(trainer)] * len(by_optimizer)
        for (optimizer, layers), step in zip(by_optimizer, self._steps, strict=True):
            counts = self._counts(trainer, pl_module, layers) if step == 0 else None
            self._updates.append(attach(layers, optimizer, total_steps, step=step, token_counts=counts))
        self._copy_to_averaged_models(trainer, pl_module)

    def _counts(self, trainer: Trainer, pl_module: LightningModule, layers: list[MoE]) -> Tensor | None:
        if self.token_counts is not None or not any(inner_router(layer).wants_token_counts for layer in layers):
            return self.token_counts
        for source in (pl_module, getattr(trainer, "datamodule", None)):
            counts = getattr(source, "token_counts", None)
            if callable(counts):
                found = counts()
                return None if found is None else torch.as_tensor(found)
        return None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Copy router state to averaged models, after these were updated."""
        self._copy_to_averaged_models(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy router state to averaged models, before these are evaluated."""
        self._copy_to_averaged_models(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Copy router state to averaged models, whose tensors are about to be saved."""
        self._copy_to_averaged_models(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach."""
        self._copy_to_averaged_models(trainer, pl_module)
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach."""
        self._detach()

    def _detach(self) -> None:
        self._steps = [updates.step for updates in self._updates] or self._steps
        while self._updates:
            self._updates.pop().remove()

    def _copy_to_averaged_models(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for averaged in averaged_models(trainer):
            copy_router_state(pl_module, averaged)

    def state_dict(self) -> dict[str, Any]:
        """Return the steps taken with each optimizer."""
        return {"steps": [updates.step for updates in self._updates] or self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume the steps."""
        self._steps = list(state_dict["steps"])


def averaged_models(trainer: Trainer | None) -> Iterator[nn.Module]:
    """Yield the averages of the trained model that Lightning's callbacks hold."""
    for callback in () if trainer is None else trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, AVERAGING) and callback._average_model is not None:
            yield callback._average_model


def _layers_by_optimizer(module: LightningModule, optimizers: list[Optimizer]) -> Iterator[tuple[Optimizer, list[MoE]]]:
    """Yield each optimizer with the MoE layers that it trains; the first one also with those that none does."""
    if not optimizers:
        return
    owner: dict[int, int] = {}
    for number, optimizer in enumerate(optimizers):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                owner.setdefault(id(parameter), number)
    layers: dict[int, list[MoE]] = {}
    for layer in moe_layers(module):
        number = min((owner[id(p)] for p in layer.parameters() if id(p) in owner), default=0)
        layers.setdefault(number, []).append(layer)
    for number in sorted(layers):
        yield optimizers[number], layers[number]
