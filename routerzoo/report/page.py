"""The report's files: a self-contained HTML page, Markdown, and tables as CSV."""

from __future__ import annotations

import csv
import io
import math
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from jinja2 import Environment
from markupsafe import Markup
from matplotlib.figure import Figure

from routerzoo.costs import short
from routerzoo.report import pictures
from routerzoo.report.analysis import Analysis, TaskAnalysis, analyze
from routerzoo.report.collect import Sweep, Task, differences, tested_k
from routerzoo.report.findings import findings
from routerzoo.report.statistics.intervals import Interval, interval
from routerzoo.runs.atomic import atomic_write
from routerzoo.sweep.ledger import THEN, Run
from routerzoo.sweep.work import CELL, LOG

LARGEST_DIFFERENCES = 12


@dataclass(frozen=True)
class Row:
    """A variant in a task's table, formatted."""

    variant: str
    metric: str
    seeds: int
    failed: int
    difference: str
    p: str
    bounds: str
    verdict: str
    trained_k: str
    training_flops: str
    is_unequal: bool
    active: str
    flops: str
    seconds: str
    memory: str


@dataclass(frozen=True)
class Picture:
    """A picture with its caption."""

    title: str
    caption: str
    svg: Markup


@dataclass(frozen=True)
class Table:
    """Numbers behind a picture, formatted; the first of each row is a variant."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A task."""

    task: Task
    rows: Sequence[Row]
    pictures: Sequence[Picture]
    tables: Sequence[Table]


class Report(NamedTuple):
    """The files that were written, and the findings in sentences."""

    files: list[Path]
    findings: list[str]


def write_report(sweep: Sweep) -> Report:
    """Write the report into the sweep's folder."""
    command = f"python -m routerzoo report {shlex.quote(str(sweep.folder))}"
    names = variants(sweep)
    analysis = analyze(sweep)
    sections = [
        Section(
            task,
            _rows(analysis.tasks[task.name], names),
            _pictures(sweep, task, names, command),
            [table for table in (_table_by_k(task, names), _table_of_routing(task, names)) if table.rows],
        )
        for task in sweep.tasks
    ]
    ranked = analysis.ranks
    content: dict[str, Any] = {
        "sweep": sweep,
        "command": command,
        "again": f"python -m routerzoo sweep --config {shlex.quote(sweep.config)} "
        f"--folder {shlex.quote(str(sweep.folder))}",
        "commands": f"python -m routerzoo sweep --config {shlex.quote(sweep.config)} "
        f"--folder {shlex.quote(str(sweep.folder))} --print",
        "sections": sections,
        "ranking": _ranking_rows(sweep, ranked),
        "ranking_picture": _picture("Ranking", "", pictures.ranking(ranked, names)) if ranked else None,
        "missing": [run for run in sweep.runs if run.status not in ("finished",)],
        "codes": (codes := sorted({run.code for run in sweep.runs if run.status == "finished"})),
        "mixed": len(codes) > 1 or any(THEN in code for code in codes),
        "hosts": sorted({run.host for run in sweep.runs if run.host}),
        "earlier": [(run, _what_differs(run, sweep.runs)) for run in sweep.earlier],
        "findings": findings(sweep, analysis),
        "analysis": analysis,
        "log": LOG,
    }
    written = {
        "report.html": _template("page.html.jinja", escape=True).render(content),
        "report.md": re.sub(r"\n{3,}", "\n\n", _template("page.md.jinja", escape=False).render(content)),
        "runs.csv": _csv(_run_rows(sweep)),
        "means.csv": _csv(_mean_rows(analysis)),
        "comparisons.csv": _csv(_comparison_rows(analysis)),
        "ranking.csv": _csv([{"router": n, **middle._asdict()} for n, middle in ranked.items()]),
        "by_k.csv": _csv(_by_k_rows(sweep)),
        "curves.csv": _csv(_curve_rows(sweep)),
    }
    for name, text in written.items():
        atomic_write(sweep.folder / name, text)
    return Report([sweep.folder / name for name in written], content["findings"])


def variants(sweep: Sweep) -> list[str]:
    """Return the variants in the order of the plan."""
    return list(dict.fromkeys(run.variant for run in sweep.runs))


def _rows(found: TaskAnalysis, names: Sequence[str]) -> list[Row]:
    rows, task = [], found.task
    unequal = {name for listed in found.unequal().values() for name in listed}
    for name in names:
        if name not in task.values:
            continue
        runs, budget = list(task.runs.get(name, {}).values()), task.budget(name)
        comparison = found.against_baseline(name)
        difference, p, bounds, verdict = "", "", "", "baseline"
        if comparison is not None:
            difference, verdict = _shown(comparison.difference, signed=True), comparison.verdict
            p = _p(comparison.p_adjusted)
            if not math.isnan(comparison.bounds.low):
                low, high = comparison.bounds.low, comparison.bounds.high
                bounds = f"{low:+.4f} to {high:+.4f} ({100 * comparison.bounds_level:.4g} %)"
        rows.append(
            Row(
                name,
                _shown(found.mean(name)),
                len(task.values[name]),
                task.failures(name),
                difference,
                p,
                bounds,
                verdict,
                "" if math.isnan(budget.k) else f"{budget.k:g}",
                "" if math.isnan(budget.flops) else short(budget.flops),
                name in unequal,
                short(_mean(runs, "test", "active parameters")),
                short(_mean(runs, "test", "FLOPs per token")),
                f"{_mean(runs, 'fit', 'seconds'):.0f}",
                f"{_mean(runs, 'fit', 'peak memory, bytes') / 1e9:.2f}",
            )
        )
    return rows


def _pictures(sweep: Sweep, task: Task, names: Sequence[str], command: str) -> list[Picture]:
    drawn: list[tuple[str, str, Figure | None]] = [
        (
            "Routers",
            "Each dot is a seed; diamonds are means with their 95 % intervals (Student's t); the dashed line is the "
            "baseline.",
            pictures.by_router(task, names, sweep.baseline),
        ),
        ("Training", "Mean over seeds; the band is their range.", pictures.training(task, names)),
        (
            "Quality and cost",
            "Means over seeds; lines are 95 % intervals of the metric. Memory is that of the whole process.",
            pictures.by_cost(task, names),
        ),
        ("Quality and k", "One checkpoint a run, tested with several k.", pictures.by_k(task, names)),
        (
            "Health of the routing",
            "On the validation split, means over layers and seeds; the band is the range of the seeds.",
            pictures.health(task, names),
        ),
    ]
    return [_picture(title, f"{caption} Written by: {command}", figure) for title, caption, figure in drawn if figure]


def _table_by_k(task: Task, names: Sequence[str]) -> Table:
    """Return the metric of one checkpoint a run by the k that it was tested with, means and intervals over seeds."""
    by_variant: dict[str, dict[float, list[float]]] = {}
    for name in names:
        for run in task.runs.get(name, {}).values():
            for k, value in tested_k(run, task.metric):
                by_variant.setdefault(name, {}).setdefault(k, []).append(value)
    tested = sorted({k for found in by_variant.values() for k in found})
    rows = [
        (name, *(_shown(interval(found[k])) if k in found else "" for k in tested))
        for name, found in by_variant.items()
    ]
    return Table(f"{task.metric} by the k of the test", [f"k = {k:g}" for k in tested], rows)


def _table_of_routing(task: Task, names: Sequence[str]) -> Table:
    """Return metrics of the routing at the end of training, means over layers and seeds."""
    by_variant = {name: task.routing(name) for name in names if name in task.runs}
    labels = [label for label in next(iter(by_variant.values()), {}) if any(v[label] for v in by_variant.values())]
    rows = [
        (
            name,
            *(f"{statistics.mean(c[-1][1] for c in v[label].values()):.3f}" if v[label] else "" for label in labels),
        )
        for name, v in by_variant.items()
    ]
    return Table("Routing at the end of training, on the validation split", labels, rows if labels else [])


def _picture(title: str, caption: str, figure: Figure) -> Picture:
    text = io.StringIO()
    # Equal pictures are written as equal bytes.
    with matplotlib.rc_context({"svg.hashsalt": "routerzoo", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return Picture(title, caption, Markup(text.getvalue().partition("<svg")[1] + text.getvalue().partition("<svg")[2]))


def _ranking_rows(sweep: Sweep, ranked: Mapping[str, Interval]) -> list[tuple[str, str]]:
    return [(name, _shown(ranked[name], digits=2)) for name in sorted(ranked, key=lambda name: ranked[name].mean)]


def _run_rows(sweep: Sweep) -> list[dict[str, Any]]:
    rows = []
    for run in sweep.runs:
        row: dict[str, Any] = {
            "task": run.task,
            "variant": run.variant,
            "seed": run.seed,
            "status": run.status,
            "reason": run.reason,
            "attempts": run.attempts,
            "code": run.code,
            "host": run.host,
            "config": f"{run.folder}/{CELL}",
        }
        for stage in ("fit", "test"):
            for name, value in run.results.get(stage, {}).items():
                if not isinstance(value, (list, dict)):
                    row[f"{stage} {name}"] = value
        rows.append(row)
    return rows


def _comparison_rows(analysis: Analysis) -> list[dict[str, Any]]:
    """Return every pair of every task, in both orders."""
    rows = []
    for task, found in analysis.tasks.items():
        for (name, other), comparison in found.pairs.items():
            outlook = found.outlook(comparison)
            rows.append(
                {
                    "task": task,
                    "router": name,
                    "against": other,
                    "is declared": found.results.baselines.get(name) == other,
                    "metric": found.task.metric,
                    "unit": found.results.metric.unit,
                    "seeds": comparison.seeds,
                    "difference": comparison.difference.mean,
                    "difference low": comparison.difference.low,
                    "difference high": comparison.difference.high,
                    "test": comparison.test,
                    "correlation": found.correlation(name, other),
                    "p": comparison.p,
                    "p adjusted": comparison.p_adjusted,
                    "margin": comparison.margin,
                    "p equivalence": comparison.p_equivalence,
                    "p equivalence adjusted": comparison.p_equivalence_adjusted,
                    "bounds low": comparison.bounds.low,
                    "bounds high": comparison.bounds.high,
                    "bounds level": comparison.bounds_level,
                    "verdict": comparison.verdict,
                    "detectable": outlook.detectable,
                    "seeds to settle": "" if outlook.seeds_to_settle is None else outlook.seeds_to_settle,
                    "note": comparison.note,
                }
            )
    return rows


def _mean_rows(analysis: Analysis) -> list[dict[str, Any]]:
    rows, empty = [], Interval(math.nan, math.nan, math.nan)
    for task, found in analysis.tasks.items():
        for name, values in found.task.values.items():
            budget, middle = found.task.budget(name), found.mean(name)
            rows.append(
                {"task": task, "variant": name, "metric": found.task.metric, "seeds": len(values)}
                | {"failed": found.task.failures(name), **middle._asdict()}
                | {"trained k": budget.k, "training FLOPs": budget.flops}
                | {f"improves {key}": value for key, value in analysis.improvements.get(name, empty)._asdict().items()}
            )
    return rows


def _by_k_rows(sweep: Sweep) -> list[dict[str, Any]]:
    known = ("k", "active parameters", "FLOPs per token")
    return [
        {"task": task.name, "variant": variant, "seed": seed}
        | {name: row.get(name, "") for name in known}
        | {"metric": task.metric, "value": row[task.metric]}
        for task in sweep.tasks
        for variant, by_seed in task.runs.items()
        for seed, run in by_seed.items()
        for row in run.results.get("test", {}).get("by k", [])
    ]


def _curve_rows(sweep: Sweep) -> list[dict[str, Any]]:
    """Return the points of all curves over training."""
    rows = []
    for task in sweep.tasks:
        name = f"validation {task.metric}"
        for variant, by_seed in task.curves.items():
            drawn = {name: {seed: curves.get(f"val/{task.metric}", []) for seed, curves in by_seed.items()}}
            rows += [
                {"task": task.name, "variant": variant, "seed": seed, "curve": label, "step": int(step), "value": value}
                for label, curves in (drawn | task.routing(variant)).items()
                for seed, curve in curves.items()
                for step, value in curve
            ]
    return rows


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _what_differs(run: Run, planned: Sequence[Run]) -> str:
    """Describe how an earlier run differs from the most similar planned one."""
    alike = [other for other in planned if (other.task, other.router, other.seed) == (run.task, run.router, run.seed)]
    if not alike:
        return "no run of this task, router and seed is planned"
    found = min((differences(run.config, other.config) for other in alike), key=len)
    if not found:
        return f"other options of the test: {' '.join(run.test) or 'none'}"
    more = f" and {len(found) - LARGEST_DIFFERENCES} more" if len(found) > LARGEST_DIFFERENCES else ""
    return "; ".join(found[:LARGEST_DIFFERENCES]) + more


def _mean(runs: Sequence[Run], stage: str, name: str) -> float:
    values = [run.results.get(stage, {}).get(name) for run in runs]
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def _shown(middle: Interval, signed: bool = False, digits: int = 4) -> str:
    mean = f"{middle.mean:+.{digits}f}" if signed else f"{middle.mean:.{digits}f}"
    if math.isnan(middle.low):
        return mean
    return f"{mean} ({middle.low:.{digits}f} to {middle.high:.{digits}f})"


def _p(p: float) -> str:
    return "" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _template(name: str, *, escape: bool) -> Any:
    source = files("routerzoo.report").joinpath(name).read_text(encoding="utf-8")
    return Environment(autoescape=escape, trim_blocks=True, lstrip_blocks=True).from_string(source)
