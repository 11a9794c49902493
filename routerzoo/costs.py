"""What a model costs: parameters in all, trained and active, the FLOPs of a token, and those of its training."""
# Shape suffixes: T tokens, D model width.

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from routerzoo.moe.layer import MoE, moe_layers
from routerzoo.routing import Routing, RoutingContext


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
        experts_per_token: that a token chooses, mean over MoE layers; None without any, or where experts are mixed.
        expert_flops: operations that one more expert per token takes, in all MoE layers.
        once_flops: the part of `flops` that a pass computes once for all its examples, such as a generated gate.
    """

    trainable: int
    frozen: int
    active: int
    flops: float
    router_flops: float
    experts_per_token: float | None = None
    expert_flops: float = 0.0
    once_flops: float = 0.0

    @property
    def total(self) -> int:
        """All parameters, trainable or not."""
        return self.trainable + self.frozen

    def training_flops(self, tokens: float, k: float | None = None, examples: int = 1) -> float:
        """Return the operations of training on so many tokens, three forward passes' worth (Kaplan et al. 2020).

        Args:
            tokens: in all.
            k: experts per token, mean over training; by default those of the count.
            examples: of a batch.
        """
        more = 0.0 if k is None or self.experts_per_token is None else k - self.experts_per_token
        shared = self.once_flops * (1 - 1 / examples)
        return 3 * tokens * (self.flops - shared + more * self.expert_flops)


@dataclass
class TrainedTokens:
    """How much a model has been trained on. Padding does not count.

    Args:
        tokens: in all, those of all processes.
        routed: by the MoE layers of this process, each layer's counted.
        assigned: experts that these chose.
    """

    tokens: int = 0
    routed: float = 0.0
    assigned: Tensor | float = 0.0

    def add(self, context: RoutingContext, processes: int) -> None:
        """Count a pass of each process."""
        ids_T = context.positions if context.token_ids is None else context.token_ids
        if ids_T is None:
            return
        padding = 0 if context.padding_mask is None else int(context.padding_mask.sum())
        seen = len(ids_T) - padding
        self.tokens += seen * processes
        for entry in context.routings:
            layer: Any = entry.layer
            routing = entry.routing
            if routing.dense:
                continue
            self.routed += seen
            if routing.experts_TK is not None and not routing.may_drop:
                self.assigned = self.assigned + routing.experts_TK.numel()
            else:  # no number is read back here: a GPU need not wait
                self.assigned = self.assigned + routing.expert_load(layer.num_experts).sum()

    def numbers(self) -> list[float]:
        """Return tokens, routed and assigned."""
        return [self.tokens, self.routed, float(self.assigned)]

    @property
    def k(self) -> float | None:
        """Experts per token, mean over training and MoE layers; None where there are none."""
        return float(self.assigned) / self.routed if self.routed else None


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
    router_flops = dict.fromkeys(layers, 0)
    layer_flops = dict.fromkeys(layers, 0)
    chosen = dict.fromkeys(layers, 0.0)
    mixed: set[MoE] = set()

    with _evaluation(model):
        with FlopCounterMode(display=False) as counter:
            started: dict[nn.Module, int] = {}

            def before(module: nn.Module, arguments: Any) -> None:
                started[module] = counter.get_total_flops()

            def after(flops: dict[MoE, int], layer: MoE) -> Any:
                def add(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
                    flops[layer] += counter.get_total_flops() - started[module]

                return add

            handles = [part.register_forward_pre_hook(before) for layer in layers for part in (layer, layer.router)]
            handles += [layer.router.register_forward_hook(after(router_flops, layer)) for layer in layers]
            handles += [layer.register_forward_hook(after(layer_flops, layer)) for layer in layers]
            handles += [layer.router.register_forward_hook(_counting(chosen, mixed, layer)) for layer in layers]
            try:
                tokens = run()
            finally:
                for handle in handles:
                    handle.remove()
        flops = counter.get_total_flops()
    idle = expert_flops = 0.0
    for layer, experts_per_token in chosen.items():
        size = sum(p.numel() for p in layer.experts.parameters())
        idle += size * (1 - experts_per_token / layer.spec.num_experts)
        computed = experts_per_token + layer.num_shared_experts
        if layer not in mixed and computed:
            expert_flops += (layer_flops[layer] - router_flops[layer]) / tokens / computed
    return Costs(
        trainable,
        frozen,
        round(trainable + frozen - idle),
        flops / tokens,
        sum(router_flops.values()) / tokens,
        sum(chosen.values()) / len(layers) if layers and not mixed else None,
        expert_flops,
    )


def _counting(chosen: dict[MoE, float], mixed: set[MoE], layer: MoE) -> Any:
    def count(router: nn.Module, arguments: tuple[Any, ...], routing: Routing) -> None:
        if routing.dense:
            chosen[layer] = float(layer.spec.num_experts)  # all take part in every token
            mixed.add(layer)
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
    for unit, size in (("P", 10**15), ("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f}"
