"""The page that shows a checkpoint's routing: text or patches colored by expert, and each expert's labels."""
# Shape suffixes: S tokens, E experts, L labels.

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment
from matplotlib.figure import Figure
from torch import Tensor

from routerzoo.look.drawings import expert_colors
from routerzoo.look.observe import Observation
from routerzoo.runs.atomic import atomic_write

CLAIMS_SHOWN = 8
FEWEST = 5
"""Labels with fewer tokens are not listed."""


class Piece(NamedTuple):
    """A piece of text, and where it is routed."""

    text: str
    color: str
    tooltip: str


class Claim(NamedTuple):
    """An expert of a layer, with its load and the labels that it is the first choice for."""

    expert: int
    color: str
    load: str
    labels: str


class Layer(NamedTuple):
    """A MoE layer on the page."""

    number: int
    texts: list[list[Piece]]
    claims: list[Claim]


def write_page(
    path: Path,
    title: str,
    observation: Observation,
    counts: Mapping[int, Tensor],
    names: Sequence[str],
    texts: Sequence[Sequence[str]] = (),
    picture: Figure | None = None,
    command: str = "",
) -> None:
    """Write a self-contained page.

    Args:
        path: of the page.
        title: what is shown.
        observation: the batch that is shown.
        counts: by layer, tokens of each label whose first choice is each expert, `[E, L]`.
        names: of the labels.
        texts: for text, the pieces of the sequences to show.
        picture: for images, the drawing.
        command: that writes this page.
    """
    layers = []
    for layer, weights_BSE in sorted(observation.weights.items()):
        palette = expert_colors(weights_BSE.shape[-1])
        colored = [
            [_piece(text, weights_BSE[b, s], palette) for s, text in enumerate(pieces)]
            for b, pieces in enumerate(texts)
        ]
        layers.append(Layer(layer, colored, _claims(counts[layer], names, palette)))
    encoded = ""
    if picture is not None:
        png = io.BytesIO()
        picture.savefig(png, format="png", dpi=120)
        encoded = base64.b64encode(png.getvalue()).decode()
    template = files("routerzoo.look").joinpath("page.html.jinja").read_text(encoding="utf-8")
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, page.render(title=title, layers=layers, picture=encoded, command=command, fewest=FEWEST))


def _piece(text: str, weights_E: Tensor, palette: Sequence[str]) -> Piece:
    order = weights_E.argsort(descending=True)[:4].tolist()
    chosen = [(expert, float(weights_E[expert])) for expert in order if weights_E[expert] > 0]
    tooltip = ", ".join(f"expert {expert}: {weight:.2f}" for expert, weight in chosen) or "no expert"
    return Piece(text.replace("\n", "⏎\n"), palette[chosen[0][0]] if chosen else "#ffffff", tooltip)


def _claims(counts_EL: Tensor, names: Sequence[str], palette: Sequence[str]) -> list[Claim]:
    """Return each expert's load and labels, by the share of a label's tokens that it is the first choice for."""
    total_L = counts_EL.sum(0)
    share_EL = counts_EL.double() / total_L.clamp_min(1)
    share_EL[:, total_L < FEWEST] = 0.0
    rows = []
    for expert, color in enumerate(palette):
        best = share_EL[expert].argsort(descending=True)[:CLAIMS_SHOWN].tolist()
        labels = [f"{names[label]} {share_EL[expert, label]:.0%}" for label in best if share_EL[expert, label] >= 0.005]
        load = float(counts_EL[expert].sum()) / max(float(counts_EL.sum()), 1.0)
        rows.append(Claim(expert, color, f"{load:.1%}", ", ".join(labels)))
    return rows
