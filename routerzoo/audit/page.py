"""The page of an audit: verdict, findings, pictures and a table of each layer."""
# Shape suffixes: L layers, E experts, V labels.

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
from jinja2 import Environment
from matplotlib.figure import Figure
from torch import Tensor

from routerzoo.audit.result import Audit, LayerAudit
from routerzoo.metrics.figures import heat_map, specialization
from routerzoo.runs.atomic import atomic_write

LAYERS_DRAWN = 8
"""Layers whose co-activation and specialization are drawn; of a deeper model, layers at equal distances."""


class Picture(NamedTuple):
    """A picture and what it shows."""

    title: str
    png: str


def write_page(path: Path, audit: Audit, command: str = "") -> None:
    """Write a self-contained page.

    Args:
        path: of the page.
        audit: what it shows.
        command: that writes it.
    """
    template = files("routerzoo.audit").joinpath("page.html.jinja").read_text(encoding="utf-8")
    html = (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(audit=audit, pictures=_pictures(audit), number=_number, command=command)
    )
    atomic_write(path, html)


def _pictures(audit: Audit) -> list[Picture]:
    layers = audit.layers
    drawn = [
        _by_expert("load of each expert / mean load", layers, [layer.relative_load for layer in layers]),
        _by_expert(
            "norm of each expert's parameters / median",
            layers,
            [layer.relative_parameter_norms or [] for layer in layers],
        ),
        _by_expert(
            "mean norm of each expert's outputs / median",
            layers,
            [layer.relative_output_norms or [] for layer in layers],
        ),
    ]
    step = -(-len(layers) // LAYERS_DRAWN)
    for title, shares, names in (
        ("co-activation, and token ids", "token_shares_VE", audit.token_names),
        (audit.group_kind, "group_shares_VE", list(audit.group_names)),
    ):
        chosen = [
            (layer.index, layer.together_EE, getattr(layer, shares))
            for layer in layers[::step]
            if layer.together_EE is not None and (shares == "token_shares_VE" or getattr(layer, shares) is not None)
        ]
        if chosen:
            figure = specialization(chosen, [_shown(name) for name in names] or None)
            drawn.append(Picture(f"specialization: {title}", _png(figure)))
    return [picture for picture in drawn if picture is not None]


def _by_expert(title: str, layers: Sequence[LayerAudit], rows: Sequence[Sequence[float | None]]) -> Picture | None:
    if not any(rows):
        return None
    values_LE = torch.full((len(layers), max(map(len, rows))), torch.nan)
    for row_E, row in zip(values_LE, rows, strict=True):
        row_E[: len(row)] = torch.tensor([torch.nan if value is None else value for value in row])
    finite_LE: Tensor = values_LE.masked_fill(values_LE.isinf(), torch.nan)
    figure, _ = heat_map(
        finite_LE, xlabel="expert", ylabel="MoE layer", row_names=[str(layer.index) for layer in layers]
    )
    return Picture(title, _png(figure))


def _png(figure: Figure) -> str:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=90)
    return base64.b64encode(png.getvalue()).decode()


def _shown(name: str) -> str:
    return name[:24].replace("$", r"\$")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
