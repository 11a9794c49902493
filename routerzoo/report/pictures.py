"""Pictures of a sweep, as figures; `page` adds them to the report."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from routerzoo.report.collect import Curve, Task, tested_k
from routerzoo.report.statistics.intervals import Interval, interval


def colors(names: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Return one color for each name, the same in every picture."""
    palette = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"]
    return {name: palette(place % palette.N) for place, name in enumerate(names)}


def by_router(task: Task, names: Sequence[str], baseline: str) -> Figure:
    """Draw the metric of every router: each seed, the mean and its interval."""
    figure, (ax,) = _panels(1, width=7.0, height=0.5 + 0.38 * len(names))
    known = [name for name in reversed(names) if task.finished(name)]
    palette = colors(names)
    for place, name in enumerate(known):
        values = task.finished(name)
        middle = interval(values)
        ax.plot(values, [place] * len(values), "o", color=palette[name], alpha=0.35, markersize=5)
        _bar(ax, middle, place, palette[name])
        if name == baseline:
            ax.axvline(middle.mean, color="gray", linestyle="--", linewidth=1)
    ax.set_yticks(range(len(known)), labels=known)
    ax.set(xlabel=f"{task.metric} of the test split ({_direction(task)})")
    ax.grid(axis="x", alpha=0.3)
    return figure


def training(task: Task, names: Sequence[str]) -> Figure:
    """Draw the validation metric over training: mean and range over seeds."""
    figure, (ax,) = _panels(1, width=7.0, height=3.6)
    palette = colors(names)
    for name in names:
        curves = [seeds.get(f"val/{task.metric}", []) for seeds in task.curves.get(name, {}).values()]
        _band(ax, curves, name, palette[name])
    ax.set(xlabel="step", ylabel=f"validation {task.metric}")
    _finish(ax)
    return figure


COSTS = {
    "active parameters": ("active parameters", "test"),
    "FLOPs per token": ("FLOPs per token, forward", "test"),
    "seconds": ("seconds of training", "fit"),
    "peak memory, bytes": ("peak memory, bytes", "fit"),
}


def by_cost(task: Task, names: Sequence[str]) -> Figure:
    """Draw the metric against the costs of the routers."""
    figure, axes = _panels(len(COSTS), width=3.0 * len(COSTS), height=3.2)
    palette = colors(names)
    for ax, (key, (label, stage)) in zip(axes, COSTS.items(), strict=True):
        for name in names:
            runs = task.runs.get(name, {})
            costs = [run.results.get(stage, {}).get(key) for run in runs.values()]
            known = [cost for cost in costs if cost is not None]
            if not known or not task.finished(name):
                continue
            middle = interval(task.finished(name))
            ax.plot(np.mean(known), middle.mean, "o", color=palette[name], label=name)
            if not math.isnan(middle.low):
                ax.plot([np.mean(known)] * 2, [middle.low, middle.high], color=palette[name], alpha=0.6)
        ax.set(xlabel=label)
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.xaxis.set_major_formatter(EngFormatter(sep=" "))
        ax.grid(alpha=0.3)
    axes[0].set(ylabel=f"{task.metric} ({_direction(task)})")
    _legend_below(figure, axes[0])
    return figure


def by_k(task: Task, names: Sequence[str]) -> Figure | None:
    """Draw the metric against the k that one checkpoint is tested with; None where one k was tested."""
    figure, (ax,) = _panels(1, width=7.0, height=3.6)
    palette, drawn = colors(names), False
    for name in names:
        curves = [tested_k(run, task.metric) for run in task.runs.get(name, {}).values()]
        if any(curves):
            _band(ax, curves, name, palette[name])
            drawn = True
    ax.set(xlabel="experts per token in the test", ylabel=f"{task.metric} ({_direction(task)})")
    if not drawn:
        return None
    _finish(ax)
    return figure


def health(task: Task, names: Sequence[str]) -> Figure | None:
    """Draw metrics of the routing over training, on the validation split, as means over layers and seeds."""
    palette = colors(names)
    by_variant = {name: task.routing(name) for name in names}
    known = [
        (label, {name: list(found[label].values()) for name, found in by_variant.items()})
        for label in next(iter(by_variant.values()), {})
        if any(found[label] for found in by_variant.values())
    ]
    if not known:
        return None
    figure, axes = _panels(len(known), width=9.0, height=2.6 * math.ceil(len(known) / 3), columns=3)
    for ax, (label, by_name) in zip(axes, known, strict=False):
        for name, seeds in by_name.items():
            _band(ax, seeds, name, palette[name])
        ax.set(xlabel="step")
        ax.set_title(textwrap.fill(label, 30), fontsize=9)
        ax.grid(alpha=0.3)
        if ax.get_ylim()[0] < 0 <= ax.dataLim.y0:  # a margin below 0 would show impossible values
            ax.set_ylim(bottom=0)
    _legend_below(figure, axes[0])
    return figure


def ranking(mean_ranks: Mapping[str, Interval], names: Sequence[str]) -> Figure:
    """Draw the mean rank over tasks, the best on top."""
    ordered = sorted(mean_ranks, key=lambda name: -mean_ranks[name].mean)
    figure, (ax,) = _panels(1, width=7.0, height=0.5 + 0.38 * len(ordered))
    palette = colors(names)
    for place, name in enumerate(ordered):
        _bar(ax, mean_ranks[name], place, palette[name])
    ax.set_yticks(range(len(ordered)), labels=ordered)
    ax.set(xlabel="mean rank over tasks (1 is best)")
    ax.grid(axis="x", alpha=0.3)
    return figure


def _panels(count: int, *, width: float, height: float, columns: int | None = None) -> tuple[Figure, list[Axes]]:
    columns = min(columns or count, count)
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(math.ceil(count / columns), columns, squeeze=False)
    axes = [ax for row in grid for ax in row]
    for ax in axes[count:]:
        ax.set_axis_off()
    return figure, axes


def _bar(ax: Axes, middle: Interval, place: float, color: tuple[float, ...]) -> None:
    if not math.isnan(middle.low):
        ax.plot([middle.low, middle.high], [place, place], color=color, linewidth=2)
    ax.plot([middle.mean], [place], "D", color=color, markersize=6)


def _band(ax: Axes, curves: Sequence[Curve], name: str, color: tuple[float, ...]) -> None:
    by_step: dict[float, list[float]] = {}
    for curve in curves:
        for step, value in curve:
            by_step.setdefault(step, []).append(value)
    if not by_step:
        return
    steps = sorted(by_step)
    ax.plot(steps, [float(np.mean(by_step[step])) for step in steps], marker=".", color=color, label=name)
    ax.fill_between(
        steps, [min(by_step[s]) for s in steps], [max(by_step[s]) for s in steps], color=color, alpha=0.15, linewidth=0
    )


def _finish(ax: Axes) -> None:
    ax.grid(alpha=0.3)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=8)


def _legend_below(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), fontsize=8)


def _direction(task: Task) -> str:
    return "lower is better" if task.lower_is_better else "higher is better"
