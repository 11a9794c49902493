"""Folders of sweeps that were never run: what `report` reads, with made-up numbers."""

import csv
import json
import math

import numpy as np
import pytest

from routerzoo.sweep.ledger import Ledger

OFFSETS = {
    "LinearRouter": 0.0,
    "XMoERouter": -0.012,
    "HyperRouter": 0.002,
    "StableMoERouter": 0.06,
    "RandomFrozenRouter": 0.1,
    "HashRouter": 0.16,
}
METRICS = {"language": ("bpb", False), "vision": ("accuracy", True)}


def loss_at(compute, offset):
    """A scaling law whose compute multiplier is exp(-offset / 0.3)."""
    return 1.2 + 1.5 * math.exp(offset) * (compute / 1e9) ** -0.3


@pytest.fixture
def made_up(tmp_path):
    """Write a sweep into a folder of its own, and return that."""
    return lambda **content: write_sweep(tmp_path / "sweep", **content)


def write_sweep(
    folder,
    *,
    tasks=("language",),
    routers=tuple(OFFSETS),
    seeds=10,
    steps=(400,),
    noise=0.01,
    tuned=False,
    failed=(),
    waiting=(),
    curves=True,
    flops=None,
    by_k=(),
    baseline="LinearRouter",
):
    """Write a sweep.

    Args:
        steps: budgets; more than one is an axis of the grid.
        tuned: with tuned runs beside the untuned ones.
        failed: labels of runs.
        waiting: likewise.
        curves: whether runs have logs.
        flops: by router, how many times the baseline's.
        by_k: the k of further tests.
    """
    ledger, rows, results = Ledger(folder), [], {}
    rng = np.random.default_rng(0)
    for task in tasks:
        for budget in steps:
            settings = [f"max_steps={budget}"] if len(steps) > 1 else []
            for note in ([], ["tuned"]) if tuned else ([],):
                for seed in range(seeds):
                    common = rng.normal() * 0.04
                    for router in routers:
                        variant = " ".join([router, *settings, *note])
                        key = f"{task}-{variant}-{seed}".replace(" ", "-")
                        compute = 2.5e6 * budget * (flops or {}).get(router, 1.0)
                        offset = OFFSETS[router] * (0.5 if note else 1.0) - (0.03 if note else 0.0)
                        loss = loss_at(compute, offset) + common + rng.normal() * noise
                        name, higher = METRICS[task]
                        metric = 1 - 0.3 * loss if higher else loss
                        rows.append(
                            {"key": key, "task": task, "router": router, "variant": variant, "seed": seed}
                            | {"stage": "final", "folder": f"runs/{key}", "config": "", "test": []}
                        )
                        results[key] = {
                            "fit": {"trained k": 1.0 if router == "HashRouter" and flops else 2.0, "step": budget}
                            | {"training FLOPs": compute, "seconds": 20.0, "peak memory, bytes": 7e8},
                            "test": {"headline_metric": name, "higher_is_better": higher, name: metric}
                            | {"active parameters": 123456, "FLOPs per token": 987654.0}
                            | ({"by k": [{"k": k, name: metric + 0.1 / k - 0.05} for k in by_k]} if by_k else {}),
                        }
                        if curves:
                            _write_log(folder / "runs" / key / "logs", name, metric, budget, rng, higher)
    ledger.plan(rows)
    for row in rows:
        label = f"{row['task']} {row['variant']} seed {row['seed']}"
        if label in waiting:
            continue
        run = ledger.claim("1.0", besides={r["key"] for r in rows if r["key"] != row["key"]})
        place = folder / run.folder
        place.mkdir(parents=True, exist_ok=True)
        (place / "log.txt").write_text("made up\n")
        if label in failed:
            ledger.finish(run.key, "failed", "the loss is NaN at step 12")
        else:
            ledger.finish(run.key, "finished", results=results[run.key])
    if tuned:
        _write_tuning(folder, tasks, routers, steps)
    plan = {"config": "configs/sweeps/made-up.yaml", "baseline": baseline, "margins": {}}
    (folder / "plan.json").write_text(json.dumps(plan))
    return folder


def _write_log(folder, metric, final, budget, rng, higher):
    folder.mkdir(parents=True, exist_ok=True)
    columns = ["step", f"val/{metric}", "val/moe0/load_max", "val/moe0/load_entropy", "val/moe0/dead_experts"]
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for part in range(1, 11):
            shift = 1.5 * (part / 10) ** -0.5 - 1.5
            value = final - 0.1 * shift if higher else final + shift
            writer.writerow([budget * part // 10, value, 1.5 + rng.normal() * 0.1, 0.95, 0.0])


def _write_tuning(folder, tasks, routers, steps):
    with (folder / "tuning.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "router", "rung", "steps", "optimizer.init_args.lr", "seed", "validation", "kept"])
        for task in tasks:
            for budget in steps:
                for place, router in enumerate(routers):
                    name = f"{router} max_steps={budget}" if len(steps) > 1 else router
                    for lr in (0.001, 0.002 + 0.001 * (place % 2)):
                        writer.writerow([task, name, 2, budget, lr, 100, 2.0, lr > 0.001])
