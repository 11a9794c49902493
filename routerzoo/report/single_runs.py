"""Read runs of `fit`, each in its own folder, as if a sweep had made them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from routerzoo.errors import UserError
from routerzoo.report.collect import Sweep, flat, tasks_of
from routerzoo.runs.folder import CONFIG, RESULTS
from routerzoo.sweep.ledger import Run
from routerzoo.sweep.plan import ROUTER, shown_values

IGNORED = ("seed_everything", "data.init_args.seed", "run_dir", "ckpt_path", "overwrite")
"""Keys in which the runs of one variant differ."""
LISTED = 4


def read_runs(folders: Sequence[Path], out: Path, baseline: str | None = None) -> Sweep:
    """Read runs. Those of one config are seeds; those of one data set are a task; others are variants.

    Args:
        folders: of the runs.
        out: folder that the report goes to.
        baseline: label of the variant to compare with; by default one of LinearRouter, or the first.

    Raises:
        UserError: a folder holds no finished run, or no variant has the baseline's label.
    """
    configs = {folder: _config(folder) for folder in folders}
    results = {folder: _results(folder) for folder in folders}
    tasks = _tasks(configs)
    labels = _labels(configs, tasks)
    notes = []
    if keys := _other_differences(configs, tasks):
        more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
        notes.append(f"The runs differ in more than router and seed: {', '.join(keys[:LISTED])}{more}.")
    if lacking := [folder for folder in folders if "test" not in results[folder]]:
        notes.append(
            f"{lacking[0]} was not tested, so that the best validation of each run is compared, which is optimistic."
        )
        results = {folder: {**found, "test": _validation(folder, found["fit"])} for folder, found in results.items()}
    names = list(dict.fromkeys(labels.values()))
    baseline = baseline or next((name for name in names if name.split(" ")[0] == "LinearRouter"), names[0])
    if baseline not in names:
        raise UserError(f"there is no run of the baseline {baseline!r}; there are {', '.join(names)}")
    out.mkdir(parents=True, exist_ok=True)
    runs: list[Run] = []
    for place, folder in enumerate(folders):
        config, label = configs[folder], labels[folder]
        task, seed = tasks[folder], int(config.get("seed_everything") or 0)
        if any((run.task, run.variant, run.seed) == (task, label, seed) for run in runs):
            raise UserError(f"{folder} has the config and the seed of another run: give each run once")
        text = (folder / CONFIG).read_text(encoding="utf-8")
        runs.append(_run(place, task, label, seed, os.path.relpath(folder, out), text, results[folder]))
    return Sweep(out, "", baseline, {}, tasks_of(runs, out), runs, [], note=" ".join(notes))


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder} is neither a sweep's folder nor a run's: {error}") from error
    return flat(config) if isinstance(config, dict) else {}


def _results(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} has no results: {error}") from error
    if "fit" not in found:
        raise UserError(f"{folder} has no results of fit: its training has not ended")
    return dict(found)


def _validation(folder: Path, fit: Mapping[str, Any]) -> dict[str, Any]:
    name = str(fit.get("headline_metric"))
    if fit.get(f"best {name}") is None:
        raise UserError(f"{folder} was neither tested nor validated: python -m routerzoo test --run_dir {folder}")
    return {**fit, name: fit[f"best {name}"]}


def _labels(configs: Mapping[Path, Mapping[str, Any]], tasks: Mapping[Path, str]) -> dict[Path, str]:
    """Return what to call each: its router, and where one router has several configs, the values that differ."""
    routers = {folder: _router(config) for folder, config in configs.items()}
    labels = {}
    for folder, config in configs.items():
        alike = [
            configs[other] for other in configs if (routers[other], tasks[other]) == (routers[folder], tasks[folder])
        ]
        keys = [key for key in config if not key.startswith(IGNORED) and len({str(o.get(key)) for o in alike}) > 1]
        labels[folder] = " ".join([routers[folder], *shown_values({key: config[key] for key in keys})])
    return labels


def _other_differences(configs: Mapping[Path, Mapping[str, Any]], tasks: Mapping[Path, str]) -> list[str]:
    """Return keys, not of routers, in which runs of a task differ."""
    found: dict[str, None] = {}
    for task in dict.fromkeys(tasks.values()):
        alike = [config for folder, config in configs.items() if tasks[folder] == task]
        keys = dict.fromkeys(key for config in alike for key in config if not key.startswith((*IGNORED, ROUTER)))
        found |= dict.fromkeys(key for key in keys if len({str(config.get(key)) for config in alike}) > 1)
    return list(found)


def _router(config: Mapping[str, Any]) -> str:
    blocks = config.get("model.init_args.moe_blocks")
    if blocks == "none":
        return "dense"
    return _short(config.get("model.init_args.router.class_path") or config.get("model.class_path") or "model")


def _tasks(configs: Mapping[Path, Mapping[str, Any]]) -> dict[Path, str]:
    """Return the name of each run's data: without folders, unless data of other folders have the same name."""
    data = {folder: _datasets(config) for folder, config in configs.items()}
    short = {names: tuple(Path(name).name for name in names) for names in data.values()}
    named = {names: short[names] if list(short.values()).count(short[names]) == 1 else names for names in short}
    return {folder: "+".join(named[names]) for folder, names in data.items()}


def _datasets(config: Mapping[str, Any]) -> tuple[str, ...]:
    if dataset := config.get("data.init_args.dataset"):
        return tuple(map(str, dataset)) if isinstance(dataset, list) else (str(dataset),)
    return (_short(config.get("data.class_path") or "data"),)


def _short(class_path: str) -> str:
    return str(class_path).rpartition(".")[2]


def _run(place: int, task: str, label: str, seed: int, folder: str, config: str, results: dict[str, Any]) -> Run:
    return Run(
        key=folder,
        place=place,
        planned=True,
        task=task,
        router=label,
        variant=label,
        seed=seed,
        stage="final",
        folder=folder,
        config=config,
        test=[],
        status="finished",
        reason="",
        owner="",
        heartbeat=0.0,
        started=None,
        seconds=None,
        attempts=1,
        code="",
        host="",
        results=results,
    )
