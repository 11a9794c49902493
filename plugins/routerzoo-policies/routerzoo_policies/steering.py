"""SteeredRouter: additive offsets on a router's logits (Bandarkar et al. 2025, https://arxiv.org/abs/2510.04694)."""
# Shape suffixes: T tokens, E experts, K choices per token.

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn

from routerzoo import LayerSpec, MoE, Router, RouterWrapper, Routing, RoutingContext, register_router
from routerzoo_policies.swapping import wrapped_routers


@register_router
@final
class SteeredRouter(RouterWrapper):
    """Adds an offset for each expert to the logits of any router that selects by logits, before it selects.

    A positive offset makes tokens prefer an expert, minus infinity rules it out. Used on trained models: to bring
    tokens to the experts of another language (arXiv:2510.04694, inspired by: its strengths could not be read), or, with
    `learn`, to tune the offsets on a prompt while all else stays ("rewiring" at test time).

    An offset of zero leaves the inner router's routing as it is. Otherwise experts and weights follow from the steered
    logits as in evaluation. Losses and statistics are of what the inner router selected.

    Args:
        spec: sizes of the layer the router sits in.
        router: the inner router.
        offsets: offset by index of the expert; the others have 0.
        layers: MoE layers to steer; by default all.
        learn: make the offsets a parameter.

    Raises:
        ValueError: no such expert or layer.
        NotImplementedError: in use, a router that does not select by logits.
    """

    paper = "Bandarkar et al. 2025, arXiv:2510.04694"
    inspired_by = True
    offset_E: Tensor

    def __init__(
        self,
        spec: LayerSpec,
        *,
        router: str | Callable[[LayerSpec], Router] = "LinearRouter",
        offsets: Mapping[int, float] | None = None,
        layers: list[int] | None = None,
        learn: bool = False,
    ) -> None:
        super().__init__(spec, router=router)
        for expert in offsets or ():
            if not 0 <= expert < spec.num_experts:
                raise ValueError(f"offsets names expert {expert}; there are 0 to {spec.num_experts - 1}")
        for layer in layers or ():
            if not 0 <= layer < spec.num_layers:
                raise ValueError(f"layers names MoE layer {layer}; there are 0 to {spec.num_layers - 1}")
        offset_E = torch.zeros(spec.num_experts)
        if layers is None or self.required_layer() in layers:
            for expert, offset in (offsets or {}).items():
                offset_E[expert] = offset
        self.learn = learn
        if learn:
            self.offset_E = nn.Parameter(offset_E)
        else:
            self.register_buffer("offset_E", offset_E)
        if learn:
            self.trainable = True
        else:
            self.compiles = False  # the offset is looked at, to see whether there is any

    def select_experts(self, logits_TE: Tensor) -> Tensor:
        """Select as the inner router does, and no expert that is ruled out, even where there are too few others."""
        experts_TK = super().select_experts(logits_TE)
        ruled_out_TK = logits_TE.gather(1, experts_TK.clamp_min(0)) == -torch.inf
        return experts_TK.masked_fill(ruled_out_TK, -1)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Select by the steered logits."""
        routing = self.router.route(x_TD, context)
        if not self.learn and not self.offset_E.any():
            return routing
        if routing.logits_TE is None:
            raise NotImplementedError(f"{type(self.router).__name__} has no logits to steer")
        logits_TE = routing.logits_TE + self.offset_E
        experts_TK = self.select_experts(logits_TE)
        weights_TK = self.combine_weights(logits_TE, experts_TK)
        return Routing(
            experts_TK,
            weights_TK,
            logits_TE,
            routing.losses,
            score_fn=routing.score_fn,
            selected=routing.for_losses,
        )


@contextmanager
def steer(model: nn.Module, offsets: Mapping[int | MoE, Tensor]) -> Iterator[None]:
    """Steer the routers of a model for a while.

    Args:
        model: a model with MoE layers.
        offsets: an offset `[num_experts]` by the layer, or by its index among `routerzoo.moe_layers(model)`; the other
            layers stay as they are.

    Raises:
        ValueError: no such layer, or an offset of another size.
    """
    with wrapped_routers(model, offsets, _steered):
        yield


def _steered(spec: LayerSpec, router: Callable[[LayerSpec], Router], offset_E: Tensor) -> SteeredRouter:
    if offset_E.shape != (spec.num_experts,):
        raise ValueError(f"an offset has shape {list(offset_E.shape)}; it must be [{spec.num_experts}]")
    steered = SteeredRouter(spec, router=router)
    where = next(itertools.chain(steered.router.parameters(), steered.router.buffers()), offset_E).device
    steered.offset_E = offset_E.to(where, steered.offset_E.dtype)
    return steered
