"""`Thresholds`: what counts as healthy, and `judge`, which names what is not."""
# Shape suffix: E experts.

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from routerzoo.errors import UserError
from routerzoo.registry import did_you_mean

if TYPE_CHECKING:
    from routerzoo.audit.result import LayerAudit

FEWEST_ASSIGNMENTS = 20
"""Assignments per expert, on average, below which load is not judged: a sound expert may get none by chance."""


def _limit(default: float | None, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Thresholds:
    """Limits of what is healthy; None judges nothing.

    The command line has an option for each, whose help is the meaning given here.

    Raises:
        UserError: NaN or a negative number.
    """

    min_load: float | None = _limit(0.02, "smallest load of an expert over the mean load; below it the expert is dead")
    max_load: float | None = _limit(5.0, "largest load of an expert over the mean load")
    min_load_entropy: float | None = _limit(0.6, "smallest entropy of the load over log E; below it routing collapsed")
    min_gate_entropy: float | None = _limit(None, "smallest mean entropy of the gate over log E")
    max_gate_entropy: float | None = _limit(None, "largest mean entropy of the gate over log E")
    min_gate_margin: float | None = _limit(None, "smallest mean margin of the gate's two largest probabilities")
    max_parameter_norm: float | None = _limit(3.0, "largest norm of an expert's parameters over the median expert's")
    min_parameter_norm: float | None = _limit(0.33, "smallest norm of an expert's parameters over the median expert's")
    max_output_norm: float | None = _limit(10.0, "largest mean norm of an expert's outputs over the median expert's")
    min_output_norm: float | None = _limit(0.1, "smallest mean norm of an expert's outputs over the median expert's")
    min_drop_cost: float | None = _limit(None, "smallest loss, in nats, that dropping each token's first choice costs")
    min_random_cost: float | None = _limit(None, "smallest loss, in nats, that a random first choice costs")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and (math.isnan(value) or (value < 0 and not name.endswith("cost"))):
                raise UserError(f"the threshold {name} must be a number of at least 0, got {value}")


class Finding(NamedTuple):
    """Something that is not healthy.

    Args:
        layer: index among the model's MoE layers.
        expert: the expert; None where it is the whole layer.
        kind: what is wrong.
        value: what was measured.
        threshold: name of the threshold; empty for what no threshold allows.
        limit: its value.
    """

    layer: int
    expert: int | None
    kind: str
    value: float
    threshold: str
    limit: float

    def __str__(self) -> str:
        where = f"MoE layer {self.layer}" + ("" if self.expert is None else f", expert {self.expert}")
        limit = f"; {self.threshold} is {self.limit:g}" if self.threshold else ""
        return f"{where}: {self.kind} ({self.value:.3g}{limit})"


def read_thresholds(path: Path) -> dict[str, float | None]:
    """Return the thresholds of a YAML or JSON file: numbers by name, null or none for those that judge nothing.

    Raises:
        UserError: a file that is not one, or an unknown threshold.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} has no thresholds by name, such as 'max_load: 4'")
    known = [field.name for field in fields(Thresholds)]
    limits: dict[str, float | None] = {}
    for name, value in content.items():
        if name not in known:
            raise UserError(
                f"{path}: unknown threshold {name!r}{did_you_mean(str(name), known)} There are {', '.join(known)}."
            )
        if value in (None, "none"):
            limits[name] = None
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            limits[name] = float(value)
        else:
            raise UserError(f"{path}: the threshold {name} must be a number or null, got {value!r}")
    return limits


def judge(layer: LayerAudit, thresholds: Thresholds) -> list[Finding]:
    """Return what is not healthy in a layer."""
    found: list[Finding] = []

    def check(kind: str, value: float | None, threshold: str, expert: int | None = None) -> None:
        limit = getattr(thresholds, threshold)
        # What is not at least the limit, NaN too.
        within = value is None or limit is None or (value >= limit if threshold.startswith("min") else value <= limit)
        if not within:
            assert value is not None
            found.append(Finding(layer.index, expert, kind, value, threshold, limit))

    if layer.load_is_judged:
        for expert, load in enumerate(layer.relative_load):
            check("dead", load, "min_load", expert)
            check("overloaded", load, "max_load", expert)
        entropy = layer.load["load_entropy"]
        if layer.num_experts > layer.top_k:
            check(f"routing collapsed onto experts {_most_loaded(layer)}", entropy, "min_load_entropy")
    for kind, norms in (("parameter", layer.relative_parameter_norms), ("output", layer.relative_output_norms)):
        for expert, norm in enumerate(norms or ()):
            if norm is None:  # an expert without a token
                continue
            if math.isfinite(norm):
                check(f"{kind} norm exploding", norm, f"max_{kind}_norm", expert)
                check(f"{kind} norm vanishing", norm, f"min_{kind}_norm", expert)
            else:
                found.append(Finding(layer.index, expert, f"{kind}s are NaN or inf", norm, "", math.nan))
    for threshold, (kind, value) in _of_whole_layer(layer).items():
        check(kind, value, threshold)
    return found


def unjudged(layer: LayerAudit, thresholds: Thresholds) -> list[str]:
    """Return the thresholds of what could not be measured in a layer."""
    values = _of_whole_layer(layer).items()
    return [name for name, (_, value) in values if value is None and getattr(thresholds, name) is not None]


def _of_whole_layer(layer: LayerAudit) -> dict[str, tuple[str, float | None]]:
    """Return what is wrong beyond a threshold, and what it judges."""
    gate, costs = layer.gate, layer.costs or {}
    return {
        "min_gate_entropy": ("gate too certain", gate.get("gate_entropy")),
        "max_gate_entropy": ("gate undecided", gate.get("gate_entropy")),
        "min_gate_margin": ("gate undecided", gate.get("gate_margin")),
        "min_drop_cost": ("dropping the first choice costs too little", costs.get("drop")),
        "min_random_cost": ("a random first choice costs too little", costs.get("random")),
    }


def _most_loaded(layer: LayerAudit) -> str:
    order = sorted(range(layer.num_experts), key=lambda expert: -layer.relative_load[expert])
    return ", ".join(str(expert) for expert in sorted(order[: max(layer.top_k, 1)]))
