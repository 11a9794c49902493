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
    """The results of a task's runs.

    Args:
        name: of the task.
        metric: headline metric, as the task declares it.
        lower_is_better: whether a smaller metric is better.
        values: the metric on the test split by variant and seed; NaN where the run failed or measured no finite one.
        runs: finished runs by variant and seed.
        curves: by variant and seed, curves over steps by the name of the log's column.
        paired: whether runs of one seed have data and initialization in common.
    """

    name: str
    metric: str
    lower_is_better: bool
    values: Mapping[str, Mapping[int, float]]
    runs: Mapping[str, Mapping[int, Run]]
    curves: Mapping[str, Mapping[int, Mapping[str, Curve]]]
    paired: bool = True

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

    def variants(self, router: str) -> set[str]:
        """Return the variants of a router."""
        return {run.variant for run in self.runs if run.router == router}

    def baseline_of(self, variant: str) -> str | None:
        """Return the baseline that a variant is compared with: the one with the same values on the other axes."""
        mine = next((run for run in self.runs if run.variant == variant), None)
        if mine is None:
            return None
        rest = mine.variant.removeprefix(mine.router)
        return f"{self.baseline}{rest}"


def read_sweep(folder: Path) -> Sweep:
    """Read a sweep's folder.

    Raises:
        UserError: it is not a sweep's, or no run has finished.
    """
    if not (folder / FILE).is_file():
        raise UserError(
            f"{folder} is not the folder of a sweep: it has no {FILE}. Run: python -m routerzoo sweep --config ..."
        )
    runs = Ledger(folder).runs()
    planned = [run for run in runs if run.planned and run.stage == "final"]
    finished: dict[str, dict[str, dict[int, Run]]] = defaultdict(lambda: defaultdict(dict))
    for run in planned:
        if run.status == "finished":
            finished[run.task][run.variant][run.seed] = run
    if not finished:
        raise UserError(f"no run in {folder} has finished yet")
    tasks = []
    lost: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for run in planned:
        if run.status == "failed":
            lost[run.task][run.variant][run.seed] = math.nan
    order = list(dict.fromkeys(run.variant for run in planned))
    for name, by_variant in finished.items():
        first = next(iter(next(iter(by_variant.values())).values()))
        tested = first.results.get("test", {})
        metric, lower_is_better = tested.get("headline_metric", "loss"), not tested.get("higher_is_better", False)
        values = {
            variant: {seed: _finite(run.results["test"].get(metric)) for seed, run in by_variant[variant].items()}
            | lost[name][variant]
            for variant in order
            if by_variant[variant] or lost[name][variant]
        }
        curves = {
            variant: {seed: read_curves(folder / run.folder) for seed, run in by_seed.items()}
            for variant, by_seed in by_variant.items()
        }
        runs_of = {variant: dict(by_seed) for variant, by_seed in by_variant.items()}
        paired = all(data_follow_seed(run) for by_seed in by_variant.values() for run in by_seed.values())
        tasks.append(Task(name, metric, lower_is_better, values, runs_of, curves, paired))
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
    return Sweep(folder, config, baseline, margins, tasks, planned, earlier, refused, trials)


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
