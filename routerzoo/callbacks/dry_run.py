"""Run a module's validation step on one batch without side effects."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric

from routerzoo.errors import UserError
from routerzoo.routing import RoutingContext


def first_validation_batch(trainer: Trainer, module: LightningModule) -> Any:
    """Return the first batch of the first validation loader.

    Raises:
        UserError: there is no validation loader, or no validation step.
    """
    with _without_side_effects(trainer, module):
        if trainer.val_dataloaders is None:
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        loaders = [loader for loader in tree_leaves(trainer.val_dataloaders) if loader is not None]
        if not loaders or not is_overridden("validation_step", module):
            raise UserError(
                f"there is no validation batch to follow: give {type(module).__name__} a validation_step and the "
                "trainer validation data, and leave limit_val_batches above 0"
            )
        return next(iter(loaders[0]))


def run_validation_step(trainer: Trainer, module: LightningModule, batch: Any) -> None:
    """Run the validation step as a validation would: in evaluation mode, in the trainer's precision.

    Nothing is logged. Metrics, random states, modes and the module's lists and dicts are afterwards as they were.
    """
    with _without_side_effects(trainer, module):
        # Routings of one run must not appear in the next.
        batch = apply_to_collection(batch, RoutingContext, RoutingContext.new_pass)
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.strategy.batch_to_device(module.on_before_batch_transfer(batch, 0))
        indices = [0] if is_param_in_hook_signature(module.validation_step, "batch_idx", min_args=2) else []
        indices += [0] if len(tree_leaves(trainer.val_dataloaders)) > 1 else []
        trainer.strategy.validation_step(batch, *indices)


@contextmanager
def _without_side_effects(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    stage = trainer.state.stage
    modes = [(child, child.training) for child in module.modules()]
    metrics = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, Metric)
    ]
    # Steps collect their outputs in lists and dicts, for the end of the epoch; `log` may be set on the instance.
    attributes = vars(module).items()
    kept = {n: value for n, value in attributes if n == "log" or (n[0] != "_" and type(value) in (list, dict))}
    try:
        trainer.state.stage = RunningStage.VALIDATING
        module.eval()
        for parent, name, metric in metrics:
            setattr(parent, name, _fresh(metric))
        vars(module).update({name: copy.copy(value) for name, value in kept.items()})
        vars(module)["log"] = lambda *args, **kwargs: None
        with isolate_rng(), torch.no_grad():
            yield
    finally:
        vars(module).pop("log", None)
        vars(module).update(kept)
        for parent, name, metric in metrics:
            setattr(parent, name, metric)
        for child, training in modes:
            child.training = training
        trainer.state.stage = stage


def _fresh(metric: Metric) -> Metric:
    copied = copy.deepcopy(metric)
    copied.reset()
    return copied
