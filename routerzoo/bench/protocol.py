"""`Protocol`: which runs compare routers fairly; `Cell`: those of one router in one task, tuned and then final."""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from routerzoo.bench.choices import RouterChoice
from routerzoo.bench.registry import task_class
from routerzoo.bench.rows import Row, Stage
from routerzoo.bench.run import Run
from routerzoo.bench.task import BenchTask
from routerzoo.errors import UserError
from routerzoo.moe.layer import NonCausalRouterError
from routerzoo.router import UnmetRequirementError
from routerzoo.sweep.tuning import failures_and_mean

TUNING_SEED = 1000
"""The first seed of tuning; final seeds begin at 0."""

Budget = Literal["steps", "flops"]
BUDGET_ROUTER = "LinearRouter"
"""Whose training FLOPs all routers get, where budgets are in FLOPs."""

Rows = Mapping[tuple[Any, ...], Row]


@dataclass(frozen=True)
class Protocol:
    """How every router, and every control, is tuned and run. All draws of a run follow from its seed.

    Tuning is successive halving: each learning rate with each auxiliary weight for half of the steps, then the better
    half of these for all of them, on tuning seeds; the lowest mean loss is chosen. Final runs have fresh seeds.

    Args:
        seeds: final runs.
        tuning_seeds: runs of each setting; 0 takes the first learning rate and the published auxiliary weights.
        lrs: peak learning rates.
        aux_scales: factors on the published coefficients of auxiliary losses, for routers that have any.
        steps: optimizer steps; by default those of the task.
        budget: `flops` gives each router and control as many steps as take the linear gate's training FLOPs.
    """

    seeds: int = 20
    tuning_seeds: int = 2
    lrs: tuple[float, ...] = (0.03, 0.01, 0.1)
    aux_scales: tuple[float, ...] = (1.0, 0.1)
    steps: int | None = None
    budget: Budget = "steps"

    def text(self) -> str:
        """Return what a folder's runs have in common; the number of final seeds may grow."""
        told = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "seeds"}
        if self.budget == "steps":
            del told["budget"]
        return json.dumps(told, indent=2) + "\n"


@dataclass(frozen=True)
class Job:
    """One run, as it is handed to a worker.

    Args:
        task: name of the task, or the path of its file.
        choice: the router.
        stage: see `Row`; likewise the arguments that follow.
    """

    task: str
    choice: RouterChoice
    stage: Stage
    seed: int
    steps: int
    lr: float
    aux_scale: float
    code: str
    settings: str

    def row(self, **measured: Any) -> Row:
        """Return the run's row."""
        own = {name: getattr(self, name) for name in ("stage", "seed", "steps", "lr", "aux_scale", "code", "settings")}
        return Row(task=task_class(self.task).name, router=self.choice.label, **own, **measured)


@dataclass(frozen=True)
class Cell:
    """One router in one task.

    Args:
        task: name of the task, or the path of its file.
        choice: the router.
        protocol: how it is tuned and run.
        has_losses: whether the router has auxiliary losses, whose weight is tuned too.
        code: version of the sources.
        settings: digest of the task and the router.
        steps: of a final run.
    """

    task: str
    choice: RouterChoice
    protocol: Protocol
    has_losses: bool
    code: str
    settings: str
    steps: int

    @property
    def num_runs(self) -> int:
        """How many runs the cell is in all."""
        protocol = self.protocol
        settings = len(protocol.lrs) * (len(protocol.aux_scales) if self.has_losses else 1)
        return protocol.tuning_seeds * (settings + math.ceil(settings / 2)) + protocol.seeds

    def jobs(self, rows: Rows) -> list[Job]:
        """Return the runs that are to be made next, given those that have been; none where all have."""
        best = self.best_setting(rows)
        if isinstance(best, list):
            return best
        return [] if best is None else self._missing("final", range(self.protocol.seeds), self.steps, [best], rows)

    def given_up(self, rows: Rows) -> list[Row]:
        """Return the failed rows of the final runs that are not made, since no tuning run of a stage finished."""
        if self.best_setting(rows) is not None:
            return []
        own = task_class(self.task).name, self.choice.label, "tuning"
        why = next(row.reason for row in rows.values() if row.key[:3] == own and row.status == "failed")
        first = self.protocol.lrs[0], 1.0
        jobs = self._missing("final", range(self.protocol.seeds), self.steps, [first], rows)
        return [job.row(status="failed", reason=f"not made, since all tuning runs failed: {why}") for job in jobs]

    def best_setting(self, rows: Rows) -> tuple[float, float] | list[Job] | None:
        """Return the learning rate and auxiliary scale of final runs, or the tuning runs that are to be made first.

        None where all tuning runs of a stage failed.
        """
        protocol = self.protocol
        scales = protocol.aux_scales if self.has_losses and protocol.tuning_seeds else (1.0,)
        settings = [(lr, scale) for lr in protocol.lrs for scale in scales]
        if not protocol.tuning_seeds:
            return settings[0]
        seeds = range(TUNING_SEED, TUNING_SEED + protocol.tuning_seeds)
        for steps in (max(self.steps // 2, 1), self.steps):
            if missing := self._missing("tuning", seeds, steps, settings, rows):
                return missing
            losses = {setting: self._tuning_losses(seeds, steps, setting, rows) for setting in settings}
            if not any(map(math.isfinite, itertools.chain(*losses.values()))):
                return None
            settings.sort(key=lambda setting: failures_and_mean(losses[setting]))
            settings = settings[: math.ceil(len(settings) / 2)]
        return settings[0]

    def _missing(
        self, stage: Stage, seeds: range, steps: int, settings: list[tuple[float, float]], rows: Rows
    ) -> list[Job]:
        name = task_class(self.task).name
        return [
            Job(self.task, self.choice, stage, seed, steps, *setting, self.code, self.settings)
            for seed in seeds
            for setting in settings
            if (name, self.choice.label, stage, seed, steps, *setting) not in rows
        ]

    def _tuning_losses(self, seeds: range, steps: int, setting: tuple[float, float], rows: Rows) -> list[float]:
        """Return the losses of a setting by seed; inf where a run failed."""
        name = task_class(self.task).name
        found = [rows[name, self.choice.label, "tuning", seed, steps, *setting].loss for seed in seeds]
        return [math.inf if loss is None else loss for loss in found]


def make_cell(task: str, choice: RouterChoice, protocol: Protocol, code: str, *, is_safe: bool = True) -> Cell | Row:
    """Return a router's cell, or the row that says why it cannot do the task.

    Args:
        task: name of the task, or the path of its file.
        choice: the router.
        protocol: how it is tuned and run.
        code: version of the installed sources; a digest of those that are not part of it is added.
        is_safe: whether to build the router here, where it would take the whole command with it.
    """
    cls = task_class(task)
    steps = protocol.steps or cls.steps
    code = "+".join([code, *filter(None, (source_digest(cls), source_digest(choice.cls)))])
    settings = settings_digest(cls, choice)
    if not is_safe:  # its runs fail, and their rows say why
        return Cell(task, choice, protocol, False, code, settings, steps)
    try:
        run = Run(cls(0, steps), choice, 0.0)
    except UnmetRequirementError as error:
        reason = f"{error.router} requires {' and '.join(sorted(error.missing))}, which the task does not provide"
    except NonCausalRouterError:
        reason = f"{choice.cls.__name__} is not causal in evaluation: its choices depend on later tokens"
    except ValueError as error:  # it does not come in these sizes
        reason = " ".join(str(error).split())
    except Exception:  # its runs fail, and their rows say why
        return Cell(task, choice, protocol, False, code, settings, steps)
    else:
        if protocol.budget == "flops":
            steps = _matched_steps(run, steps, task)
        return Cell(task, choice, protocol, bool(run.aux_weights), code, settings, steps)
    job = Job(task, choice, "final", 0, steps, protocol.lrs[0], 1.0, code, settings)
    return job.row(status="not applicable", reason=reason)


def _matched_steps(run: Run, steps: int, task: str) -> int:
    """Return as many steps as take the training FLOPs of the linear gate, both counted before training."""
    operations = steps * _flops_of_budget(task)
    try:
        return max(round(operations / run.flops()), 1)
    except Exception:  # its runs fail, and their rows say why
        return steps


@functools.cache
def _flops_of_budget(task: str) -> float:
    try:
        return Run(task_class(task)(0), RouterChoice(BUDGET_ROUTER), 0.0).flops()
    except Exception as error:
        raise UserError(
            f"FLOPs cannot be matched in {task_class(task).name}, since {BUDGET_ROUTER} cannot do it: {error}"
        ) from error


def source_digest(cls: type) -> str:
    """Return a digest of the file that defines a class; nothing for routerzoo's own, whose version is known."""
    if cls.__module__.partition(".")[0] == "routerzoo":
        return ""
    return hashlib.sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest()[:8]


def settings_digest(cls: type[BenchTask], choice: RouterChoice) -> str:
    """Return a digest of a task's sizes and a router's class and arguments."""
    sizes = {
        name: getattr(cls, name) for name, value in sorted(vars(BenchTask).items()) if isinstance(value, int | float)
    }
    for name in ("max_gradient_norm", "warm_up_steps"):  # younger than the first records
        if sizes[name] == getattr(BenchTask, name):
            del sizes[name]
    told = [sizes, sorted(cls.provides), choice.text(), cls.data()]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]
