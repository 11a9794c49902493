"""What a model costs: parameters in all, trained and active, and the floating-point operations of a token."""
# Shape suffixes: T tokens, D model width.

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from routerzoo.moe.layer import MoE, moe_layers
from routerzoo.routing import Routing


@dataclass(frozen=True)
class Costs:
    """What a model costs at its present k.

    Args:
        trainable: parameters that learn.
        frozen: parameters that do not, and floating-point buffers (a hypernetwork's weights, a random gate).
        active: trainable and frozen ones, less those of the experts that a token does not choose, on average.
        flops: floating-point operations of a token's forward pass: those of matrix products, two per multiply-add.
            Attention counts in full, masked or not.
        router_flops: the routers' part of them, in evaluation.
    """

    trainable: int
    frozen: int
    active: int
    flops: float
    router_flops: float

    @property
    def total(self) -> int:
        """All parameters, trainable or not."""
        return self.trainable + self.frozen


def count_costs(model: nn.Module, run: Callable[[], int]) -> Costs:
    """Count a model's parameters, and its operations while it runs.

    Args:
        model: any module with MoE layers.
        run: calls the model, and returns on how many tokens. It is called with the model in evaluation and without
            gradients. What a pass computes once, such as a generated gate, is spread over its tokens.
    """
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    frozen += sum(b.numel() for b in model.buffers() if b.is_floating_point())
    layers = list(moe_layers(model))
    router_flops = 0
    chosen = dict.fromkeys(layers, 0.0)

    with _evaluation(model):
        with FlopCounterMode(display=False) as counter:
            started: dict[nn.Module, int] = {}

            def before(router: nn.Module, arguments: Any) -> None:
                started[router] = counter.get_total_flops()

            def after(router: nn.Module, arguments: tuple[Any, ...], routing: Routing) -> None:
                nonlocal router_flops
                router_flops += counter.get_total_flops() - started[router]

            handles = [layer.router.register_forward_pre_hook(before) for layer in layers]
            handles += [layer.router.register_forward_hook(after) for layer in layers]
            handles += [layer.router.register_forward_hook(_counting(chosen, layer)) for layer in layers]
            try:
                tokens = run()
            finally:
                for handle in handles:
                    handle.remove()
        flops = counter.get_total_flops()
    idle = 0.0
    for layer, experts_per_token in chosen.items():
        size = sum(p.numel() for p in layer.experts.parameters())
        idle += size * (1 - experts_per_token / layer.spec.num_experts)
    return Costs(trainable, frozen, round(trainable + frozen - idle), flops / tokens, router_flops / tokens)


def _counting(chosen: dict[MoE, float], layer: MoE) -> Any:
    def count(router: nn.Module, arguments: tuple[Any, ...], routing: Routing) -> None:
        if routing.dense:
            chosen[layer] = float(layer.spec.num_experts)  # all take part in every token
        else:
            chosen[layer] = float(routing.expert_load(layer.spec.num_experts).sum()) / max(len(arguments[0]), 1)

    return count


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def short(count: float) -> str:
    """Write a large number with a unit."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f}"
