"""Contexts for models whose blocks hand on nothing but hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from routerzoo.functional.recomputation import in_backward
from routerzoo.moe.layer import moe_layers
from routerzoo.routing import RoutingContext


@contextmanager
def provide_context(model: nn.Module, context: RoutingContext | None = None) -> Iterator[RoutingContext]:
    """Hand a context to the MoE layers of a model for a while.

    Where activations are checkpointed, the backward pass belongs inside: it computes the forward pass again.

    Args:
        model: the model.
        context: the context; by default an empty one.

    Example:
        >>> import torch
        >>> from routerzoo import MoE, RoutingContext
        >>> model = torch.nn.Sequential(MoE(d_model=8, num_experts=4), torch.nn.ReLU())
        >>> with provide_context(model) as context:
        ...     y = model(torch.randn(3, 8))
        >>> context.routings_of(model[0])[0].expert_load(4).sum()
        tensor(6.)
    """
    context = RoutingContext() if context is None else context
    layers = list(moe_layers(model))
    before = [layer._provided_context for layer in layers]
    for layer in layers:
        layer._provided_context = context
    try:
        yield context
    finally:
        for layer, earlier in zip(layers, before, strict=True):
            layer._provided_context = earlier


class ContextHook:
    """Builds the context of each forward pass of a model from the model's own inputs.

    For models that somebody else's loop calls (`generate`, a trainer). The context of a pass serves its recomputation
    in the backward pass too, and no other forward pass: run the backward pass of one before the next.

    Args:
        model: the model.
        build: returns the context, called with what the model is called with.

    Attributes:
        context: of the last forward pass.
    """

    def __init__(self, model: nn.Module, build: Callable[..., RoutingContext]) -> None:
        self.context = RoutingContext()
        self._model, self._build = model, build
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "context": RoutingContext()}  # a copy of the model has had no pass

    def remove(self) -> None:
        """Build contexts no more."""
        for handle in self._handles:
            handle.remove()
        self._provide(None)

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if in_backward():
            return
        self.context = self._build(*args, **kwargs)
        self._provide(self.context)

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not in_backward():
            self.context.finish()

    def _provide(self, context: RoutingContext | None) -> None:
        for layer in moe_layers(self._model):
            layer._provided_context = context
