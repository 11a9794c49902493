"""Pictures of routing."""
# Shape suffixes: L layers, E experts, R records over training.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from torch import Tensor

# Blue is below the mean, red above; balance is white.
COLOURS = "RdBu_r"
LARGEST_SHOWN = 3.0


def load_bars(counts_E: Tensor, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw each expert's load relative to the mean load."""
    if ax is None:
        own = Figure(figsize=(6, 3), layout="constrained")
        FigureCanvasAgg(own)
        ax = own.subplots()
    relative_E = _relative(counts_E.double().cpu().numpy())
    ax.bar(range(len(relative_E)), relative_E, color="tab:blue")
    ax.axhline(1, color="black", linewidth=1, linestyle="--")
    ax.set(xlabel="expert", ylabel="load / mean load")
    return cast(Figure, ax.figure), ax


def load_over_training(steps_R: Sequence[int], loads_RLE: np.ndarray, title: str) -> Figure:
    """Draw every expert's load over training, one panel per MoE layer, with its load at the end beside it.

    Args:
        steps_R: optimiser steps of the records.
        loads_RLE: assignments per expert.
        title: what is shown.
    """
    relative_RLE = _relative(loads_RLE)
    num_layers, num_experts = relative_RLE.shape[1:]
    figure = Figure(figsize=(9, 1.2 + 1.7 * num_layers), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    norm = TwoSlopeNorm(1.0, 0.0, LARGEST_SHOWN)
    panels: Any = figure.subplots(num_layers, 2, squeeze=False, width_ratios=[5, 1])
    image: Any = None
    for layer, (history, final) in enumerate(panels):
        edges = [*steps_R, steps_R[-1] + (steps_R[-1] - steps_R[-2] if len(steps_R) > 1 else 1)]
        image = history.pcolormesh(
            edges, np.arange(num_experts + 1) - 0.5, relative_RLE[:, layer].T, cmap=COLOURS, norm=norm
        )
        history.set(ylabel=f"MoE layer {layer}\nexpert")
        final.barh(range(num_experts), relative_RLE[-1, layer], color="tab:gray")
        final.axvline(1, color="black", linewidth=1, linestyle="--")
        final.set(ylim=(-0.5, num_experts - 0.5), yticklabels=[])
    panels[-1][0].set(xlabel="training step")
    panels[-1][1].set(xlabel="at the end")
    figure.colorbar(image, ax=panels[:, 1].tolist(), label="load / mean load", extend="max")
    return figure


def _relative(loads: np.ndarray) -> np.ndarray:
    """Return loads relative to the mean over the last axis; 1 where there is none."""
    mean = loads.mean(-1, keepdims=True)
    relative: np.ndarray = np.divide(loads, mean, out=np.ones_like(loads, dtype=float), where=mean > 0)
    return relative
