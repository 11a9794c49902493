"""Training steps, as Lightning's loggers count them."""

from __future__ import annotations

import math

from lightning import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler


def steps_taken(trainer: Trainer) -> int:
    """Return the steps taken so far: batches after which the optimizers stepped, however many optimizers there are.

    `trainer.global_step` counts the steps of all optimizers together.
    """
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def completes_step(trainer: Trainer) -> bool:
    """Whether the optimizers step after the current batch, instead of accumulating gradients."""
    return not trainer.fit_loop._should_accumulate()


def planned_steps(trainer: Trainer) -> int | None:
    """Return the steps that the run will take, None if it has no end. Call it once, when training starts.

    `trainer.estimated_stepping_batches` assumes the current accumulation of gradients for all epochs; under a
    `GradientAccumulationScheduler` this is the sum over epochs. `trainer.max_steps` limits the steps of all optimizers
    together, which are taken to step equally often.
    """
    estimated = trainer.estimated_stepping_batches
    if estimated in (math.inf, -1):
        return None
    scheduler = _schedule(trainer)
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    steps = int(estimated)
    if scheduler is not None and batches != math.inf and epochs not in (None, -1):
        steps = sum(math.ceil(batches / scheduler.get_accumulate_grad_batches(epoch)) for epoch in range(epochs))
    if trainer.max_steps == -1:
        return steps
    return min(steps, trainer.max_steps // max(len(trainer.optimizers), 1))


def accumulation(trainer: Trainer) -> dict[int, int]:
    """Return how many batches make a step, by the epoch from which that holds."""
    scheduler = _schedule(trainer)
    return {0: trainer.accumulate_grad_batches} if scheduler is None else dict(scheduler.scheduling)


def _schedule(trainer: Trainer) -> GradientAccumulationScheduler | None:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((c for c in callbacks if isinstance(c, GradientAccumulationScheduler)), None)
