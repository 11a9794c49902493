"""Pictures of routing."""
# Shape suffixes: L layers, E experts, R records over training.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from torch import Tensor

# Blue is below the mean, red above, white balanced.
COLORMAP = "RdBu_r"
LARGEST_SHOWN = 3.0


def load_bars(counts_E: Tensor, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw each expert's load relative to the mean load."""
    ax = new_axes(ax, (6, 3))
    relative_E = _relative(counts_E.double().cpu().numpy())
    ax.bar(range(len(relative_E)), relative_E, color="tab:blue")
    ax.axhline(1, color="black", linewidth=1, linestyle="--")
    ax.set(xlabel="expert", ylabel="load / mean load")
    return cast(Figure, ax.figure), ax


def bars(
    values: Mapping[str, Tensor | float],
    ax: Axes | None = None,
    *,
    ylabel: str,
    bounds: tuple[float | None, float | None] = (None, None),
) -> tuple[Figure, Axes]:
    """Draw named numbers as bars, over the range that they can have."""
    ax = new_axes(ax, (1 + 1.2 * max(len(values), 2), 3))
    drawn = ax.bar(list(values), [float(value) for value in values.values()], color="tab:blue", width=0.6)
    ax.bar_label(drawn, fmt="%.3g")
    ax.set(ylabel=ylabel)
    ax.margins(y=0.1)
    low, high = bounds
    # The numbers are above the bars.
    ax.set_ylim(low, None if high is None else high + 0.1 * (high - (low or 0.0)))
    return cast(Figure, ax.figure), ax


def curves(
    x_R: Tensor | Sequence[float],
    y_R: Mapping[str, Tensor | Sequence[float]],
    ax: Axes | None = None,
    *,
    xlabel: str,
    ylabel: str,
) -> tuple[Figure, Axes]:
    """Draw named curves over the same x."""
    ax = new_axes(ax, (6, 3.5))
    for name, values in y_R.items():
        ax.plot(_array(x_R), _array(values), marker=".", label=name)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(alpha=0.3)
    if len(y_R) > 1:
        ax.legend()
    return cast(Figure, ax.figure), ax


def heat_map(
    values: Tensor,
    ax: Axes | None = None,
    *,
    xlabel: str,
    ylabel: str,
    low: float = 0.0,
    row_names: Sequence[str] | None = None,
) -> tuple[Figure, Axes]:
    """Draw a matrix, colored from `low` to its largest entry; NaN is white."""
    shown = np.atleast_2d(values.float().cpu().numpy())
    ax = new_axes(ax, (1.5 + 0.25 * max(shown.shape[1], 12), 1.0 + 0.25 * max(shown.shape[0], 8)))
    high = max(float(np.nanmax(shown)), low + 1e-6) if shown.size and not np.isnan(shown).all() else low + 1
    image = ax.imshow(shown, vmin=low, vmax=high, cmap="viridis", aspect="auto", interpolation="nearest")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if row_names is not None:
        ax.set_yticks(range(len(row_names)), labels=list(row_names))
    figure = cast(Figure, ax.figure)
    figure.colorbar(image, ax=ax)
    return figure, ax


def new_axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Return the given axes, or those of a new figure of this size, in inches; pyplot would keep every figure alive."""
    if ax is not None:
        return ax
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure.subplots()


def _array(values: Tensor | Sequence[float]) -> np.ndarray:
    # torchmetrics squeezes results of one entry to scalars.
    return np.atleast_1d(values.double().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values, float))


def quality_by_cost(rows: Sequence[Mapping[str, float]], metric: str, title: str) -> Figure:
    """Draw a metric against its cost, for one checkpoint at several k.

    Args:
        rows: `k`, the metric, `FLOPs per token` and `active parameters` of each.
        metric: its name.
        title: of the figure.
    """
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    panels: Any = figure.subplots(1, 2, sharey=True)
    for panel, cost in zip(panels, ("FLOPs per token", "active parameters"), strict=True):
        panel.plot([row[cost] for row in rows], [row[metric] for row in rows], marker="o", color="tab:blue")
        for row in rows:
            panel.annotate(f"k = {row['k']:.0f}", (row[cost], row[metric]), xytext=(4, 4), textcoords="offset points")
        panel.set(xlabel=cost)
        panel.grid(alpha=0.3)
    panels[0].set(ylabel=metric)
    return figure


def stability_over_training(curves_by_layer: Mapping[int, Mapping[str, Sequence[float]]]) -> Figure:
    """Draw how each layer's routing of the same tokens changes over training.

    Args:
        curves_by_layer: `steps`, and at each `fluctuation`, `saturation`, `chance` and `settled`.
    """
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, 3)
    titles = {
        "fluctuation": "experts that changed since the last record",
        "saturation": "final experts selected already",
        "settled": "tokens with their final experts",
    }
    for panel, (name, title) in zip(panels, titles.items(), strict=True):
        for layer, curve in curves_by_layer.items():
            first = 1 if name == "fluctuation" else 0  # nothing comes before the first record
            panel.plot(curve["steps"][first:], curve[name][first:], marker=".", label=f"MoE layer {layer}")
            if name == "saturation":
                panel.plot(curve["steps"], curve["chance"], color="black", linewidth=1, linestyle=":")
        panel.set(title=title, xlabel="training step", ylim=(-0.03, 1.03))
        panel.grid(alpha=0.3)
    panels[1].plot([], [], color="black", linewidth=1, linestyle=":", label="by chance")
    panels[1].legend(fontsize="small")
    return figure


def specialization(layers: Sequence[tuple[int, Tensor, Tensor | None]], names: Sequence[str] | None) -> Figure:
    """Draw expert co-activation, and the experts of the most specialized labels, a row for each MoE layer.

    Args:
        layers: index, co-activation `[E, E]`, and share of each label's tokens by expert `[V, E]`, or None.
        names: of the labels.
    """
    most = 16
    figure = Figure(figsize=(11, 1 + 3.6 * len(layers)), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(len(layers), 2, squeeze=False)
    for (left, right), (layer, together_EE, share_VE) in zip(panels, layers, strict=True):
        without_EE = together_EE.clone().fill_diagonal_(torch.nan)
        heat_map(without_EE, left, xlabel="co-activated expert", ylabel=f"MoE layer {layer}\nexpert")
        left.set(title="co-activation")
        if share_VE is None:
            right.set_axis_off()
            continue
        largest_V = share_VE.nan_to_num(-1).max(1).values
        shown = [label for label in largest_V.argsort(descending=True, stable=True).tolist() if largest_V[label] >= 0]
        rows = [str(label) if names is None else names[label] for label in shown[:most]]
        heat_map(share_VE[shown[:most]], right, xlabel="expert", ylabel="label", row_names=rows)
        right.set(title="most specialized labels")
    return figure


def load_over_training(steps_R: Sequence[int], loads_RLE: np.ndarray, title: str) -> Figure:
    """Draw each expert's load over training, one panel per MoE layer, with the load at the end beside it.

    Args:
        steps_R: steps of the records.
        loads_RLE: assignments per expert.
        title: of the figure.
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
            edges, np.arange(num_experts + 1) - 0.5, relative_RLE[:, layer].T, cmap=COLORMAP, norm=norm
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
    """Return loads relative to their mean over the last axis; 1 where that is 0."""
    mean = loads.mean(-1, keepdims=True)
    relative: np.ndarray = np.divide(loads, mean, out=np.ones_like(loads, dtype=float), where=mean > 0)
    return relative
