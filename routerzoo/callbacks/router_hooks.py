"""`RouterHooks`: updates the routers of any `LightningModule` once per optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from routerzoo.moe.attach import RouterUpdates, attach
from routerzoo.moe.averaging import copy_router_state
from routerzoo.moe.layer import MoE, inner_router, moe_layers


@final
class RouterHooks(Callback):
    """Does for a `LightningModule` what `routerzoo.attach` does for a loop of one's own.

    Each MoE layer is updated with the steps of the optimizer that trains it; manual optimization and several optimizers
    work as automatic optimization does. Router state is copied to the averaged models that other callbacks hold
    (`EMAWeightAveraging`, `StochasticWeightAveraging`). The tasks of routerzoo have this callback already.

    Args:
        token_counts: int64 `[vocab_size]`, how often each token id occurs in the training split; by default what the
            data module's `token_counts()` returns, where it has that method.
    """

    def __init__(self, token_counts: Tensor | None = None) -> None:
        self.token_counts = token_counts
        self._updates: list[RouterUpdates] = []
        self._steps: list[int] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the optimizers; the number of steps is fixed from here on."""
        self._remove()
        total = trainer.estimated_stepping_batches
        total_steps = None if total == float("inf") else int(total)
        by_optimizer = list(_layers_by_optimizer(pl_module, trainer.optimizers))
        steps = self._steps if len(self._steps) == len(by_optimizer) else [0] * len(by_optimizer)
        for (optimizer, layers), step in zip(by_optimizer, steps, strict=True):
            counts = self._counts(trainer, layers) if step == 0 else None
            self._updates.append(attach(layers, optimizer, total_steps, step=step, token_counts=counts))
        self._copy_to_averaged_models(trainer, pl_module)

    def _counts(self, trainer: Trainer, layers: list[MoE]) -> Tensor | None:
        if self.token_counts is not None or not any(inner_router(layer).wants_token_counts for layer in layers):
            return self.token_counts
        counts = getattr(getattr(trainer, "datamodule", None), "token_counts", None)
        return None if counts is None else torch.as_tensor(counts())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Copy router state to averaged models, after these were updated."""
        self._copy_to_averaged_models(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy router state to averaged models, before these are evaluated."""
        self._copy_to_averaged_models(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Copy router state to averaged models, before these are saved."""
        self._copy_to_averaged_models(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach."""
        self._copy_to_averaged_models(trainer, pl_module)
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach."""
        self._remove()

    def _remove(self) -> None:
        self._steps = [updates.step for updates in self._updates] or self._steps
        while self._updates:
            self._updates.pop().remove()

    def _copy_to_averaged_models(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            for held in vars(callback).values():
                if isinstance(held, nn.Module) and held is not pl_module and next(moe_layers(held), None) is not None:
                    copy_router_state(pl_module, held)

    def state_dict(self) -> dict[str, Any]:
        """Return the steps taken with each optimizer."""
        return {"steps": [updates.step for updates in self._updates] or self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume the steps."""
        self._steps = list(state_dict["steps"])


def _layers_by_optimizer(module: LightningModule, optimizers: list[Optimizer]) -> Iterator[tuple[Optimizer, list[MoE]]]:
    """Yield each optimizer with the MoE layers whose parameters it has first."""
    left = list(moe_layers(module))
    for optimizer in optimizers:
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        own = [layer for layer in left if any(id(parameter) in trained for parameter in layer.parameters())]
        left = [layer for layer in left if layer not in own]
        if own:
            yield optimizer, own
