"""`Plan`: the grid that a sweep's YAML describes, as ordinary `fit` commands."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import yaml

from routerzoo.cli.configs import find_config, read_config
from routerzoo.errors import UserError

KEYS = (
    "tasks",
    "routers",
    "seeds",
    "fewer_seeds",
    "grid",
    "set",
    "test",
    "baseline",
    "margin",
    "budget",
    "allow_unequal",
    "tune",
)
ROUTER_KEYS = ("label", "config", "class_path", "init_args", "set", "tasks")
TUNE_KEYS = ("space", "trials", "seeds", "rungs", "factor", "set", "untuned")
ROUTER = "model.init_args.router"
STEPS = "trainer.max_steps"
TOLERANCE = 0.03
"""A relative difference of training FLOPs, or of k, above which budgets are not equal."""
TUNED = "tuned"
Stage = Literal["final", "trial"]
Budget = Literal["steps", "flops"]


@dataclass(frozen=True)
class Cell:
    """One point of the grid.

    Args:
        task: name of its base config.
        router: label of its router.
        seed: of the run.
        settings: its place on the other axes of the grid, by config key.
        configs: base configs, in their order.
        overlay: what the grid changes in them.
        test: what differs when it is tested.
        stage: a trial of the tuning, which is not tested, or a run to report.
        note: what tells it from other runs at its place: that it is tuned, or a trial's values.
    """

    task: str
    router: str
    seed: int
    settings: Mapping[str, Any]
    configs: tuple[Path, ...]
    overlay: Mapping[str, Any]
    test: Mapping[str, Any]
    stage: Stage = "final"
    note: str = ""

    @property
    def label(self) -> str:
        """What to call it, in a line."""
        return " ".join([self.task, self.variant, f"seed {self.seed}"])

    @property
    def variant(self) -> str:
        """The router and its place on the axes of the grid: all that seeds have in common within a task."""
        note = [self.note] if self.note else []
        return " ".join([self.router, *shown_values(self.settings), *note])

    @property
    def place(self) -> tuple[str, str, tuple[str, ...]]:
        """Task, router and place on the other axes: what is tuned together."""
        return (self.task, self.router, tuple(shown_values(self.settings)))

    def having(self, values: Mapping[str, Any], **changes: Any) -> Cell:
        """Return the point with further config values, by key, and other fields."""
        return replace(self, overlay=_merged(self.overlay, nested(values)), **changes)

    def arguments(self, overlay: Path) -> list[str]:
        """Return the `fit` command, with the overlay in a file."""
        return ["fit", *(part for path in (*self.configs, overlay) for part in ("--config", str(path)))]

    @property
    def test_arguments(self) -> list[str]:
        """Return what the `test` command is given beside the checkpoint."""
        return [f"--{key}={json.dumps(value)}" for key, value in self.test.items()]


class Axis(NamedTuple):
    """A router of the plan, or one value of another axis."""

    label: str
    configs: tuple[Path, ...]
    overlay: Mapping[str, Any]
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Tune:
    """How each router is tuned: the same trials for all, successive halving, seeds of their own.

    Args:
        space: lists of values by config key.
        trials: so many points of the space, drawn without replacement and the same for all; by default all.
        seeds: of the trials.
        rungs: the trials run at so many budgets; the better part goes on to the next, and starts anew there.
        factor: one of so many trials goes on, to so many times the steps; the last rung has those of the final runs.
        common: config values of the trials alone, by key.
        untuned: make final runs at the config's own values too.
    """

    space: Mapping[str, tuple[Any, ...]]
    trials: int | None = None
    seeds: tuple[int, ...] = (1000,)
    rungs: int = 2
    factor: int = 2
    common: Mapping[str, Any] = field(default_factory=dict)
    untuned: bool = True

    def points(self) -> list[dict[str, Any]]:
        """Return the points of the space to try."""
        points = [dict(zip(self.space, values, strict=True)) for values in itertools.product(*self.space.values())]
        if self.trials is None:
            return points
        chosen = sorted(random.Random(0).sample(range(len(points)), self.trials))
        return [points[place] for place in chosen]


@dataclass(frozen=True)
class Plan:
    """What a sweep runs.

    Args:
        path: the YAML file.
        tasks: base configs by the name of the task.
        routers: the routers to compare.
        seeds: of each.
        grid: further axes, lists by config key.
        fewer_seeds: by key and value of an axis, how many of the seeds a costly point of the grid is run with.
        common: config values of all runs, by key.
        test: config values of the tests alone, such as several k.
        baseline: label of the router that the others are compared with.
        budget: `flops` gives each router as many steps as take the baseline's training FLOPs; `steps` as configured.
        allow_unequal: compare routers that train at different k all the same.
        tune: how each router is tuned; None for not at all.
        margins: by metric, the difference that is negligible, where it is not the report's default.
    """

    path: Path
    tasks: Mapping[str, tuple[Path, ...]]
    routers: tuple[Axis, ...]
    seeds: tuple[int, ...]
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    common: Mapping[str, Any] = field(default_factory=dict)
    test: Mapping[str, Any] = field(default_factory=dict)
    baseline: str = "LinearRouter"
    margins: Mapping[str, float] = field(default_factory=dict)
    budget: Budget = "steps"
    allow_unequal: bool = False
    tune: Tune | None = None
    fewer_seeds: Mapping[str, Mapping[Any, int]] = field(default_factory=dict)

    def cells(self) -> Iterator[Cell]:
        """Yield the points, all first seeds before the second ones, so that a sweep that is stopped has covered all."""
        for number, seed in enumerate(self.seeds):
            for task, configs in self.tasks.items():
                for router in self.routers:
                    if router.tasks and task not in router.tasks:
                        continue
                    for values in itertools.product(*self.grid.values()):
                        settings = dict(zip(self.grid, values, strict=True))
                        limits = [limits.get(settings[key], number + 1) for key, limits in self.fewer_seeds.items()]
                        if number >= min(limits, default=number + 1):
                            continue
                        keys = {**self.common, **router.overlay, **settings, "seed_everything": seed}
                        yield Cell(
                            task, router.label, seed, settings, (*configs, *router.configs), nested(keys), self.test
                        )


def read_plan(path: Path) -> Plan:
    """Read a sweep's YAML file.

    Raises:
        UserError: missing, not such a file, or with something in it that no sweep has; it says what.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the sweep {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} describes no sweep; a sweep has {', '.join(KEYS)}")
    if unknown := [key for key in content if key not in KEYS]:
        raise UserError(f"{path}: a sweep has no {unknown[0]!r}; it has {', '.join(KEYS)}")
    tasks = _mapping(path, content, "tasks")
    if not tasks:
        raise UserError(f"{path}: a sweep needs tasks, configs by name: {{language: configs/tasks/language.yaml}}")
    bases = {str(name): _paths(path, configs, f"tasks.{name}") for name, configs in tasks.items()}
    routers = content.get("routers") or []
    if not isinstance(routers, list) or not routers:
        raise UserError(f"{path}: a sweep needs routers, a list of names: [LinearRouter, HyperRouter]")
    read = tuple(_router(path, router, tuple(map(str, tasks))) for router in routers)
    labels = [router.label for router in read]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise UserError(f"{path}: two routers are called {min(twice)!r}; give one a label of its own")
    seeds = content.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise UserError(f"{path}: seeds must be a list of whole numbers from 0 on, got {seeds!r}")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{path}: a seed is there twice: {seeds}")
    grid = _mapping(path, content, "grid")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{path}: grid.{key} must be a list of values, got {values!r}")
    baseline = content.get("baseline", "LinearRouter" if "LinearRouter" in labels else labels[0])
    if baseline not in labels:
        raise UserError(f"{path}: the baseline {baseline!r} is none of the routers {', '.join(labels)}")
    margins = _mapping(path, content, "margin")
    for name, margin in margins.items():
        if not isinstance(margin, (int, float)) or not margin > 0:
            raise UserError(f"{path}: margin.{name} must be a positive number, got {margin!r}")
    budget, unequal = content.get("budget", "steps"), content.get("allow_unequal", False)
    if budget not in get_args(Budget):
        raise UserError(f"{path}: budget must be steps or flops, got {budget!r}")
    if not isinstance(unequal, bool):
        raise UserError(f"{path}: allow_unequal must be true or false, got {unequal!r}")
    return Plan(
        path,
        bases,
        read,
        tuple(seeds),
        {str(key): tuple(values) for key, values in grid.items()},
        _mapping(path, content, "set"),
        _mapping(path, content, "test"),
        baseline,
        {str(name): float(margin) for name, margin in margins.items()},
        budget,
        unequal,
        _tune(path, _mapping(path, content, "tune"), tuple(seeds), grid) if "tune" in content else None,
        _fewer_seeds(path, _mapping(path, content, "fewer_seeds"), len(seeds), grid),
    )


def _fewer_seeds(path: Path, content: dict[str, Any], seeds: int, grid: Mapping[str, Any]) -> dict[str, Any]:
    for key, limits in content.items():
        if key not in grid:
            raise UserError(f"{path}: fewer_seeds names {key}, which is no axis of the grid")
        if not isinstance(limits, dict):
            raise UserError(f"{path}: fewer_seeds.{key} must map values to numbers of seeds, got {limits!r}")
        for value, number in limits.items():
            if value not in grid[key]:
                raise UserError(f"{path}: fewer_seeds.{key} names {value}, which the grid does not have")
            if type(number) is not int or not 1 <= number <= seeds:
                raise UserError(
                    f"{path}: fewer_seeds.{key} must give {value} between 1 and {seeds} seeds, got {number!r}"
                )
    return content


def _tune(path: Path, content: dict[str, Any], seeds: tuple[int, ...], grid: Mapping[str, Any]) -> Tune:
    if unknown := [key for key in content if key not in TUNE_KEYS]:
        raise UserError(f"{path}: tune has no {unknown[0]!r}; it has {', '.join(TUNE_KEYS)}")
    space = content.get("space")
    if not isinstance(space, dict) or not space:
        raise UserError(f"{path}: tune needs a space, lists of values by config key")
    for key, values in space.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{path}: tune.space.{key} must be a list of values, got {values!r}")
        if key in grid:
            raise UserError(f"{path}: {key} is an axis of the grid, so that it cannot be tuned too")
    known = Tune({str(key): tuple(values) for key, values in space.items()})
    size = len(known.points())
    numbers: dict[str, Any] = {}
    for name, least, most in (("trials", 1, size), ("rungs", 1, 10), ("factor", 2, 10)):
        value = content.get(name, getattr(known, name))
        if value is not None and not (type(value) is int and least <= value <= most):
            raise UserError(f"{path}: tune.{name} must be a whole number from {least} to {most}, got {value!r}")
        numbers[name] = value
    own = content.get("seeds", list(known.seeds))
    are_seeds = isinstance(own, list) and own and all(type(seed) is int and seed >= 0 for seed in own)
    if not are_seeds or len(set(own)) < len(own):
        raise UserError(f"{path}: tune.seeds must be a list of different whole numbers from 0 on, got {own!r}")
    if shared := set(own) & set(seeds):
        raise UserError(f"{path}: the seed {min(shared)} is among seeds too, but tuning needs seeds of its own")
    untuned = content.get("untuned", True)
    if not isinstance(untuned, bool):
        raise UserError(f"{path}: tune.untuned must be true or false, got {untuned!r}")
    return replace(known, **numbers, seeds=tuple(own), common=_mapping(path, content, "set"), untuned=untuned)


def _router(path: Path, entry: Any, tasks: tuple[str, ...]) -> Axis:
    if isinstance(entry, str):
        return Axis(entry, (), {ROUTER: {"class_path": entry}}, ())
    if not isinstance(entry, dict):
        raise UserError(f"{path}: a router is a name, or has {', '.join(ROUTER_KEYS)}; got {entry!r}")
    if unknown := [key for key in entry if key not in ROUTER_KEYS]:
        raise UserError(f"{path}: a router has no {unknown[0]!r}; it has {', '.join(ROUTER_KEYS)}")
    configs = _paths(path, entry.get("config", []), "routers")
    label = entry.get("label") or entry.get("class_path") or (configs and configs[-1].stem)
    if not label:
        raise UserError(f"{path}: a router needs a label, a class_path or a config; got {entry!r}")
    overlay = dict(entry.get("set") or {})
    if "class_path" in entry:
        overlay[ROUTER] = {"class_path": entry["class_path"], "init_args": entry.get("init_args") or {}}
    elif "init_args" in entry:
        overlay[f"{ROUTER}.init_args"] = entry["init_args"]
    only = tuple(entry.get("tasks") or ())
    if unknown := [task for task in only if task not in tasks]:
        raise UserError(f"{path}: {label} is for the task {unknown[0]!r}, which the sweep does not have")
    return Axis(str(label), configs, overlay, only)


def _mapping(path: Path, content: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: {key} must map names to values, got {value!r}")
    return value


def _paths(path: Path, value: Any, where: str) -> tuple[Path, ...]:
    """Find config files: in the working directory, in the sweep's folder or among those that ship with the package."""
    found = []
    for name in [value] if isinstance(value, str) else value:
        existing = [file for file in (Path(str(name)), path.parent / str(name)) if file.is_file()]
        try:
            found.append((existing[0] if existing else find_config(str(name))).resolve())
        except UserError:
            raise UserError(
                f"{path}: {where} names {name}, which is neither here nor in {path.parent} nor a packaged config"
            ) from None
        read_config(found[-1])  # refused here, by name, if it cannot be read
    return tuple(found)


def nested(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted keys into nested mappings. What comes later is put into what came before, and wins.

    Example:
        >>> nested({"a.b": {"c": 1}, "a.b.d": 2, "a": {"b": {"c": 3}}})
        {'a': {'b': {'c': 3, 'd': 2}}}
    """
    result: dict[str, Any] = {}
    for key, value in keys.items():
        for name in reversed(key.split(".")):
            value = {name: value}
        result = _merged(result, value)
    return result


def _merged(one: Any, other: Any) -> Any:
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return other
    return {**one, **{key: _merged(one[key], value) if key in one else value for key, value in other.items()}}


def shown_values(values: Mapping[str, Any]) -> list[str]:
    """Show values by config key, short."""
    return [f"{key.rpartition('.')[2]}={shown(value)}" for key, value in values.items()]


def shown(value: Any) -> str:
    """Show a value of an axis, short."""
    if isinstance(value, dict) and "class_path" in value:
        return str(value["class_path"]).rpartition(".")[2]
    return f"{value:g}" if isinstance(value, float) else str(value)
