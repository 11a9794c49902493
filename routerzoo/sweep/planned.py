"""What a run's training will take, counted before it starts."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from routerzoo.callbacks.k_schedule import KSchedule
from routerzoo.functional.schedules import k_at
from routerzoo.moe.layer import inner_router, moe_layers
from routerzoo.sweep.processes import num_processes
from routerzoo.tasks.base import MoETask


@dataclass(frozen=True)
class PlannedTraining:
    """What a run's training will take.

    Args:
        k: experts per token, mean over the run and its MoE layers; None where there are none, or experts are mixed. Of
            routers that choose their own it is that of random tokens before training.
        takes_k: the routers have a k that the config sets.
        step_flops: operations of an optimizer step, three forward passes' worth.
        steps: of the run.
    """

    k: float | None
    takes_k: bool
    step_flops: float
    steps: int

    @property
    def flops(self) -> float:
        """Operations of the run."""
        return self.step_flops * self.steps


def planned_training(config: str) -> str:
    """Build what a config describes, without training it, and return its `PlannedTraining` as JSON.

    Empty where it cannot be known: the task is not routerzoo's, or the run has no end.
    """
    from routerzoo.cli import main as cli

    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    built: list[Any] = []

    class Reader(cli.RouterZooCLI):
        """Builds task and data, but no trainer."""

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            built.append(self)

        def _run_subcommand(self, subcommand: str) -> None:
            pass

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder) / "config.yaml"
        path.write_text(config, encoding="utf-8")
        with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
            cli.main(["fit", "--config", str(path)], cli=Reader)
        if not built or not isinstance(built[0].model, MoETask):
            return ""
        trainer = built[0].config_init["fit"]["trainer"]
        planned = _planned(built[0].model, built[0].datamodule, trainer)
    return "" if planned is None else json.dumps(asdict(planned))


def _planned(task: MoETask, data: Any, trainer: Any) -> PlannedTraining | None:
    steps = _steps(data, trainer)
    if steps is None:
        return None
    routers = [inner_router(layer) for layer in moe_layers(task)]
    top_k = [router.top_k for router in routers]
    task.eval_top_ks = [None]
    costs = task.costs()
    k = costs.experts_per_token
    takes_k = bool(routers) and all(r.max_top_k > 1 or r.spec.num_experts == 1 for r in routers)
    callbacks = trainer["callbacks"] if isinstance(trainer["callbacks"], Sequence) else [trainer["callbacks"]]
    for schedule in (callback for callback in callbacks if isinstance(callback, KSchedule)):
        if k is not None and takes_k:
            each = [k_at(step, steps, schedule.start, schedule.end, schedule.growth) for step in range(steps)]
            k += sum(each) / steps - sum(top_k) / len(top_k)
    examples = int(getattr(data, "batch_size", 1))
    with torch.no_grad():
        tokens = examples * task.eval().example()
    tokens *= int(trainer["accumulate_grad_batches"]) * num_processes(trainer)
    return PlannedTraining(k, takes_k, costs.training_flops(tokens, k, examples), steps)


def _steps(data: Any, trainer: Any) -> int | None:
    limits = []
    if (trainer["max_steps"] or -1) > 0:
        limits.append(int(trainer["max_steps"]))
    if (trainer["max_epochs"] or -1) > 0:
        data.prepare_data()
        data.setup("fit")
        batches = len(data.train_dataloader())
        limited = trainer["limit_train_batches"]
        if limited is not None:
            batches = min(batches, limited) if isinstance(limited, int) else int(batches * limited)
        limits.append(int(trainer["max_epochs"]) * -(-batches // int(trainer["accumulate_grad_batches"])))
    return min(limits, default=None)
