"""The parts of the page: tables, pictures, and sentences where there is nothing to draw."""

from __future__ import annotations

import csv
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from routerzoo.costs import short
from routerzoo.report import pictures, tables
from routerzoo.report.analysis import Analysis, TaskAnalysis
from routerzoo.report.collect import Curve, Sweep, Task, tested_k
from routerzoo.report.compute import Compute
from routerzoo.report.palette import Style
from routerzoo.report.statistics.intervals import Interval, interval
from routerzoo.report.svg import to_svg

TUNING = "tuning.csv"
SEEDS = "bands are the range of the seeds."


@dataclass(frozen=True)
class Picture:
    """A picture with its caption, or the sentence that stands in its place."""

    title: str
    caption: str
    svg: Markup | None = None


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, and what it is sorted by."""

    text: str
    value: Any = ""
    style: str = ""


@dataclass(frozen=True)
class Table:
    """A table; each row begins with the place of its router among the styles, and the router's name."""

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[int, str, Sequence[Cell]]]


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    anchor: str
    title: str
    notes: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()


def results(found: TaskAnalysis, means: tables.Rows, known: Mapping[str, Style]) -> Table:
    """Return the table of a task, the best router on top."""
    task = found.task
    shown = tables.columns(task.metric, pictures.direction(task))
    own = [row for row in means if row["task"] == task.name]
    sign = 1 if task.lower_is_better else -1
    own.sort(key=lambda row: (math.isnan(row["mean"]), row["failed"], sign * row["mean"]))
    rows = [(known[row["router"]].place, row["router"], [_cell(column, row) for column in shown]) for row in own]
    return Table(_named(task), [column.header for column in shown], rows)


def _cell(column: tables.Column, row: Mapping[str, Any]) -> Cell:
    value, text = row[column.key], column.show(row)
    unequal = {"trained k": "k", "training FLOPs": "FLOPs"}.get(column.key, "nothing")
    if unequal in row["unequal"].split():
        return Cell(f"{text} (unequal)", value, "bad")
    if column.is_text:
        return Cell(text, value, str(value).replace(" ", "-"))
    return Cell(text, value, "bad" if column.key == "failed" and value else "")


def _named(task: Task) -> str:
    return ", ".join([task.base or task.name, *task.setting.split()])


def joined(anchor: str, title: str, each: Sequence[Section]) -> list[Section]:
    """Return sections of several tasks as one, whose parts say what task they are of; none of none."""
    if not each:
        return []
    several = len(each) > 1
    about = {one.title: " ".join(one.notes) for one in each if one.notes}
    notes = [f"{name}: {note}" if several else note for name, note in about.items()]
    drawn = [replace(p, title=f"{one.title}: {p.title}") if several else p for one in each for p in one.pictures]
    listed = [replace(t, title=f"{one.title}: {t.title}") if several else t for one in each for t in one.tables]
    return [Section(anchor, title, notes, drawn, listed)]


def _picture(name: str, title: str, caption: str, figure: Figure) -> Picture:
    identifier = re.sub(r"[^A-Za-z0-9]+", "-", f"{name} {title}").strip("-").lower()
    return Picture(title, caption, to_svg(figure, identifier, f"{name}: {title}", caption))


def by_compute(found: Compute, known: Mapping[str, Style], baseline: str) -> Section:
    """Return the front of quality against training FLOPs, and the scaling laws."""
    notes: list[str] = []
    drawn, listed = [], []
    task = found.parts[0].task
    if not found.points:
        return Section("", found.name, ["The runs do not say how many FLOPs they trained with."])
    if found.is_equal:
        flops = short(min(flops for _, flops in found.points))
        notes.append(f"All routers trained with the same FLOPs ({flops}): no quality was traded for compute.")
    else:
        caption = "Means with 95 % intervals. With as few FLOPs, none is better than those on the line."
        figure = pictures.front(found.points, known, task)
        drawn.append(_picture(found.name, "Quality and training FLOPs", caption, figure))
    gaps = {
        (router, part.task.budget(router).flops): pair.difference
        for part in found.parts
        for router in part.task.values
        if (pair := part.against_baseline(router)) and (router, part.task.budget(router).flops) in found.points
    }
    if len(found.parts) > 1 and gaps:
        unit = f"{found.parts[0].results.metric.unit} ({pictures.direction(task)})"
        caption = f"95 % intervals, uncorrected; {baseline} is the dashed line."
        figure = pictures.against_baseline(gaps, known, unit)
        drawn.append(_picture(found.name, "Difference from the baseline", caption, figure))
    if (fit := found.fit) is None:
        return Section("", found.name, [*notes, found.why_not], drawn)
    notes.append(
        f"L = a C^-b + c: all share b = {tables.shown(fit.exponent, 3)} and c = {fit.c[0]:.4g}; a is the router's own. "
        f"No mean is further than {fit.worst:.2g} {found.unit} from its curve."
    )
    if len(fit.b) == 1:
        notes.append("Some budget has a single seed: there are no intervals.")
    if left := [router for router in known if router not in fit.routers and any(router in key for key in found.losses)]:
        notes.append(f"Without three budgets, and not in the fit: {', '.join(left)}.")
    caption = f"Means with 95 % intervals, and fitted laws with 95 % bands (bootstrap over seeds); {found.unit}."
    figure = pictures.scaling(fit, found.losses, known, found.unit)
    drawn.append(_picture(found.name, "Scaling", caption, figure))
    if baseline in fit.routers and len(fit.routers) > 1:
        gains = {router: fit.multiplier(router, baseline) for router in fit.routers if router != baseline}
        alone = {router: fit.multipliers(router, baseline) for router in gains}
        points = {(n, flops): one for n, of in alone.items() for flops, one in of.items() if not math.isnan(one.mean)}
        caption = (
            f"How many times the FLOPs {baseline} needs for the same loss, each budget alone, with 95 % intervals."
        )
        figure = pictures.against_baseline(points, known, f"compute multiplier against {baseline}", level=1.0)
        drawn.append(_picture(found.name, "Compute multipliers", caption, figure))
        if turning := [router for router in gains if fit.turns(router, baseline)]:
            notes.append(
                f"Ahead of {baseline} at one budget and behind at another: {', '.join(turning)}. No single multiplier "
                "says what these save; the table has one for each budget."
            )
        budgets = [short(flops) for flops in fit.multipliers(baseline, baseline)]
        rows = [
            (known[name].place, name, [Cell(tables.shown(one, 3), one.mean) for one in (gain, *alone[name].values())])
            for name, gain in gains.items()
        ]
        heads = [f"against {baseline}", *(f"at {flops} alone" for flops in budgets)]
        listed.append(Table("Compute multipliers, with 95 % intervals", heads, rows))
    return Section("", found.name, notes, drawn, listed)


def of_task(found: TaskAnalysis, known: Mapping[str, Style], anchor: str) -> Section:
    """Return what happened in training, every seed, quality by k, and the health of the routing."""
    task, notes = found.task, []
    drawn: list[tuple[str, str, Figure | None]] = []
    validation = {
        router: [curves.get(f"val/{task.metric}", []) for curves in by_seed.values()]
        for router, by_seed in task.curves.items()
    }
    figure = pictures.curves(validation, known, "step", f"validation {task.metric}", log=True)
    drawn.append(("Learning curves", f"Means over seeds; {SEEDS}", figure))
    if figure is None:
        notes.append("No learning curves: nothing was validated while training, or the logs are gone.")
    baseline = next(iter(found.results.baselines.values()), "")
    gaps = {router: _gaps(task, router, baseline) for router in task.curves if router != baseline}
    figure = pictures.curves(gaps, known, "step", f"validation {task.metric}, difference", log=True, zero=True)
    drawn.append(
        ("Learning curves beside the baseline's", f"{baseline} at the same seed is the dashed line; {SEEDS}", figure)
    )
    values = {router: task.finished(router) for router in task.values if task.finished(router)}
    means = {router: found.mean(router) for router in values}
    figure = pictures.by_router(values, means, known) if values else None
    caption = "small marks are seeds, large ones means with 95 % intervals."
    drawn.append(("Every seed", f"{task.metric} of the test split ({pictures.direction(task)}): {caption}", figure))
    figure = pictures.by_k(task, known)
    drawn.append(("Quality and k", f"One checkpoint a run, tested at several k; {SEEDS}", figure))
    if figure is None:
        notes.append("All were tested at one k (test: {model.init_args.eval_top_k: [2, 1, 4]} gives quality by k).")
    routing = {router: task.routing(router) for router in task.curves}
    health = list(dict.fromkeys(label for curves in routing.values() for label in curves if curves[label]))
    if not health:
        notes.append("Nothing on the health of the routing: the logs have none of its metrics.")
    for label in health:
        each = {router: list(curves[label].values()) for router, curves in routing.items()}
        title = label[0].upper() + label[1:]
        if len(seen := {value for of_seeds in each.values() for curve in of_seeds for _, value in curve}) == 1:
            notes.append(f"{title}: {min(seen):g} in all runs, throughout.")
        else:
            caption = f"On the validation split, means over layers and seeds; {SEEDS}"
            drawn.append((title, caption, pictures.curves(each, known, "step", label)))
    shown = [_picture(task.name, title, caption, figure) for title, caption, figure in drawn if figure is not None]
    listed = [table for table in (_table_by_k(task, known), _table_of_routing(task, known)) if table.rows]
    return Section(anchor, f"Training and routing: {_named(task)}", notes, shown, listed)


def _gaps(task: Task, router: str, baseline: str) -> list[Curve]:
    """Return a router's learning curves less those of the baseline, by seed."""
    name, found = f"val/{task.metric}", []
    for seed, curves in task.curves[router].items():
        other = dict(task.curves.get(baseline, {}).get(seed, {}).get(name, []))
        found.append([(step, value - other[step]) for step, value in curves.get(name, []) if step in other])
    return found


def tuned(sweep: Sweep, analysis: Analysis, known: Mapping[str, Style], means: tables.Rows) -> list[Section]:
    """Return a section for each task that there is untuned, too: what tuning has changed."""
    chosen, found = _chosen(sweep.folder), []
    after_of = {task.untuned_name: analysis.tasks[task.name] for task in sweep.main_tasks() if task.is_tuned}
    for before in (one for one in analysis.tasks.values() if not one.task.is_tuned and one.task.name in after_of):
        after, task = after_of[before.task.name], before.task
        finished = [name for name in task.values if task.finished(name) and after.task.finished(name)]
        pairs = {name: (before.mean(name), after.mean(name)) for name in finished}
        note = f"The best mean is that of {before.best.router} untuned, and of {after.best.router} tuned."
        drawn, listed = [], []
        if pairs:
            title = "Tuned beside untuned"
            caption = "Hollow marks are untuned, filled ones tuned; means with 95 % intervals."
            figure = pictures.tuning(pairs, known, f"{task.metric} ({pictures.direction(task)})")
            drawn.append(_picture(task.name, title, caption, figure))
            rows = []
            for name, pair in pairs.items():
                values = chosen.get((task.base, f"{name} {task.setting}".strip()), "")
                cells = [Cell(tables.shown(middle), middle.mean) for middle in pair]
                rows.append((known[name].place, name, [*cells, Cell(values, values, "text")]))
            listed.append(Table(title, ["untuned", "tuned", "chosen"], rows))
        untuned = results(before, means, known)
        listed.append(Table("Untuned", untuned.columns, untuned.rows))
        found.append(Section("", _named(task), [note], drawn, listed))
    return found


def _chosen(folder: Path) -> dict[tuple[str, str], str]:
    """Return what tuning has chosen, by task and router."""
    try:
        rows = list(csv.DictReader((folder / TUNING).read_text(encoding="utf-8").splitlines()))
    except OSError:
        return {}
    own = ("task", "router", "rung", "steps", "seed", "validation", "kept")
    last: dict[tuple[str, str], str] = {}
    for row in rows:  # later rungs are further down
        if row["kept"] == "True":
            values = {key.rpartition(".")[2]: value for key, value in row.items() if key not in own}
            last[row["task"], row["router"]] = ", ".join(f"{key} {value}" for key, value in values.items())
    return last


def over_all(analysis: Analysis, known: Mapping[str, Style]) -> Section:
    """Return mean ranks, and how probable an improvement is."""
    caption = "Mean rank over tasks and seeds, of routers that all tasks have; 95 % intervals from five seeds on."
    drawn = [_picture("All tasks", "Ranks", caption, pictures.ranking(analysis.ranks, known))]
    empty = Interval(float("nan"), float("nan"), float("nan"))
    rows = [
        (
            known[name].place,
            name,
            [
                Cell(tables.shown(rank, 2), rank.mean),
                Cell(tables.shown(gain := analysis.improvements.get(name, empty), 2), gain.mean),
            ],
        )
        for name, rank in sorted(analysis.ranks.items(), key=lambda item: item[1].mean)
    ]
    columns = ["mean rank", "probability that a run is better than one of the baseline"]
    return Section("all", "Over all tasks", (), drawn, [Table("Ranks and improvements", columns, rows)])


def _table_by_k(task: Task, known: Mapping[str, Style]) -> Table:
    """Return the metric of one checkpoint a run by the k that it was tested with, means and intervals over seeds."""
    by_router: dict[str, dict[float, list[float]]] = {}
    for name in known:
        for run in task.runs.get(name, {}).values():
            for k, value in tested_k(run, task.metric):
                by_router.setdefault(name, {}).setdefault(k, []).append(value)
    tested = sorted({k for found in by_router.values() for k in found})
    rows = []
    for name, found in by_router.items():
        middles = [interval(found[k]) if k in found else None for k in tested]
        cells = [Cell("") if middle is None else Cell(tables.shown(middle), middle.mean) for middle in middles]
        rows.append((known[name].place, name, cells))
    return Table(f"{task.metric} by the k of the test", [f"k = {k:g}" for k in tested], rows)


def _table_of_routing(task: Task, known: Mapping[str, Style]) -> Table:
    """Return metrics of the routing at the end of training, means over layers and seeds."""
    by_router = {name: task.routing(name) for name in known if name in task.curves}
    labels = [label for label in next(iter(by_router.values()), {}) if any(v[label] for v in by_router.values())]
    rows = []
    for name, found in by_router.items():
        ends = [[curve[-1][1] for curve in found[label].values()] for label in labels]
        cells = [Cell(f"{(mean := statistics.mean(end)):.3f}", mean) if end else Cell("") for end in ends]
        rows.append((known[name].place, name, cells))
    return Table("Routing at the end of training, on the validation split", labels, rows if labels else [])
