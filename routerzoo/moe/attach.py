"""`attach`: what must happen to routers once per optimizer step, in any training loop."""
# Shape suffixes: V token ids.

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from routerzoo.functional.recomputation import backward_id
from routerzoo.moe.layer import MoE, inner_router, moe_layers
from routerzoo.moe.step_load import StepLoad
from routerzoo.router import Router, declaring_class
from routerzoo.routers.wrapper import RouterWrapper
from routerzoo.routing import LayerRouting, Routing, RoutingContext


def attach(
    model: nn.Module | Iterable[MoE],
    optimizer: Optimizer,
    total_steps: int | None = None,
    *,
    step: int = 0,
    token_counts: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> RouterUpdates:
    """Update the routers of a model once per step of an optimizer, through the optimizer's own hooks.

    Selection biases, thresholds and stages of training then move as their papers have it, whatever the loop:
    accumulation of gradients, a gradient scaler, closures, fused optimizers, several processes. The loss
    `global_balance` counts the experts' load over the same steps. A step that is skipped
    (by a scaler, or since no parameter has a gradient) moves nothing, and a forward pass counts only once its gradient
    arrives, finite. After a step that was skipped, set gradients to None (`zero_grad`'s default), so that its counts
    are dropped too.

    Args:
        model: the model, or its MoE layers.
        optimizer: the optimizer that trains them.
        total_steps: steps that the run will take, for routers with stages of training.
        step: steps taken so far, where the run resumes. Load the model's state before: stages of training are
            prepared here, from the state that the model has.
        token_counts: int64 `[vocab_size]`, how often each token id occurs in the training split, for routers that are
            fitted to it.
        process_group: processes that train copies of the same layers on other data, whose counts are added up; by
            default all of them.

    Returns:
        A handle: `step` counts the steps, `remove` ends the updates.

    Example:
        >>> import torch
        >>> from routerzoo import MoE, StableMoERouter, RoutingContext, LayerSpec
        >>> layer = MoE(LayerSpec(8, 4, vocab_size=10), StableMoERouter)
        >>> optimizer = torch.optim.AdamW(layer.parameters())
        >>> updates = attach(layer, optimizer, total_steps=10)
        >>> for _ in range(2):
        ...     layer(torch.randn(6, 8), RoutingContext(torch.arange(6))).sum().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> updates.step, layer.router.stage
        (2, 2)
    """
    layers = list(moe_layers(model)) if isinstance(model, nn.Module) else list(model)
    if not layers:
        name = f" in {type(model).__name__}" if isinstance(model, nn.Module) else ""
        warnings.warn(f"attach found no MoE layer{name}: no router will be updated", stacklevel=2)
    return RouterUpdates(layers, optimizer, total_steps, step, token_counts, process_group)


class RouterUpdates:
    """What `attach` returns.

    Args:
        layers: MoE layers whose routers are updated.
        optimizer: the optimizer that trains them.
        total_steps: see `attach`; likewise the arguments that follow.
        step: see `attach`.
        token_counts: see `attach`.
        process_group: see `attach`.

    Attributes:
        step: optimizer steps taken, without those that were skipped.
    """

    def __init__(
        self,
        layers: list[MoE],
        optimizer: Optimizer,
        total_steps: int | None,
        step: int,
        token_counts: Tensor | None,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        if driven := next((layer for layer in layers if layer.is_driven), None):
            raise ValueError(
                f"{type(inner_router(driven)).__name__} is updated already, by RouterHooks or an earlier attach: keep "
                "one of them, or call remove() on the earlier handle"
            )
        self.step, self.total_steps = step, total_steps
        self._process_group = process_group
        self._passes = itertools.count()
        self._counted: dict[MoE, set[int]] = {layer: set() for layer in layers}
        # FSDP2 replaces parameters in the forward pass; gradients are accumulated in those of now.
        self._parameters = {layer: [*inner_router(layer).parameters()] for layer in layers}
        self._layers = layers
        self._trained = {layer for layer in layers if _is_trained(layer)}
        self._statistics: dict[MoE, dict[str, Tensor]] = {layer: {} for layer in layers}
        self._backward: dict[MoE, int] = {}
        self._zeros: dict[MoE, dict[str, Tensor]] = {}
        self._handles: list[Any] = [optimizer.register_step_post_hook(self._after_step)]
        for layer in layers:
            router = inner_router(layer)
            for part in router.modules():
                if isinstance(part, Router):
                    part.read_stored_ints()  # DistributedDataParallel writes buffers in place
            if router.needs_updates:
                _widen(router)
                self._handles.append(layer.register_routing_hook(self._observe))
            layer.step_load = StepLoad()
            if step == 0 and router.wants_token_counts and not router.is_frozen:
                if token_counts is None:
                    warnings.warn(
                        f"{type(router).__name__} fits the frequencies of token ids, which are not known: "
                        "give attach(..., token_counts=...) how often each occurs in the training split",
                        stacklevel=3,
                    )
                else:
                    router.fit_token_counts(token_counts)
        self._begin_step()

    def remove(self) -> None:
        """End the updates."""
        while self._handles:
            self._handles.pop().remove()
        for layer in self._layers:
            layer.step_load = None

    def _begin_step(self) -> None:
        for router in self._routers():
            router.begin_step(self.step, self.total_steps)

    def _routers(self) -> list[Router]:
        return [r for layer in self._layers if (r := inner_router(layer)).needs_updates and not r.is_frozen]

    @torch.no_grad()
    def _observe(self, published: LayerRouting, context: RoutingContext) -> None:
        """Take the sums of a training pass, once its gradient arrives."""
        layer, routing = published.layer, published.routing
        assert isinstance(layer, MoE)
        router = inner_router(layer)
        if not layer.training or router.is_frozen:
            return
        if layer in self._trained and not _is_trained(layer):
            return  # a pass for another optimizer, with this layer's parameters switched off
        sums = router.statistics(routing.for_losses, context)
        differentiable = _differentiable(routing)
        if not sums or differentiable is None:
            return
        if torch.compiler.is_compiling():  # a graph has no place for hooks of a gradient
            self._add(layer, sums)
            return
        differentiable.register_hook(self._on_gradient(layer, router, sums))  # type: ignore[no-untyped-call]

    def _on_gradient(self, layer: MoE, router: Router, sums: Mapping[str, Tensor]) -> Callable[[Tensor], None]:
        references = [p for p in (*self._parameters[layer], *router.parameters()) if p.requires_grad]
        trained = [p for p in layer.parameters() if p.requires_grad]
        if not references and trained and all(p.grad is None for p in trained):
            self._forget(layer)  # a router without trained parameters, in a layer that begins a step
        number = next(self._passes)

        @torch.no_grad()
        def add(gradient: Tensor) -> None:
            if self._backward.get(layer) != backward_id():
                self._backward[layer] = backward_id()
                if references and all(p.grad is None for p in references):
                    # The first backward pass of a step: what was counted before belongs to one that was skipped.
                    self._forget(layer)
            if number in self._counted[layer]:
                return  # a second backward pass through the same forward pass
            self._counted[layer].add(number)
            sound = gradient.isfinite().all()
            self._add(layer, {name: torch.where(sound, value, 0.0) for name, value in sums.items()})

        return add

    def _forget(self, layer: MoE) -> None:
        self._statistics[layer] = {}
        self._counted[layer].clear()

    def _add(self, layer: MoE, sums: Mapping[str, Tensor]) -> None:
        known = self._statistics[layer]
        self._statistics[layer] = {n: known[n] + value if n in known else value for n, value in sums.items()}

    def _no_statistics(self, layer: MoE, router: Router) -> dict[str, Tensor]:
        if layer not in self._zeros:
            self._zeros[layer] = _zeros(layer, router)
        return self._zeros[layer]

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        observed, self._statistics = self._statistics, {layer: {} for layer in self._layers}
        self._backward.clear()
        for counted in self._counted.values():
            counted.clear()
        for layer in self._layers:
            if layer.step_load is not None:
                layer.step_load.clear()
        if _was_skipped(optimizer):
            return
        for layer in self._layers:
            router = inner_router(layer)
            if router.needs_updates and not router.is_frozen:
                sums = observed[layer] or self._no_statistics(layer, router)
                self._zeros.setdefault(layer, {name: torch.zeros_like(value) for name, value in sums.items()})
                router.update(_over_processes(sums, self._process_group))
        self.step += 1
        self._begin_step()


def _is_trained(layer: MoE) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters())


def _widen(router: Router) -> None:
    """Bring buffers that updates move, loaded in 16 bits, to float32: small steps would round away."""
    for name in router.trained_buffers:
        owner = router.get_submodule(name.rpartition(".")[0])
        buffer = router.get_buffer(name)
        if buffer.is_floating_point() and buffer.element_size() < 4:
            setattr(owner, name.rpartition(".")[2], buffer.float())


def _was_skipped(optimizer: Optimizer) -> bool:
    found = getattr(optimizer, "found_inf", None)  # a gradient scaler tells fused optimizers so
    if found is not None and bool(found):
        return True
    return all(p.grad is None for group in optimizer.param_groups for p in group["params"])


def _differentiable(routing: Routing) -> Tensor | None:
    for name in ("weights_TK", "weight_N", "combine_GSEP", "merge_GE", "logits_TE"):
        value = getattr(routing, name)
        if isinstance(value, Tensor) and value.requires_grad:
            return value
    return None


def _zeros(layer: MoE, router: Router) -> dict[str, Tensor]:
    """Return what a router's statistics are where nothing was routed, so that every process has all of them."""
    if not _has_statistics(router):
        return {}
    device = next((t.device for t in (*router.parameters(), *router.buffers())), torch.device("cpu"))
    ids = torch.zeros(0, dtype=torch.int64, device=device)
    nothing = RoutingContext(ids, ids, ids, ids.bool(), ids, torch.zeros(0, 1, 1, device=device))
    training = router.training
    # FSDP2 gathers parameters in the forward pass of its module alone. Without tokens their values say nothing.
    whole = {
        name: torch.zeros(value.shape, dtype=value.dtype, device=device)
        for name, value in router.named_parameters()
        if hasattr(value, "full_tensor")  # a DTensor, whose import takes a second
    }
    router.eval()
    try:
        x_TD = torch.zeros(0, layer.spec.d_model, device=device)
        routing = torch.func.functional_call(router, whole, (x_TD, nothing))
    finally:
        router.train(training)
    return {name: torch.zeros_like(value) for name, value in router.statistics(routing, nothing).items()}


def _has_statistics(router: Router) -> bool:
    return not all(
        declaring_class(type(part), "statistics") in (Router, RouterWrapper)
        for part in router.modules()
        if isinstance(part, Router)
    )


def _over_processes(sums: dict[str, Tensor], process_group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    if not (sums and dist.is_available() and dist.is_initialized()):
        return sums
    flat = torch.cat([value.flatten().double() for value in sums.values()])  # counts of any size are exact
    dist.all_reduce(flat, group=process_group)
    parts = torch.split(flat, [value.numel() for value in sums.values()])
    return {n: part.view_as(value).to(value.dtype) for (n, value), part in zip(sums.items(), parts, strict=True)}
