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
from routerzoo.report.collect import Sweep, Task, differences, tested_k
from routerzoo.report.statistics import Comparison, Interval, adjusted, compare, interval, mean_ranks
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
    difference: str
    p: str
    verdict: str
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
    compared = {task.name: comparisons(sweep, task) for task in sweep.tasks}
    sections = [
        Section(
            task,
            _rows(sweep, task, names, compared[task.name]),
            _pictures(sweep, task, names, command),
            [table for table in (_table_by_k(task, names), _table_of_routing(task, names)) if table.rows],
        )
        for task in sweep.tasks
    ]
    tables = {task.name: task.values for task in sweep.tasks}
    lower = {task.name: task.lower_is_better for task in sweep.tasks}
    ranked = mean_ranks(tables, lower) if len(sweep.tasks) > 1 else {}
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
        "findings": findings(sweep, compared, ranked),
        "margin": f"{100 * sweep.margin:g} %",
        "log": LOG,
    }
    written = {
        "report.html": _template("page.html.jinja", escape=True).render(content),
        "report.md": re.sub(r"\n{3,}", "\n\n", _template("page.md.jinja", escape=False).render(content)),
        "runs.csv": _csv(_run_rows(sweep)),
        "comparisons.csv": _csv(_comparison_rows(sweep, compared)),
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


def comparisons(sweep: Sweep, task: Task) -> dict[str, Comparison]:
    """Compare every variant of a task with its baseline, corrected for their number."""
    found = {}
    for name, values in task.values.items():
        baseline = sweep.baseline_of(name)
        if baseline is None or baseline == name or baseline not in task.values:
            continue
        comparison = compare(values, task.values[baseline], sweep.margin, task.lower_is_better)
        if comparison is not None:
            found[name] = comparison
    return adjusted(found, task.lower_is_better)


def findings(
    sweep: Sweep, compared: Mapping[str, Mapping[str, Comparison]], ranked: Mapping[str, Interval]
) -> list[str]:
    """Return the findings in sentences."""
    told = []
    for task in sweep.tasks:
        most = max(len(values) for values in task.values.values())
        fewer = [name for name, values in task.values.items() if len(values) < most]
        # A mean over fewer seeds is no rival: whichever seeds it has may be the easy ones.
        means = {n: interval(list(values.values())).mean for n, values in task.values.items() if n not in fewer}
        best = (min if task.lower_is_better else max)(means, key=lambda name: means[name])
        by_verdict: dict[str, list[str]] = {}
        for name, comparison in compared[task.name].items():
            by_verdict.setdefault(comparison.verdict, []).append(name)
        sentence = f"{task.name}: the best mean {task.metric} is {means[best]:.4f}, of {best}."
        if fewer:
            sentence += f" Left out, with fewer seeds: {', '.join(fewer)}."
        texts = {
            "better": "Significantly better than {}: {}.",
            "worse": "Significantly worse than {}: {}.",
            "equivalent": f"Equivalent to {{}} within {100 * sweep.margin:g} %: {{}}.",
            "inconclusive": "Inconclusive against {} with so few seeds: {}.",
        }
        for verdict, text in texts.items():
            if verdict in by_verdict:
                sentence += " " + text.format(sweep.baseline, ", ".join(by_verdict[verdict]))
        told.append(sentence)
    if ranked:
        lowest = min(middle.mean for middle in ranked.values())
        first = [name for name, middle in ranked.items() if math.isclose(middle.mean, lowest)]
        highest = max(ranked[name].high for name in first)
        rivals = [name for name in ranked if name not in first and not ranked[name].low > highest]
        has = "has the best mean rank" if len(first) == 1 else "share the best mean rank"
        sentence = f"Over {len(sweep.tasks)} tasks {' and '.join(first)} {has}, {lowest:.2f}."
        sentence += f" The intervals of {', '.join(rivals)} overlap with that." if rivals else ""
        told.append(sentence)
    lost = [run for run in sweep.runs if run.status == "failed"]
    waiting = [run for run in sweep.runs if run.status in ("waiting", "running")]
    if lost or waiting:
        told.append(f"The numbers exclude {len(lost)} failed and {len(waiting)} pending runs.")
    return told


def _rows(sweep: Sweep, task: Task, names: Sequence[str], compared: Mapping[str, Comparison]) -> list[Row]:
    rows = []
    for name in names:
        if name not in task.values:
            continue
        values = list(task.values[name].values())
        runs = list(task.runs[name].values())
        comparison = compared.get(name)
        difference, p, verdict = "", "", "baseline" if sweep.baseline_of(name) == name else "no common seed"
        if comparison is not None:
            difference = _shown(comparison.difference, signed=True)
            p = "" if math.isnan(comparison.p_adjusted) else f"{comparison.p_adjusted:.3f}"
            verdict = comparison.verdict
        rows.append(
            Row(
                name,
                _shown(interval(values)),
                len(values),
                difference,
                p,
                verdict,
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


def _comparison_rows(sweep: Sweep, compared: Mapping[str, Mapping[str, Comparison]]) -> list[dict[str, Any]]:
    rows = []
    for task in sweep.tasks:
        for name, values in task.values.items():
            middle, comparison = interval(list(values.values())), compared[task.name].get(name)
            row: dict[str, Any] = {"task": task.name, "variant": name, "metric": task.metric, "seeds": len(values)}
            row |= {"mean": middle.mean, "low": middle.low, "high": middle.high}
            if comparison is not None:
                row |= {
                    "difference": comparison.difference.mean,
                    "difference low": comparison.difference.low,
                    "difference high": comparison.difference.high,
                    "p": comparison.p,
                    "p adjusted": comparison.p_adjusted,
                    "p equivalence": comparison.p_equivalence,
                    "margin": comparison.margin,
                    "verdict": comparison.verdict,
                }
            rows.append(row)
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


def _template(name: str, *, escape: bool) -> Any:
    source = files("routerzoo.report").joinpath(name).read_text(encoding="utf-8")
    return Environment(autoescape=escape, trim_blocks=True, lstrip_blocks=True).from_string(source)
