"""Biases of experts in timm's parameter groups."""

from __future__ import annotations

from typing import Any

from torch import nn

from routerzoo.moe.layer import moe_layers


def spare_biases(model: nn.Module) -> None:
    """Let timm's optimizers leave the biases of experts and routers without weight decay, as those of a dense model.

    timm decays what has two dimensions and whose name the model's `no_weight_decay` does not give. Biases of experts
    are stacked, so that they have two.

    Args:
        model: where it is one of timm's, its `no_weight_decay` is extended, in place.
    """
    timms = hasattr(model, "no_weight_decay") or hasattr(model, "pretrained_cfg")
    if timms and not isinstance(getattr(model, "no_weight_decay", None), _NoWeightDecay):
        model.no_weight_decay = _NoWeightDecay(model)  # type: ignore[assignment]


class _NoWeightDecay:
    """The `no_weight_decay` of a model, extended. No closure, so that the model can be copied and pickled."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self) -> set[str]:
        own = getattr(type(self.model), "no_weight_decay", None)
        names = set() if own is None else set(own(self.model))
        layers = {id(layer) for layer in moe_layers(self.model)}
        for prefix, module in self.model.named_modules():
            if id(module) in layers:
                names |= {f"{prefix}.{name}" for name, _ in module.named_parameters() if name.endswith("bias")}
        return names
