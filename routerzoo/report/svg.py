"""A figure as SVG within a page: titled, in the page's colors, with marks that the page can hide by router."""

from __future__ import annotations

import io
import re
from html import escape

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from routerzoo.report.palette import GRID, INK, LOOK, PAPER


def to_svg(figure: Figure, name: str, title: str, description: str) -> Markup:
    """Return the picture.

    Args:
        figure: artists with the gid `series:<place>:<label>` belong to a router.
        name: an identifier, other than that of any other picture on the page.
        title: what it shows.
        description: what a reader who does not see it should know.
    """
    text = io.StringIO()
    # Equal pictures are written as equal bytes; the salt keeps their identifiers apart on one page.
    with matplotlib.rc_context({**LOOK, "svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="series:(\d+):([^"]*)">', r'<g class="series s\1"><title>\2</title>', svg)
    svg = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", svg)  # but those that something refers to
    svg = re.sub(r"<style.*?</style>|font-family: [^;]*; ?", "", svg, flags=re.DOTALL)  # the page has its own
    for color, variable in ((INK, "currentColor"), (GRID, "var(--grid)"), (PAPER, "var(--paper)")):
        svg = svg.replace(color, variable)
    head = f'<svg role="img" aria-labelledby="{name}-t {name}-d"'
    told = f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(description)}</desc>'
    opening, _, rest = svg.removeprefix("<svg").partition(">")
    return Markup(f"{head}{opening}>{told}{rest}")
