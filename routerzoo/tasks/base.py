"""`MoETask`: what training a model with MoE layers has in common, whatever the domain."""
# Shape suffixes: E experts, V token ids.

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from routerzoo.errors import UserError
from routerzoo.losses import auxiliary_loss
from routerzoo.moe import moe_layers
from routerzoo.routing import RoutingContext
from routerzoo.tasks.optimization import WarmupCosine, parameter_groups

SchedulerFactory = Callable[[Optimizer, int], LRScheduler]


class MoETask(LightningModule, ABC):
    """Trains `net`, a model that returns its output and the context with its MoE layers' routings.

    The loss is the task's plus, for each MoE layer, each auxiliary loss times its coefficient. Coefficients are applied
    here and nowhere else. Routers are told when a step starts and when gradients are complete.

    A subclass is final and calls `save_hyperparameters` itself.

    Args:
        net: the model.
        optimizer: builds the optimiser from parameter groups.
        lr_scheduler: builds the learning-rate schedule from the optimiser and the number of steps.
        loss_weights: coefficient by auxiliary loss, instead of those that the router's authors use. `balance` and `z`
            can be had of any router with logits.
        eval_top_k: experts per token in validation, test and prediction; by default as in training.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable,
        lr_scheduler: SchedulerFactory,
        loss_weights: dict[str, float] | None,
        eval_top_k: int | None,
    ) -> None:
        super().__init__()
        self.net = net
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.loss_weights, self.eval_top_k = loss_weights, eval_top_k
        for layer in moe_layers(net):
            if eval_top_k is not None and not 1 <= eval_top_k <= layer.spec.num_experts:
                raise UserError(f"eval_top_k must be between 1 and {layer.spec.num_experts}, got {eval_top_k}")
        self._random_state: Tensor | None = None

    @abstractmethod
    def token_counts(self) -> Tensor | None:
        """Return how often each token id occurs in the training split, int64 `[V]`; None where there are no ids."""

    @property
    @abstractmethod
    def headline_metric(self) -> str:
        """Name of the metric that papers report, without the stage."""

    @abstractmethod
    def baseline(self, datamodule: Any) -> tuple[str, float] | None:
        """Return name and headline metric of what can be had on the validation split without a model, where known."""

    @property
    def total_steps(self) -> int:
        """Optimiser steps that the run will take.

        Raises:
            UserError: a run without end.
        """
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise UserError("the run has no end to plan for: set trainer.max_steps or trainer.max_epochs")
        return int(steps)

    def setup(self, stage: str) -> None:
        """Calibrate routers that want to know how frequent token ids are."""
        if stage == "fit" and any("token_ids" in layer.router.requires for layer in moe_layers(self.net)):
            counts_V = self.token_counts()
            for layer in moe_layers(self.net):
                if counts_V is not None:
                    layer.router.calibrate(counts_V)

    def auxiliary_losses(self, context: RoutingContext) -> dict[str, Tensor]:
        """Return each weighted auxiliary loss, its coefficient applied, summed over layers (as Switch does).

        Raises:
            UserError: a coefficient for a loss that the router does not have.
        """
        losses: dict[str, Tensor] = {}
        for layer in moe_layers(self.net):
            routing = context.routings[layer.spec.layer]
            weights = layer.router.default_loss_weights if self.loss_weights is None else self.loss_weights
            for name, weight in weights.items():
                if weight == 0:
                    continue
                try:
                    loss = auxiliary_loss(name, routing, context) * weight
                except ValueError as error:
                    raise UserError(f"loss_weights of {type(layer.router).__name__}: {error}") from None
                losses[name] = losses[name] + loss if name in losses else loss
        return losses

    def combined_loss(self, task_loss: Tensor, context: RoutingContext) -> Tensor:
        """Add the auxiliary losses to the task's, and log them."""
        auxiliary = self.auxiliary_losses(context)
        if auxiliary:
            self.log_dict({f"train/{name}_loss": loss.detach() for name, loss in auxiliary.items()})
        for loss in auxiliary.values():
            task_loss = task_loss + loss
        return task_loss

    @property
    def progress(self) -> dict[str, int]:
        """Step and total steps, as the routers see them."""
        return {"step": self.global_step, "total_steps": self.total_steps}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Tell the routers that a step starts."""
        for layer in moe_layers(self.net):
            layer.router.on_step_start(self.global_step, self.total_steps)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Tell the routers that the gradients are complete."""
        for layer in moe_layers(self.net):
            layer.router.before_optimizer_step()

    def configure_optimizers(self) -> Any:
        """Build optimiser and schedule, which advances by the step."""
        optimizer = self.optimizer(parameter_groups(self.net))
        scheduler = self.lr_scheduler(optimizer, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @contextmanager
    def evaluation_top_k(self) -> Iterator[None]:
        """Route with `eval_top_k` for a while."""
        layers = list(moe_layers(self.net))
        trained = [layer.router.top_k for layer in layers]
        try:
            for layer in layers if self.eval_top_k is not None else ():
                assert self.eval_top_k is not None
                layer.router.top_k = self.eval_top_k
            yield
        finally:
            for layer, top_k in zip(layers, trained, strict=True):
                layer.router.top_k = top_k

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the random state: dropout goes on as it would have."""
        checkpoint["random_state"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the random state up when training starts."""
        self._random_state = checkpoint.get("random_state")

    def on_train_start(self) -> None:
        """Restore the random state of a resumed run."""
        if self._random_state is not None:
            torch.set_rng_state(self._random_state.cpu())
            self._random_state = None


def make_loadable(*factories: Any) -> None:
    """Let checkpoints that hold these classes, or partial applications of them, be read with `weights_only=True`.

    A module built in Python keeps the classes it was given among its hyper-parameters, where reading with
    `weights_only=True` refuses what it does not know.
    """
    allowed: list[Any] = [functools.partial]
    for factory in factories:
        while isinstance(factory, functools.partial):
            factory = factory.func
        if isinstance(factory, type):
            allowed.append(factory)
    torch.serialization.add_safe_globals(allowed)


make_loadable(torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, WarmupCosine)
