"""Contexts for models whose blocks hand on nothing but hidden states."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from routerzoo.functional.recomputation import backward_id, in_backward
from routerzoo.moe.layer import moe_layers
from routerzoo.routing import RoutingContext


@contextmanager
def provide_context(model: nn.Module, context: RoutingContext | None = None) -> Iterator[RoutingContext]:
    """Hand a context to the MoE layers of a model for a while.

    Where activations are checkpointed, the backward pass belongs inside, and no other context in between: it computes
    the forward pass again.

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

    For models that somebody else's loop calls (`generate`, a trainer). Where activation checkpointing computes a pass
    again, in the backward pass, it finds the context of that pass, also if other forward passes came between.

    Args:
        model: the model.
        build: returns the context, called with what the model is called with.

    Attributes:
        context: of the last forward pass.
    """

    def __init__(self, model: nn.Module, build: Callable[..., RoutingContext]) -> None:
        self.context = RoutingContext()
        self._model, self._build = model, build
        self._passes = itertools.count()
        # The backward pass that runs, the forward pass that it is in, and those that it has been in before.
        self._backward, self._pass, self._left = -1, -1, set[int]()
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "context": RoutingContext()}  # a copy of the model has had no pass

    def remove(self) -> None:
        """Build contexts no more."""
        while self._handles:
            self._handles.pop().remove()
        self._provide(None)

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if in_backward():
            return
        self.context = self._build(*args, **kwargs)
        self._provide(self.context)

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if in_backward():
            return
        self.context.finish()
        if torch.compiler.is_compiling():  # a compiled graph computes again by itself
            return
        number, context = next(self._passes), self.context
        for value in _differentiable(output):  # keeps the context as long as the pass can be computed again
            value.register_hook(partial(self._reach, number, lambda: context))  # type: ignore[no-untyped-call]
        # For losses of routings alone. A context in a hook of its own routings would be a cycle that is never freed.
        weak = weakref.ref(context)
        for published in context.routings:
            for value in _differentiable(vars(published.routing)):
                value.register_hook(partial(self._reach, number, weak))  # type: ignore[no-untyped-call]

    def _reach(self, number: int, context: Callable[[], RoutingContext | None], gradient: Tensor) -> None:
        """Provide the context of the forward pass that a backward pass has reached.

        Autograd runs what was computed last first, so that it is done with a forward pass when it reaches an earlier
        one. Where it is not (devices have a thread each), recomputation finds no context, which is an error.
        """
        if self._backward != backward_id():
            self._backward, self._pass, self._left = backward_id(), -1, set()
        if number != self._pass and self._handles:
            self._provide(None if number in self._left else context())
            self._left.add(number)
            self._pass = number

    def _provide(self, context: RoutingContext | None) -> None:
        for layer in moe_layers(self._model):
            layer._provided_context = context


def _differentiable(values: Any) -> Iterator[Tensor]:
    for value in tree_leaves(values):
        if isinstance(value, Tensor):
            if value.grad_fn is not None:
                yield value
        elif dataclasses.is_dataclass(value):
            yield from _differentiable(vars(value))
