"""Other routers in some layers of a model, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

from torch import nn

from routerzoo import LayerSpec, MoE, Router, RouterWrapper, moe_layers

V = TypeVar("V")
Build = Callable[[LayerSpec, Callable[[LayerSpec], Router], V], RouterWrapper]


@contextmanager
def wrapped_routers(model: nn.Module, values: Mapping[int | MoE, V], build: Build[V]) -> Iterator[None]:
    """Wrap the routers of some layers for a while.

    Args:
        model: a model with MoE layers.
        values: something for each layer, by the layer or by its index among `moe_layers(model)`.
        build: returns the wrapper, from the layer's spec, what returns the inner router, and the layer's value.

    Raises:
        ValueError: no such layer.
        TypeError: a layer whose router is wrapped by something that is no router, such as an adapter.
    """
    chosen = {_layer(model, key): value for key, value in values.items()}
    before = {layer: layer.router for layer in chosen}
    try:
        for layer, value in chosen.items():
            inner = layer.router
            if not isinstance(inner, Router):
                raise TypeError(f"the layer's router is in a {type(inner).__name__}; take that off first")
            # The layer's context fields serve the inner router: the wrapper requires no others.
            spec = replace(layer.spec, provides=layer.spec.provides | inner.requires)
            wrapper = build(spec, partial(_given, inner), value)
            wrapper.is_frozen = inner.is_frozen
            layer.router = wrapper.train(inner.training)
        yield
    finally:
        for layer, router in before.items():
            layer.router = router


def _given(router: Router, spec: LayerSpec) -> Router:
    return router


def _layer(model: nn.Module, key: int | MoE) -> MoE:
    layers = list(moe_layers(model))
    if isinstance(key, MoE):
        if key not in layers:
            raise ValueError("the model does not hold that MoE layer")
        return key
    if not 0 <= key < len(layers):
        raise ValueError(f"the model has no MoE layer {key}; it has {len(layers)}, from 0")
    return layers[key]
