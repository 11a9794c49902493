"""The numbers of a report as rows: those of its CSV files, and the columns of the page's table that show them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from routerzoo.costs import short
from routerzoo.report.analysis import Analysis, TaskAnalysis
from routerzoo.report.collect import Sweep
from routerzoo.report.compute import Compute
from routerzoo.report.pictures import grid_of, pareto
from routerzoo.report.statistics.intervals import Interval
from routerzoo.sweep.ledger import Run
from routerzoo.sweep.work import CELL

Rows = list[dict[str, Any]]
_NONE = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Column:
    """A column of the page's table.

    Args:
        key: column of `means.csv` that it is sorted by.
        header: on the page.
        show: text of a row.
        is_text: or a number.
    """

    key: str
    header: str
    show: Callable[[Mapping[str, Any]], str]
    is_text: bool = False


def columns(metric: str, direction: str) -> list[Column]:
    """Return the columns of the table of a task."""
    bits = [Column("bits per byte", "bits per byte", lambda row: _plain(row["bits per byte"], ".4f"))]
    return [
        Column("mean", f"{metric} ({direction})", lambda row: shown(Interval(row["mean"], row["low"], row["high"]))),
        *(bits if metric == "ppl" else ()),
        Column("standing", "beside the best", lambda row: row["standing"], is_text=True),
        Column("seeds", "seeds", lambda row: str(row["seeds"])),
        Column("failed", "failed", lambda row: str(row["failed"]) if row["failed"] else "0"),
        Column("trained k", "trained k", lambda row: _plain(row["trained k"], "g")),
        Column("training FLOPs", "training FLOPs", lambda row: _short(row["training FLOPs"])),
        Column("difference", "from the baseline", lambda row: _signed(row["difference"])),
        Column("p adjusted", "corrected p", lambda row: _p(row["p adjusted"])),
        Column("verdict", "verdict", lambda row: row["verdict"], is_text=True),
        Column("active parameters", "active parameters", lambda row: _short(row["active parameters"])),
        Column("FLOPs per token", "FLOPs per token", lambda row: _short(row["FLOPs per token"])),
        Column("training seconds", "training, s", lambda row: _plain(row["training seconds"], ".0f")),
        Column("peak memory, GB", "memory, GB", lambda row: _plain(row["peak memory, GB"], ".2f")),
    ]


def mean_rows(analysis: Analysis) -> Rows:
    """Return a row for each router of each task."""
    return [row for found in analysis.tasks.values() for row in _of_task(found, analysis)]


def _of_task(found: TaskAnalysis, analysis: Analysis) -> Rows:
    rows, task, best = [], found.task, found.best
    standings = {best.router or "": "best", **dict.fromkeys(best.as_good, "as good")}
    standings |= dict.fromkeys(best.open, "open") | dict.fromkeys(best.worse, "worse")
    standings |= dict.fromkeys(best.left_out, "fewer seeds")
    unequal = found.unequal()
    for name, values in task.values.items():
        runs, budget, pair = list(task.runs.get(name, {}).values()), task.budget(name), found.against_baseline(name)
        rows.append(
            {"task": task.name, "router": name, "metric": task.metric, "seeds": len(values)}
            | {"failed": task.failures(name), **found.mean(name)._asdict(), "standing": standings.get(name, "")}
            | {"bits per byte": _mean(runs, "test", "bpb")}
            | {"trained k": budget.k, "training FLOPs": budget.flops}
            | {"unequal": " ".join(what for what, names in unequal.items() if name in names)}
            | {"difference": pair.difference.mean if pair else math.nan}
            | {"p adjusted": pair.p_adjusted if pair else math.nan}
            | {"verdict": pair.verdict if pair else "" if name in found.results.baselines else "baseline"}
            | {"active parameters": _mean(runs, "test", "active parameters")}
            | {"FLOPs per token": _mean(runs, "test", "FLOPs per token")}
            | {"training seconds": _mean(runs, "fit", "seconds")}
            | {"peak memory, GB": _mean(runs, "fit", "peak memory, bytes") / 1e9}
            | {f"improves {key}": value for key, value in analysis.improvements.get(name, _NONE)._asdict().items()}
        )
    return rows


def run_rows(sweep: Sweep) -> Rows:
    """Return a row for each run."""
    rows = []
    for run in sweep.runs:
        row = {"task": run.task, "variant": run.variant, "seed": run.seed, "status": run.status, "reason": run.reason}
        row |= {"attempts": run.attempts, "code": run.code, "host": run.host, "config": f"{run.folder}/{CELL}"}
        for stage in ("fit", "test"):
            found = run.results.get(stage, {})
            row |= {f"{stage} {k}": value for k, value in found.items() if not isinstance(value, (list, dict))}
        rows.append(row)
    return rows


def comparison_rows(analysis: Analysis) -> Rows:
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


def by_k_rows(sweep: Sweep) -> Rows:
    """Return the tests of one checkpoint at several k."""
    known = ("k", "active parameters", "FLOPs per token")
    return [
        {"task": task.name, "router": router, "seed": seed}
        | {name: row.get(name, "") for name in known}
        | {"metric": task.metric, "value": row[task.metric]}
        for task in sweep.tasks
        for router, by_seed in task.runs.items()
        for seed, run in by_seed.items()
        for row in run.results.get("test", {}).get("by k") or []
    ]


def curve_rows(sweep: Sweep) -> Rows:
    """Return the points of all curves over training."""
    rows = []
    for task in sweep.tasks:
        name = f"validation {task.metric}"
        for router, by_seed in task.curves.items():
            drawn = {name: {seed: curves.get(f"val/{task.metric}", []) for seed, curves in by_seed.items()}}
            rows += [
                {"task": task.name, "router": router, "seed": seed, "curve": label, "step": int(step), "value": value}
                for label, curves in (drawn | task.routing(router)).items()
                for seed, curve in curves.items()
                for step, value in curve
            ]
    return rows


def front_rows(computes: Sequence[Compute]) -> Rows:
    """Return the points of quality against training FLOPs, and which are on the front."""
    rows = []
    for found in computes:
        lower = found.parts[0].task.lower_is_better
        front = pareto({key: middle.mean for key, middle in found.points.items()}, lower) if found.points else []
        rows += [
            {"task": found.name, "router": router, "training FLOPs": flops, **middle._asdict()}
            | {"is on the front": (router, flops) in front}
            for (router, flops), middle in found.points.items()
        ]
    return rows


def scaling_rows(computes: Sequence[Compute], baseline: str) -> Rows:
    """Return the fitted laws: L = a (C / unit)^-b + c."""
    rows = []
    for found in computes:
        if (fit := found.fit) is None:
            continue
        for place, router in enumerate(fit.routers):
            row = {"task": found.name, "router": router, "a": fit.a_DR[0, place], "unit, FLOPs": fit.unit}
            row |= {"b": fit.b[0], "b low": fit.exponent.low, "b high": fit.exponent.high, "c": fit.c[0]}
            if baseline in fit.routers:
                row |= {f"multiplier {k}": v for k, v in fit.multiplier(router, baseline)._asdict().items()}
            rows.append(row)
    return rows


def multiplier_rows(computes: Sequence[Compute], baseline: str) -> Rows:
    """Return the compute multipliers at each budget by itself."""
    return [
        {"task": found.name, "router": router, "training FLOPs": compute, **middle._asdict()}
        for found in computes
        if found.fit is not None and baseline in found.fit.routers
        for router in found.fit.routers
        for compute, middle in found.fit.multipliers(router, baseline).items()
    ]


def scaling_curve_rows(computes: Sequence[Compute]) -> Rows:
    """Return the laws and their bands, at 60 points each."""
    rows = []
    for found in computes:
        for router in found.fit.routers if found.fit else ():
            compute = grid_of([flops for name, flops in found.losses if name == router])
            drawn = zip(compute, *found.fit.curve(router, compute), strict=True)  # type: ignore[union-attr]
            rows += [
                {"task": found.name, "router": router, "training FLOPs": x, "loss": y, "low": low, "high": high}
                for x, y, low, high in drawn
            ]
    return rows


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows; columns in the order in which they appear."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def shown(middle: Interval, digits: int = 4) -> str:
    """Write a mean with its interval."""
    if math.isnan(middle.mean):
        return ""
    bounds = "" if math.isnan(middle.low) else f" ({middle.low:.{digits}f} to {middle.high:.{digits}f})"
    return f"{middle.mean:.{digits}f}{bounds}"


def _mean(runs: Sequence[Run], stage: str, name: str) -> float:
    values = [run.results.get(stage, {}).get(name) for run in runs]
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def _plain(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


def _signed(value: float) -> str:
    return _plain(value, "+.4f")


def _short(value: float) -> str:
    return "" if math.isnan(value) else short(value)


def _p(p: float) -> str:
    return "" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"
