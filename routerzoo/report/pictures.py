"""Pictures of a report, as figures; `None` where there is nothing to draw, and the page says why in a sentence.

A figure is as wide as a telephone: wider pages put several side by side.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from routerzoo.report.collect import Curve, Task, tested_k
from routerzoo.report.palette import INK, LOOK, PAPER, Style
from routerzoo.report.statistics.intervals import Interval
from routerzoo.report.statistics.scaling import ScalingFit

WIDTH, HEIGHT = 5.2, 3.2
"""Inches."""


@contextmanager
def _panel(height: float) -> Iterator[tuple[Figure, Axes]]:
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.subplots()
        ax.grid(linewidth=0.6)
        ax.set_axisbelow(True)
        yield figure, ax


def _high_enough(names: Collection[str]) -> float:
    """Return a height with room for a label each."""
    return max(HEIGHT, 0.8 + 0.17 * len(names))


def by_router(
    values: Mapping[str, Sequence[float]], means: Mapping[str, Interval], known: Mapping[str, Style]
) -> Figure:
    """Draw the metric of every router: each seed, the mean and its interval."""
    names = [name for name in reversed(list(known)) if values.get(name)]
    with _panel(0.7 + 0.3 * len(names)) as (figure, ax):
        for place, name in enumerate(names):
            style = known[name]
            seeds = ax.plot(values[name], [place] * len(values[name]), style.marker, color=style.color, alpha=0.3, ms=4)
            _own(seeds, style, name)
            _mark(ax, means[name], place, style, name)
        ax.set_yticks(range(len(names)), labels=names)
        ax.set_ylim(-0.7, len(names) - 0.3)
        ax.grid(visible=False, axis="y")
        ax.xaxis.set_major_locator(MaxNLocator(5))
    return figure


def ranking(ranks: Mapping[str, Interval], known: Mapping[str, Style]) -> Figure:
    """Draw the mean rank over tasks, the best on top."""
    names = sorted(ranks, key=lambda name: -ranks[name].mean)
    with _panel(0.7 + 0.3 * len(names)) as (figure, ax):
        for place, name in enumerate(names):
            _mark(ax, ranks[name], place, known[name], name)
        ax.set_yticks(range(len(names)), labels=names)
        ax.set_ylim(-0.7, len(names) - 0.3)
        ax.set(xlabel="mean rank over tasks (1 is best)")
    return figure


def curves(
    by_router: Mapping[str, Sequence[Curve]],
    known: Mapping[str, Style],
    xlabel: str,
    ylabel: str,
    *,
    log: bool = False,
    zero: bool = False,
) -> Figure | None:
    """Draw curves by router: the mean over seeds, and their range as a band.

    Args:
        by_router: a curve for each seed.
        known: the styles.
        xlabel: of the axis.
        ylabel: likewise.
        log: x may be logarithmic.
        zero: mark 0, which is the baseline.
    """
    drawn = {name: found for name, found in by_router.items() if any(map(len, found))}
    if not drawn:
        return None
    with _panel(_high_enough(drawn)) as (figure, ax):
        ends = {}
        for name, found in drawn.items():
            by_x: dict[float, list[float]] = {}
            for x, y in (point for curve in found for point in curve):
                by_x.setdefault(x, []).append(y)
            steps, style = sorted(by_x), known[name]
            means = [float(np.mean(by_x[x])) for x in steps]
            _own(ax.plot(steps, means, style.line, color=style.color, marker=style.marker, ms=4, lw=1.4), style, name)
            band = ax.fill_between(
                steps, [min(by_x[x]) for x in steps], [max(by_x[x]) for x in steps], color=style.color, alpha=0.12, lw=0
            )
            _own([band], style, name)
            ends[name] = (steps[-1], means[-1])
        if log:
            _log_scale(ax)
        else:
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if zero:
            ax.axhline(0.0, color=INK, linestyle="--", lw=1)
        elif ax.get_ylim()[0] < 0 <= ax.dataLim.y0:  # a margin below 0 would show impossible values
            ax.set_ylim(bottom=0)
        _label_ends(ax, ends, known)
        ax.set(xlabel=xlabel, ylabel=ylabel)
    return figure


def front(points: Mapping[tuple[str, float], Interval], known: Mapping[str, Style], task: Task) -> Figure:
    """Draw the metric against training FLOPs, and the front: what no other point beats in both."""
    with _panel(_high_enough({name for name, _ in points})) as (figure, ax):
        ends: dict[str, tuple[float, float]] = {}
        for (name, flops), middle in points.items():
            _mark(ax, middle, flops, known[name], name, upright=True)
            ends[name] = max(ends.get(name, (0.0, 0.0)), (flops, middle.mean))
        on_front = pareto({key: middle.mean for key, middle in points.items()}, task.lower_is_better)
        x, y = zip(*[(flops, points[name, flops].mean) for name, flops in on_front], strict=True)
        ax.step(x, y, where="post", color=INK, lw=1, alpha=0.5, zorder=1)
        _log_scale(ax)
        _label_ends(ax, ends, known)
        ax.set(xlabel="training FLOPs", ylabel=f"{task.metric} ({direction(task)})")
    return figure


def against_baseline(
    found: Mapping[tuple[str, float], Interval], known: Mapping[str, Style], ylabel: str, level: float = 0.0
) -> Figure:
    """Draw differences from the baseline at the same place of the grid, or ratios to it, by training FLOPs.

    Args:
        found: by router and training FLOPs.
        known: how routers are drawn.
        ylabel: what is drawn.
        level: where the baseline is.
    """
    with _panel(_high_enough({name for name, _ in found})) as (figure, ax):
        ends: dict[str, tuple[float, float]] = {}
        for name in dict.fromkeys(name for name, _ in found):
            own = sorted((flops, middle) for (router, flops), middle in found.items() if router == name)
            x, y = [flops for flops, _ in own], [middle.mean for _, middle in own]
            style = known[name]
            _own(ax.plot(x, y, style.line, color=style.color, lw=1.2), style, name)
            for flops, middle in own:
                _mark(ax, middle, flops, style, name, upright=True)
            ends[name] = (x[-1], y[-1])
        ax.axhline(level, color=INK, linestyle="--", lw=1)
        _log_scale(ax)
        _label_ends(ax, ends, known)
        ax.set(xlabel="training FLOPs", ylabel=ylabel)
    return figure


def pareto(points: Mapping[tuple[str, float], float], lower_is_better: bool) -> list[tuple[str, float]]:
    """Return the points that none with as few FLOPs beats, by rising FLOPs.

    Args:
        points: metric by name and FLOPs.
        lower_is_better: of the metric.
    """
    sign, best, found = (1 if lower_is_better else -1), math.inf, []
    for key, value in sorted(points.items(), key=lambda item: (item[0][1], sign * item[1])):
        if sign * value < best:
            best = sign * value
            found.append(key)
    return found


def scaling(
    fit: ScalingFit, means: Mapping[tuple[str, float], Interval], known: Mapping[str, Style], ylabel: str
) -> Figure:
    """Draw losses by training FLOPs with the fitted laws and their bands."""
    with _panel(_high_enough(fit.routers)) as (figure, ax):
        ends = {}
        for name in fit.routers:
            style = known[name]
            own = [flops for router, flops in means if router == name]
            compute = grid_of(own)
            loss, low, high = fit.curve(name, compute)
            _own(ax.plot(compute, loss, style.line, color=style.color, lw=1.4), style, name)
            _own([ax.fill_between(compute, low, high, color=style.color, alpha=0.15, lw=0)], style, name)
            for flops in own:
                _mark(ax, means[name, flops], flops, style, name, upright=True)
            ends[name] = (compute[-1], float(loss[-1]))
        _log_scale(ax)
        _label_ends(ax, ends, known)
        ax.set(xlabel="training FLOPs", ylabel=ylabel)
    return figure


def grid_of(budgets: Sequence[float]) -> np.ndarray:
    """Return the training FLOPs at which a law is drawn."""
    return np.geomspace(min(budgets), max(budgets), 60)


def tuning(pairs: Mapping[str, tuple[Interval, Interval]], known: Mapping[str, Style], xlabel: str) -> Figure:
    """Draw what tuning has changed, by router: untuned hollow, tuned filled."""
    names = list(pairs)[::-1]
    with _panel(0.7 + 0.3 * len(names)) as (figure, ax):
        for place, name in enumerate(names):
            before, after = pairs[name]
            style = known[name]
            _own(ax.plot([before.mean, after.mean], [place, place], color=style.color, lw=1, alpha=0.6), style, name)
            _mark(ax, before, place + 0.13, style, f"{name} untuned", hollow=True)
            _mark(ax, after, place - 0.13, style, f"{name} tuned")
        ax.set_yticks(range(len(names)), labels=names)
        ax.set_ylim(-0.7, len(names) - 0.3)
        ax.grid(visible=False, axis="y")
        ax.set(xlabel=xlabel)
    return figure


def by_k(task: Task, known: Mapping[str, Style]) -> Figure | None:
    """Draw the metric against the k that one checkpoint is tested with; None where one k was tested."""
    found = {name: [tested_k(run, task.metric) for run in task.runs.get(name, {}).values()] for name in known}
    return curves(found, known, "experts per token in the test", f"{task.metric} ({direction(task)})")


def direction(task: Task) -> str:
    """Say which way is better."""
    return "lower is better" if task.lower_is_better else "higher is better"


def _mark(
    ax: Axes, middle: Interval, place: float, style: Style, label: str, *, upright: bool = False, hollow: bool = False
) -> None:
    """Draw a mean with its interval, which lies, or is upright."""
    shown = f"{label}: {middle.mean:.4g}"
    if not math.isnan(middle.low):
        bounds, places = [middle.low, middle.high], [place, place]
        _own(ax.plot(*((places, bounds) if upright else (bounds, places)), color=style.color, lw=1.8), style, label)
        shown += f" ({middle.low:.4g} to {middle.high:.4g})"
    x, y = (place, middle.mean) if upright else (middle.mean, place)
    face = PAPER if hollow else style.color
    _own(ax.plot([x], [y], style.marker, color=style.color, markerfacecolor=face, ms=6), style, shown)


def _own(artists: Sequence[Artist], style: Style, label: str) -> None:
    """Say which router artists are of."""
    for artist in artists:
        artist.set_gid(f"series:{style.place}:{label}")


def _label_ends(ax: Axes, ends: Mapping[str, tuple[float, float]], known: Mapping[str, Style]) -> None:
    """Write each name beside the last point of its marks, moved apart where they are close."""
    height = ax.get_figure().get_size_inches()[1] * 72 * 0.8  # type: ignore[union-attr]
    ax.autoscale_view()  # which matplotlib would put off until it draws
    to_axes = ax.transData + ax.transAxes.inverted()
    places = {name: float(to_axes.transform(end)[1]) for name, end in ends.items()}
    names = sorted(places, key=lambda name: places[name])
    at = np.array([places[name] for name in names])
    gap = 10.5 / height
    for _ in range(200):  # push neighbors apart
        for below, above in pairwise(range(len(at))):
            lack = gap - (at[above] - at[below])
            if lack > 1e-4:
                at[below] -= lack / 2
                at[above] += lack / 2
    at += max(0.0, 0.03 - at[0])  # above the labels of the axis
    for name, y in zip(names, at, strict=True):  # in the color of text, which all can read, with the router's marker
        style = known[name]
        line = {"arrowstyle": "-", "color": style.color, "lw": 0.7, "shrinkA": 0, "shrinkB": 4, "relpos": (0, 0.5)}
        text = ax.annotate(
            name,
            ends[name],
            (1.075, y),
            textcoords="axes fraction",
            va="center",
            fontsize=8.5,
            annotation_clip=False,
            arrowprops=line,
        )
        marker = ax.plot([1.05], [y], style.marker, color=style.color, ms=4, transform=ax.transAxes, clip_on=False)
        _own([text, *marker], style, name)


def _log_scale(ax: Axes) -> None:
    """Make x logarithmic where it spans more than a factor of three."""
    low, high = ax.dataLim.intervalx
    if low > 0 and high > 3 * low:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
        ax.xaxis.set_minor_formatter(NullFormatter())
    else:
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(EngFormatter(sep=" ") if high >= 10_000 else ScalarFormatter())
