"""How routers look in every picture: a color that the color-blind can tell from the others, a marker and a line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

INK, GRID, PAPER = "#010203", "#040506", "#070809"
"""Stand for the page's colors of text, of lines behind the data, and of the page, until the picture is on it."""
# Okabe and Ito 2008. Not their yellow, which is too light for lines; their black is the ink.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GLYPHS = dict(zip(MARKERS, "●■▲◆▼✚✖", strict=True))
"""Markers as characters."""
LINES = ("-", "--", ":", "-.")

LOOK: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "font.size": 9,
    "axes.xmargin": 0.06,
    "axes.ymargin": 0.06,
}
"""Settings of matplotlib, for drawing and for writing."""


class Style(NamedTuple):
    """Of a router. `place` numbers it: its marks on the page have the class `s<place>`."""

    place: int
    color: str
    marker: str
    line: str


def styles(names: Sequence[str], baseline: str) -> dict[str, Style]:
    """Return a style for each name; the baseline has the color of text."""
    others = [name for name in names if name != baseline]
    found = {baseline: Style(names.index(baseline), INK, MARKERS[0], LINES[0])} if baseline in names else {}
    for number, name in enumerate(others):
        color, marker = COLORS[number % len(COLORS)], MARKERS[(number + 1) % len(MARKERS)]
        found[name] = Style(names.index(name), color, marker, LINES[number // len(COLORS) % len(LINES)])
    return {name: found[name] for name in names}
