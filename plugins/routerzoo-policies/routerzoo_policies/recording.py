"""`record`: the routings of a model, for a while."""
# Shape suffixes: T tokens, K choices per token.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from routerzoo import Routing, RoutingContext, moe_layers
from routerzoo.routing import LayerRouting


class Recording(dict[int, list[list[Routing]]]):
    """What the MoE layers of a model published, by index among `routerzoo.moe_layers(model)`.

    For each call of a layer in a pass, usually one, a list with the routing of each pass.
    """

    def joined(self, num_sequences: int = 1) -> dict[int, list[Routing]]:
        """Return one routing for each call of each layer, as one pass over the whole sequences would have it.

        Generation routes the prompts first, then a token of each sequence at a time.

        Args:
            num_sequences: sequences that were generated side by side.

        Raises:
            ValueError: nothing was recorded, or routings that have no fixed number of choices.
        """
        if not self:
            raise ValueError("nothing was recorded: run the model inside `with record(model)`")
        return {layer: [_join(passes, num_sequences) for passes in calls] for layer, calls in self.items()}


@contextmanager
def record(model: nn.Module) -> Iterator[Recording]:
    """Record the routings of every MoE layer of a model for a while, without their gradients.

    Calls of one layer in a pass are told apart by the context that they share. What activation checkpointing repeats is
    not recorded again.

    Example:
        >>> import torch
        >>> from routerzoo import MoE
        >>> from routerzoo_policies import replay
        >>> layer, x = MoE(d_model=8, num_experts=4), torch.randn(3, 8)
        >>> with record(layer) as recording:
        ...     y = layer(x)
        >>> with replay(layer, recording.joined()):
        ...     torch.equal(layer(x), y)
        True
    """
    recording, layers = Recording(), list(moe_layers(model))

    def take(published: LayerRouting, context: RoutingContext) -> None:
        calls = recording.setdefault(next(i for i, layer in enumerate(layers) if layer is published.layer), [])
        if published.call == len(calls):
            calls.append([])
        calls[published.call].append(published.routing.detach())

    handles = [layer.register_routing_hook(take) for layer in layers]
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


def _join(passes: list[Routing], num_sequences: int) -> Routing:
    if len(passes) == 1:
        return passes[0]
    experts, weights = [], []
    for routing in passes:
        if routing.experts_TK is None or routing.weights_TK is None:
            raise ValueError("only routings with a fixed number of choices can be joined; replay one pass at a time")
        rows = (num_sequences, -1, routing.experts_TK.shape[1])
        experts.append(routing.experts_TK.view(rows))
        weights.append(routing.weights_TK.view(rows))
    may_drop = any(routing.may_drop for routing in passes)
    return Routing(torch.cat(experts, 1).flatten(0, 1), torch.cat(weights, 1).flatten(0, 1), may_drop=may_drop)
