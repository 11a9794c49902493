"""The page's pictures as SVG files: a heat map of regret, and performance profiles.

They are templates and not drawn by matplotlib: text stays text, and equal rows give equal bytes under any version of
it. Each has its own background and colors for light and dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, NamedTuple

from jinja2 import Environment
from matplotlib import colormaps

from routerzoo.bench.leaderboard.board import Board, Standing
from routerzoo.report.palette import COLORS

WORST = 1.2
"""Regret beyond which the color does not change."""
DARK = 118
"""Brightness below which white text has more contrast than black."""


class Tile(NamedTuple):
    """A cell of the heat map: its text, its color (none: nothing to show) and what a pointer on it is told."""

    text: str
    color: str
    ink: str
    about: str


class Line(NamedTuple):
    """A profile; it has a label where it is not one of the many in the background."""

    points: str
    color: str
    dashes: str
    label: str


def heat_map(board: Board) -> str:
    """Return regret by router and task, with the dense network as a row."""
    rows = [
        {
            "router": standing.router + ("" if standing.is_comparable else " *"),
            "is_control": standing.family == "control",
            "tiles": [_mean(board, standing)] + [_cell(board, task, standing.router) for task in board.tasks],
        }
        for standing in board.standings
    ]
    complete = sum(map(board.is_complete, board.standings))
    return _rendered("heat_map.svg.jinja", rows=rows, tasks=["mean", *board.tasks], complete=complete, scale=_scale())


def profiles(board: Board) -> str:
    """Return the share of runs with a regret of at most tau: each family's best, the linear gate and the dense network.

    All others that were run in all tasks are lines in the background.
    """
    complete = [standing for standing in board.standings if board.is_complete(standing)]
    named = _named(complete)
    dashes = ("", "6 3", "2 2", "7 2 2 2")
    lines = [Line(_points(board, one), "", "", "") for one in complete if one not in named]
    number = 0
    for one in named:
        ink = one.family == "control" or one.router == board.baseline(one.tasks[0])
        style = dashes[1 if one.family == "control" else 0] if ink else dashes[number // len(COLORS) % len(dashes)]
        color = "var(--ink)" if ink else COLORS[number % len(COLORS)]
        number += not ink
        lines.append(Line(_points(board, one), color, style, one.router + ("" if one.is_comparable else " *")))
    return _rendered("profiles.svg.jinja", lines=lines, top=board.thresholds[-1], x=_x, y=_y)


def _named(complete: Sequence[Standing]) -> list[Standing]:
    best: dict[str, Standing] = {}
    for standing in complete:
        best.setdefault(standing.family, standing)
    return list(best.values())


def _points(board: Board, standing: Standing) -> str:
    found = zip(board.thresholds, standing.profile_X, strict=True)
    return " ".join(f"{_x(tau):.1f},{_y(share):.1f}" for tau, share in found)


def _x(tau: float) -> float:
    return 50 + 360 * tau


def _y(share: float) -> float:
    return 320 - 300 * share


def _mean(board: Board, standing: Standing) -> Tile:
    """Return the mean over tasks; in brackets and without a color where it is of fewer tasks."""
    mean, where = standing.mean.mean, f"{standing.router}, mean of {len(standing.tasks)} tasks"
    return _tile(mean, where) if board.is_complete(standing) else Tile(f"({mean:.2f})", "", "", where)


def _cell(board: Board, task: str, router: str) -> Tile:
    where = f"{router} in {task}"
    if (refused := board.refused.get((task, router))) is not None:
        return Tile("n/a", "", "", f"{where}: {refused.reason}")
    summary = board.summary(task, router)
    if summary is None:
        return Tile("-", "", "", f"{where}: not run")
    failed, runs = len(summary.failures), len(summary.scores)
    if failed == runs:
        return Tile("failed", "", "", f"{where}: all {runs} runs failed, {summary.failures[0].reason}")
    tile = _tile(summary.regret, where)
    if failed:
        return tile._replace(text=f"{tile.text} †", about=f"{tile.about}; {failed} of {runs} runs failed")
    return tile


def _tile(regret: float, about: str) -> Tile:
    if math.isnan(regret):
        return Tile("-", "", "", about)
    color = _color(regret)
    red, green, blue = (int(color[place : place + 2], 16) for place in (1, 3, 5))
    ink = "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < DARK else "#000000"
    return Tile(f"{regret:.2f}", color, ink, f"{about}: {regret:.3f}")


def _color(regret: float) -> str:
    """Return a color that the color-blind order as others do, dark where regret is low."""
    red, green, blue, _ = colormaps["viridis"](min(max(regret, 0.0), WORST) / WORST, bytes=True)
    return f"#{red:02x}{green:02x}{blue:02x}"


def _scale() -> list[Tile]:
    return [_tile(step / 5, "scale") for step in range(7)]


def _rendered(name: str, **content: Any) -> str:
    template = files("routerzoo.bench.leaderboard").joinpath(name).read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return environment.from_string(template).render(content)
