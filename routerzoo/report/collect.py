"""Read the runs of a sweep for a report."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from routerzoo.errors import UserError
from routerzoo.runs.log_file import read_log
from routerzoo.sweep.ledger import FILE, Ledger, Run
from routerzoo.sweep.plan import TUNED

# Labels of the metrics of routing that a report shows, by the name of the log's column.
HEALTH = {
    "load_max": "most loaded expert, relative to the mean",
    "load_entropy": "entropy of the load",
    "dead_experts": "dead experts (never selected)",
    "gate_entropy": "entropy of the gate",
    "collapse": "X-MoE's measure of collapse (smaller is more collapsed)",
}
STABILITY = {
    "fluctuation": "experts that changed since the last record",
    "saturation": "final experts selected already",
}
Curve = list[tuple[float, float]]


class Budget(NamedTuple):
    """What a variant was trained with, as means over its runs; NaN where its runs do not say.

    Args:
        k: experts per token, mean over training.
        flops: of the whole training.
    """

    k: float
    flops: float


@dataclass(frozen=True)
class Task:
    """The results of a task at one place of the grid: of runs that differ in router and seed alone.

    Args:
        name: of the task and the place.
        metric: headline metric, as the task declares it; bits per byte, where runs differ in their tokenizers.
        lower_is_better: whether a smaller metric is better.
        values: the metric on the test split by router and seed; NaN where the run failed or measured no finite one.
        runs: finished runs by router and seed.
        curves: by router and seed, curves over steps by the name of the log's column.
        paired: whether runs of one seed have data and initialization in common.
        base: the task's name in the sweep; empty where it is `name`.
        setting: values on the other axes of the grid, and whether it is tuned: with `base` it makes up `name`.
        pending: how many runs are still to come.
    """

    name: str
    metric: str
    lower_is_better: bool
    values: Mapping[str, Mapping[int, float]]
    runs: Mapping[str, Mapping[int, Run]]
    curves: Mapping[str, Mapping[int, Mapping[str, Curve]]]
    paired: bool = True
    base: str = ""
    setting: str = ""
    pending: int = 0

    @property
    def is_tuned(self) -> bool:
        """Whether each router has its own best hyperparameters."""
        return self.setting.split(" ")[-1] == TUNED

    @property
    def untuned_name(self) -> str:
        """The name without the note that it is tuned."""
        return self.name.removesuffix(TUNED).strip() if self.is_tuned else self.name

    def finished(self, variant: str) -> list[float]:
        """Return a variant's values, without those of failed runs."""
        return [value for value in self.values.get(variant, {}).values() if not math.isnan(value)]

    def failures(self, variant: str) -> int:
        """Return how many runs of a variant failed."""
        return sum(map(math.isnan, self.values.get(variant, {}).values()))

    def budget(self, variant: str) -> Budget:
        """Return what a variant was trained with."""
        fits = [run.results.get("fit", {}) for run in self.runs.get(variant, {}).values()]
        k = [k for fit in fits if (k := fit.get("trained k")) is not None]
        flops = [flops for fit in fits if (flops := fit.get("training FLOPs")) is not None]
        return Budget(*(sum(known) / len(known) if known else math.nan for known in (k, flops)))

    def routing(self, variant: str) -> dict[str, dict[int, Curve]]:
        """Return metrics of a variant's routing over training, means over layers, by label and seed."""
        panels = [("val", metric, label) for metric, label in HEALTH.items()]
        panels += [("stability", metric, label) for metric, label in STABILITY.items()]
        seeds = self.curves.get(variant, {})
        return {
            label: {seed: curve for seed, curves in seeds.items() if (curve := over_layers(curves, stage, metric))}
            for stage, metric, label in panels
        }


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder.

    Args:
        folder: of the sweep.
        config: the sweep's YAML file, as the latest command had it.
        baseline: label of the router that the others are compared with.
        margins: by metric, the difference that is negligible, where it is not the default.
        tasks: with a finished run.
        runs: all planned runs.
        earlier: finished runs that are no longer in the plan.
        refused: why configs cannot be run, by label.
        pending_trials: trials of the tuning that are still to come.
        note: what a reader should know first.
    """

    folder: Path
    config: str
    baseline: str
    margins: Mapping[str, float]
    tasks: Sequence[Task]
    runs: Sequence[Run]
    earlier: Sequence[Run]
    refused: Mapping[str, str] = field(default_factory=dict)
    pending_trials: int = 0
    note: str = ""

    def main_tasks(self) -> list[Task]:
        """Return the tasks to decide by: without the untuned ones that there are tuned, too."""
        tuned = {task.untuned_name for task in self.tasks if task.is_tuned}
        return [task for task in self.tasks if task.is_tuned or task.name not in tuned]


def read_sweep(folder: Path, *, may_be_empty: bool = False) -> Sweep:
    """Read what is in a sweep's folder.

    Args:
        folder: of the sweep.
        may_be_empty: a sweep in which no run has finished is no error.

    Raises:
        UserError: it is not a sweep's, or no run has finished.
    """
    if not (folder / FILE).is_file():
        raise UserError(
            f"{folder} is not the folder of a sweep: it has no {FILE}. Run: python -m routerzoo sweep --config ..."
        )
    runs = Ledger(folder).runs()
    planned = [run for run in runs if run.planned and run.stage == "final"]
    if not may_be_empty and not any(run.status == "finished" for run in planned):
        failed = [run.reason for run in planned if run.status == "failed"]
        told = f"; {len(failed)} of {len(planned)} failed, the first: {failed[0]}" if failed else " yet"
        raise UserError(f"no run in {folder} has finished{told}")
    try:
        plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        config, baseline, margins = str(plan["config"]), str(plan["baseline"]), dict(plan["margins"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'plan.json'} is missing or damaged; the sweep's command rewrites it") from error
    try:
        refused = json.loads((folder / "refused.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        refused = {}
    earlier = [run for run in runs if not run.planned and run.status == "finished" and run.stage == "final"]
    trials = sum(run.planned and run.stage == "trial" and run.status in ("waiting", "running") for run in runs)
    return Sweep(folder, config, baseline, margins, tasks_of(planned, folder), planned, earlier, refused, trials)


def tasks_of(planned: Sequence[Run], folder: Path) -> list[Task]:
    """Return the tasks with a finished run, by task and place on the other axes of the grid.

    Args:
        planned: runs.
        folder: that their folders are relative to.
    """
    by_place: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in planned:
        by_place[run.task, run.variant.removeprefix(run.router).strip()].append(run)
    return [
        _task(base, setting, runs, folder)
        for (base, setting), runs in by_place.items()
        if any(run.status == "finished" for run in runs)
    ]


def _task(base: str, setting: str, planned: Sequence[Run], folder: Path) -> Task:
    finished: dict[str, dict[int, Run]] = defaultdict(dict)
    values: dict[str, dict[int, float]] = defaultdict(dict)
    tested = next(run for run in planned if run.status == "finished").results.get("test", {})
    metric, lower_is_better = tested.get("headline_metric", "loss"), not tested.get("higher_is_better", False)
    if metric == "ppl" and len({_tokenizer(run) for run in planned}) > 1:
        metric = "bpb"  # perplexities of different tokens are not comparable
        without = [run for run in planned if run.status == "finished" and metric not in run.results.get("test", {})]
        if without:
            raise UserError(
                f"runs of {base} have different tokenizers, and {without[0].folder} has no bits per byte to compare "
                "them by: test it again, with data that counts bytes"
            )
    for run in planned:
        if run.status == "finished":
            finished[run.router][run.seed] = run
            values[run.router][run.seed] = _finite(run.results["test"].get(metric))
        elif run.status == "failed":
            values[run.router][run.seed] = math.nan
    return Task(
        f"{base} {setting}".strip(),
        metric,
        lower_is_better,
        {name: values[name] for name in dict.fromkeys(run.router for run in planned) if name in values},
        dict(finished),
        {
            name: {seed: read_curves(folder / run.folder) for seed, run in by_seed.items()}
            for name, by_seed in finished.items()
        },
        all(data_follow_seed(run) for run in planned if run.status == "finished"),
        base,
        setting,
        sum(run.status in ("waiting", "running") for run in planned),
    )


def _tokenizer(run: Run) -> Any:
    config = yaml.safe_load(run.config)
    return flat(config).get("data.init_args.tokenizer") if isinstance(config, dict) else None


def _finite(value: Any) -> float:
    return float(value) if value is not None and math.isfinite(value) else math.nan


def data_follow_seed(run: Run) -> bool:
    """Whether a run's data are drawn by its seed, so that runs of one seed are pairs.

    Their initialization then is common, too: all but the router is drawn by the seed alone. A config with a fixed seed
    of the data has one order for all seeds, and the runs of a seed have no more in common than others.
    """
    if not isinstance(config := yaml.safe_load(run.config), dict):
        return True
    seed = flat(config.get("data", {})).get("init_args.seed")
    return seed is None or seed == run.seed


def read_curves(folder: Path) -> dict[str, Curve]:
    """Return what a run has logged by step, by column; empty without a log."""
    curves: dict[str, Curve] = defaultdict(list)
    try:
        _, rows = read_log(folder / "logs" / "metrics.csv")
        for row in rows:
            step = row.pop("step")
            for name, value in row.items():
                if value:
                    curves[name].append((float(step), float(value)))
    except (OSError, ValueError):
        return dict(curves)
    try:
        stability = json.loads((folder / "stability.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return dict(curves)
    for layer, record in stability.items():
        for name in ("fluctuation", "saturation", "settled"):
            curves[f"stability/moe{layer}/{name}"] = list(zip(record["steps"], record[name], strict=True))
    return dict(curves)


def tested_k(run: Run, metric: str) -> Curve:
    """Return a metric of one checkpoint by the k that it was tested with; empty if it was tested with a single k."""
    rows = run.results.get("test", {}).get("by k", [])
    return sorted((float(row["k"]), float(row[metric])) for row in rows)


def over_layers(curves: Mapping[str, Curve], stage: str, metric: str) -> Curve:
    """Return the mean over MoE layers of a metric."""
    by_step: dict[float, list[float]] = defaultdict(list)
    for name, curve in curves.items():
        parts = name.split("/")
        if len(parts) == 3 and parts[0] == stage and parts[1].startswith("moe") and parts[2] == metric:
            for step, value in curve:
                by_step[step].append(value)
    return [(step, sum(values) / len(values)) for step, values in sorted(by_step.items())]


def differences(one: str, other: str) -> list[str]:
    """Describe the keys in which two configs differ."""
    first, second = (flat(yaml.safe_load(text)) for text in (one, other))
    return [
        f"{key}: {first.get(key, 'nothing')} became {second.get(key, 'nothing')}"
        for key in sorted(first.keys() | second.keys())
        if first.get(key, "nothing") != second.get(key, "nothing")
    ]


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Turn nested mappings into dotted keys."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        key: leaf for name, inner in value.items() for key, leaf in flat(inner, f"{prefix}.{name}".lstrip(".")).items()
    }
