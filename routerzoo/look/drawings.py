"""Pictures of the selected experts: patches and characters colored by expert."""
# Shape suffixes: B images, S tokens, E experts, H and W pixels, R and C patches, V red, green and blue.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from routerzoo.data.images import ImageBatch
from routerzoo.look.observe import Observation
from routerzoo.tasks.base import MoETask

OPACITY = 0.55
CHARACTERS_A_LINE = 64


def expert_colors(num_experts: int) -> list[str]:
    """Return a color for each expert, the same in every picture; those of consecutive experts differ."""
    for name, grays in (("tab10", {7: "#f4c20d"}), ("tab20", {14: "#f4c20d", 15: "#ffe999"})):
        palette = matplotlib.colormaps[name]
        if num_experts <= palette.N:  # without its grays, which would look like no expert
            return [grays.get(i, to_hex(palette(i))) for i in range(num_experts)]
    # The golden ratio spreads hues evenly, however many there are.
    hues = [(i * 0.618034) % 1.0 for i in range(num_experts)]
    return [
        to_hex(tuple(matplotlib.colors.hsv_to_rgb((hue, 0.55 + 0.35 * (i % 2), 0.9)))) for i, hue in enumerate(hues)
    ]


def draw(model: MoETask, datamodule: Any, observation: Observation, examples: int = 6) -> Figure:
    """Draw a batch, images or text, in the colors of its experts."""
    if isinstance(observation.batch, ImageBatch):
        net: Any = model.net
        names = label_names(datamodule)
        return patches_by_expert(observation, net.grid_size, net.num_prefix_tokens, names, examples)
    return text_by_expert(observation, pieces(datamodule, observation.batch.ids_BS[0]))


def label_names(datamodule: Any) -> list[str]:
    """Return what the labels of a data module's tokens are called: classes, or pieces of text."""
    if hasattr(datamodule, "class_names"):
        return list(datamodule.class_names)
    return [repr(datamodule.decode([label]))[1:-1] for label in range(datamodule.vocab_size)]


def pieces(datamodule: Any, ids_S: Any) -> list[str]:
    """Return the text of each token; words with the space that follows."""
    space = " " if getattr(datamodule, "tokenizer", None) == "words" else ""
    return [datamodule.decode([int(index)]) + space for index in ids_S]


def patches_by_expert(
    observation: Observation, grid_size: tuple[int, int], num_prefix_tokens: int, names: Sequence[str], most: int = 6
) -> Figure:
    """Draw images, and beside each, for every MoE layer, its patches tinted by expert.

    Args:
        observation: of images.
        grid_size: rows and columns of patches.
        num_prefix_tokens: tokens before the patches, which are not drawn.
        names: of the classes.
        most: images to draw, at most.
    """
    batch = observation.batch
    assert isinstance(batch, ImageBatch)
    count = min(most, len(batch.images_BCHW))
    layers = sorted(observation.weights)
    figure = Figure(figsize=(1.6 * (len(layers) + 1), 1.6 * count + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(count, len(layers) + 1, squeeze=False)
    num_experts = max(weights.shape[-1] for weights in observation.weights.values())
    palette = expert_colors(num_experts)
    for row, image in zip(panels, range(count), strict=True):
        picture_HWV = _displayed(batch.images_BCHW[image].permute(1, 2, 0).numpy())
        row[0].imshow(picture_HWV)
        row[0].set_ylabel(names[int(batch.labels_B[image])] if batch.labels_B is not None else "", fontsize=8)
        for ax, layer in zip(row[1:], layers, strict=True):
            experts_RC = observation.experts(layer)[image, num_prefix_tokens:].view(grid_size).numpy()
            ax.imshow(_tinted(picture_HWV, experts_RC, palette))
            if image == 0:
                ax.set_title(f"MoE layer {layer}", fontsize=9)
        for ax in row:
            ax.set(xticks=[], yticks=[])
    shown = [Patch(color=color, label=str(expert)) for expert, color in enumerate(palette)]
    figure.legend(handles=shown, loc="outside lower center", ncols=min(16, num_experts), fontsize=7, title="expert")
    return figure


def text_by_expert(observation: Observation, pieces: Sequence[str], most: int = 512) -> Figure:
    """Draw the first text of a batch, each token on the color of its expert, one panel per MoE layer.

    Args:
        observation: of text.
        pieces: the text of each token of the first sequence.
        most: tokens to draw, at most.
    """
    layers = sorted(observation.weights)
    num_experts = max(weights.shape[-1] for weights in observation.weights.values())
    palette = expert_colors(num_experts)
    count = min(most, len(pieces))
    lines = -(-count // CHARACTERS_A_LINE)
    figure = Figure(figsize=(10, len(layers) * (0.2 * lines + 0.4) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(len(layers), 1, squeeze=False)
    for (ax,), layer in zip(panels, layers, strict=True):
        experts_S = observation.experts(layer)[0].numpy()
        cells = np.ones((lines, CHARACTERS_A_LINE, 3))
        for place in range(count):
            line, column = divmod(place, CHARACTERS_A_LINE)
            if experts_S[place] >= 0:
                cells[line, column] = matplotlib.colors.to_rgb(palette[experts_S[place]])
            shown = pieces[place].replace("\n", "⏎").replace("$", r"\$")[:2]
            ax.text(column, line, shown, ha="center", va="center", fontsize=7, family="monospace")
        ax.imshow(1 - 0.6 * (1 - cells), aspect="auto")
        ax.set(xticks=[], yticks=[])
        ax.set_title(f"MoE layer {layer}", fontsize=9, loc="left")
    handles = [Patch(color=color, alpha=0.6, label=str(expert)) for expert, color in enumerate(palette)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(16, num_experts), fontsize=7, title="expert")
    return figure


def _displayed(picture_HWV: np.ndarray) -> np.ndarray:
    """Return a normalized image as red, green and blue in [0, 1]."""
    low, high = picture_HWV.min(), picture_HWV.max()
    scaled = (picture_HWV - low) / max(high - low, 1e-6)
    return np.repeat(scaled, 3, axis=2) if scaled.shape[2] == 1 else scaled[:, :, :3]


def _tinted(picture_HWV: np.ndarray, experts_RC: np.ndarray, palette: Sequence[str]) -> np.ndarray:
    height, width = picture_HWV.shape[:2]
    # The patch of every pixel.
    rows_H = np.arange(height) * experts_RC.shape[0] // height
    columns_W = np.arange(width) * experts_RC.shape[1] // width
    experts_HW = experts_RC[rows_H][:, columns_W]
    colors = np.array([matplotlib.colors.to_rgb(color) for color in palette])
    gray_HW1 = picture_HWV.mean(2, keepdims=True)
    tint_HWV = colors[np.maximum(experts_HW, 0)]
    tinted_HWV = (1 - OPACITY) * gray_HW1 + OPACITY * tint_HWV
    return np.asarray(np.where(experts_HW[:, :, None] >= 0, tinted_HWV, gray_HW1))
