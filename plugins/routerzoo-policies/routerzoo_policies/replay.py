"""ReplayRouter: the experts of an earlier pass, chosen again."""
# Shape suffixes: T tokens, N assignments, K choices per token.

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, final

import torch
from torch import Tensor, nn

from routerzoo import LayerSpec, Router, RouterWrapper, Routing, RoutingContext, moe_layers, register_router

Weights = Literal["current", "recorded"]


@register_router
@final
class ReplayRouter(RouterWrapper):
    """Sends tokens to the experts that it is given, whatever the inner router would choose.

    Reinforcement learning on sparse models replays in training the experts that inference chose, since otherwise the
    two disagree in a few per cent of the choices ("rollout routing replay", Ma et al. 2025,
    https://arxiv.org/abs/2510.11370). Weights are the inner router's for those experts, with their gradient
    (`current`), or as they were (`recorded`). Logits and losses are the inner router's. Until `forced` is set, the
    inner router's answer is left as it is; see `record` and `replay`.

    Args:
        spec: sizes of the layer the router sits in.
        router: the inner router.
        weights: where weights come from.

    Raises:
        ValueError: weights of another name; in use, a recording of another number of tokens.
        NotImplementedError: in use, current weights of a router that does not weigh experts by logits.
    """

    paper = "Ma et al. 2025, arXiv:2510.11370"

    def __init__(
        self,
        spec: LayerSpec,
        *,
        router: str | Callable[[LayerSpec], Router] = "LinearRouter",
        weights: Weights = "current",
    ) -> None:
        if weights not in ("current", "recorded"):
            raise ValueError(f"weights must be current or recorded, got {weights!r}")
        super().__init__(spec, router=router)
        self.weights: Weights = weights
        self.forced: Routing | None = None

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route to the given experts."""
        routing = self.router.route(x_TD, context)
        if self.forced is None:
            return routing
        forced = self.forced
        if forced.experts_TK is not None and len(forced.experts_TK) != len(x_TD):
            raise ValueError(
                f"the recording of MoE layer {self.spec.layer} is of {len(forced.experts_TK)} tokens, "
                f"the call has {len(x_TD)}"
            )
        told = {"logits_TE": routing.logits_TE, "losses": routing.losses, "balance_probs_TE": routing.balance_probs_TE}
        if self.weights == "recorded":
            return replace(forced, **told)
        if forced.experts_TK is None or routing.logits_TE is None:
            raise NotImplementedError(
                f"{type(self.router).__name__} cannot weigh experts that it did not choose; replay the recorded weights"
            )
        weights_TK = self.router.combine_weights(routing.logits_TE, forced.experts_TK)
        return replace(forced, weights_TK=weights_TK, **told)


class Recording(dict[int, list[Routing]]):
    """What the routers of a model answered, by index of the MoE layer: one routing for each call."""

    def joined(self, num_sequences: int = 1) -> dict[int, Routing]:
        """Return one routing for each layer, as one pass over the whole sequences would have it.

        Generation routes the prompts first, then a token of each sequence at a time.

        Args:
            num_sequences: sequences that were generated side by side.

        Raises:
            ValueError: nothing was recorded, or routings that have no fixed number of choices.
        """
        if not self:
            raise ValueError("nothing was recorded: run the model inside `with record(model)`")
        return {layer: _join(calls, num_sequences) for layer, calls in self.items()}


def _join(calls: list[Routing], num_sequences: int) -> Routing:
    if len(calls) == 1:
        return calls[0]
    experts, weights = [], []
    for call in calls:
        if call.experts_TK is None or call.weights_TK is None:
            raise ValueError("only routings with a fixed number of choices can be joined; replay one call at a time")
        experts.append(call.experts_TK.unflatten(0, (num_sequences, -1)))
        weights.append(call.weights_TK.unflatten(0, (num_sequences, -1)))
    may_drop = any(call.may_drop for call in calls)
    return Routing(torch.cat(experts, 1).flatten(0, 1), torch.cat(weights, 1).flatten(0, 1), may_drop=may_drop)


@contextmanager
def record(model: nn.Module) -> Iterator[Recording]:
    """Record the routings of every MoE layer of a model for a while, without their gradients.

    Example:
        >>> import torch
        >>> from routerzoo import MoE
        >>> layer, x = MoE(d_model=8, num_experts=4), torch.randn(3, 8)
        >>> with record(layer) as recording:
        ...     y = layer(x)
        >>> with replay(layer, recording.joined()):
        ...     torch.equal(layer(x), y)
        True
    """
    recording = Recording()

    def taking(index: int) -> Callable[[nn.Module, object, Routing], None]:
        def hook(router: nn.Module, inputs: object, routing: Routing) -> None:
            recording.setdefault(index, []).append(_detached(routing))

        return hook

    handles = [layer.router.register_forward_hook(taking(layer.spec.layer)) for layer in moe_layers(model)]
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replay(model: nn.Module, routings: Mapping[int, Routing], *, weights: Weights = "current") -> Iterator[None]:
    """Send tokens to recorded experts for a while, in every pass through the model.

    Stay inside it for the backward pass too where activations are checkpointed: their recomputation routes again.

    Args:
        model: a model with MoE layers.
        routings: by index of the MoE layer, as `Recording.joined` gives them; other layers route as ever.
        weights: the router's weights for those experts, or the recorded ones.

    Raises:
        ValueError: no such layer.
    """
    layers = {layer.spec.layer: layer for layer in moe_layers(model)}
    if unknown := sorted(set(routings) - set(layers)):
        raise ValueError(f"the model has no MoE layer {unknown[0]}; it has {', '.join(map(str, layers))}")
    before = {index: layers[index].router for index in routings}
    try:
        for index, routing in routings.items():
            inner = before[index]
            spec = replace(layers[index].spec, provides=layers[index].spec.provides | inner.requires)
            replayed = ReplayRouter(spec, router=lambda _, r=inner: r, weights=weights)
            replayed.forced = routing
            layers[index].router = replayed.train(inner.training)
        yield
    finally:
        for index, inner in before.items():
            layers[index].router = inner


def _detached(routing: Routing) -> Routing:
    tensors = {name: value.detach() for name, value in vars(routing).items() if isinstance(value, Tensor)}
    return replace(routing, **{**tensors, "losses": {}})
