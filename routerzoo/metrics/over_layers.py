"""The routing of all MoE layers in a few numbers, for logs that hold few."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from statistics import fmean

REDUCTIONS: dict[str, Callable[[Iterable[float]], float]] = {
    "load_max": max,
    "load_min": min,
    "load_entropy": min,
    "dead_experts": sum,
    "gate_entropy": fmean,
}
"""How the statistics of layers become one number: those of load are the worst layer's."""


def over_layers(statistics: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the statistics of several layers as one number each, however many layers there are.

    Args:
        statistics: of each layer, by name; other names than those of `REDUCTIONS` are left out.

    Example:
        >>> over_layers([{"load_max": 1.5, "dead_experts": 1.0}, {"load_max": 3.0, "dead_experts": 2.0}])
        {'load_max': 3.0, 'dead_experts': 3.0}
    """
    layers = list(statistics)
    found = {name: [layer[name] for layer in layers if name in layer] for name in REDUCTIONS}
    return {name: float(REDUCTIONS[name](values)) for name, values in found.items() if values}
