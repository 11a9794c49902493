"""ReplayRouter: the experts of an earlier pass, selected again."""
# Shape suffixes: T tokens, K choices per token.

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, final

import torch
from torch import Tensor, nn

from routerzoo import LayerSpec, MoE, Router, RouterWrapper, Routing, RoutingContext, register_router
from routerzoo.functional.recomputation import in_backward
from routerzoo_policies.swapping import wrapped_routers

Weights = Literal["current", "recorded"]
UNKNOWN = -2
"""In a recording, the expert of a token that nothing is known of: it is routed as the inner router would."""


@register_router
@final
class ReplayRouter(RouterWrapper):
    """Sends tokens to the experts that it is given, whatever the inner router would select.

    Reinforcement learning on sparse models replays in training the experts that inference selected, since otherwise the
    two disagree in a few per cent of the choices ("rollout routing replay", Ma et al. 2025,
    https://arxiv.org/abs/2510.11370). Weights are the inner router's for those experts, with their gradient
    (`current`), or as they were (`recorded`). Logits are the inner router's; losses and statistics are of what it
    selected. Until `forced` is set, its routing is left as it is; see `record` and `replay`.

    Args:
        spec: sizes of the layer the router sits in.
        router: the inner router.
        weights: where weights come from.

    Attributes:
        forced: the routing of each call in a pass; empty forces nothing.

    Raises:
        ValueError: weights of another name; in use, a recording of another number of tokens or of fewer calls.
        NotImplementedError: in use, current weights of a router that does not weight experts by logits; or a layer that
            is called several times in a pass that activation checkpointing repeats.
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
        self.forced: Sequence[Routing] = ()

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route to the given experts."""
        routing = self.router.route(x_TD, context)
        if not self.forced or not len(x_TD):
            return routing
        forced = self.forced[self._call(context)]
        if forced.experts_TK is not None and len(forced.experts_TK) != len(x_TD):
            raise ValueError(f"the recording is of {len(forced.experts_TK)} tokens, the call has {len(x_TD)}")
        if self.weights == "current":
            if forced.experts_TK is None or routing.logits_TE is None:
                raise NotImplementedError(
                    f"{type(self.router).__name__} cannot weight experts that it did not select; replay the recorded "
                    "weights"
                )
            forced = _completed(forced, routing)
            assert forced.experts_TK is not None  # as before
            weights_TK = self.router.combine_weights(routing.logits_TE, forced.experts_TK)
            forced = replace(forced, weights_TK=weights_TK)
        return replace(
            forced,
            logits_TE=routing.logits_TE,
            losses=routing.losses,
            score_fn=routing.score_fn,
            balance_probs_TE=routing.balance_probs_TE,
            clean_logits_TE=routing.clean_logits_TE,
            noise_std=routing.noise_std,
            selected=routing.for_losses,
        )

    def _call(self, context: RoutingContext) -> int:
        """Return which call of the pass this is."""
        if in_backward():
            if len(self.forced) > 1:
                raise NotImplementedError(
                    "a layer that is called several times in a pass cannot be replayed under activation checkpointing: "
                    "which call is repeated is not known"
                )
            return 0
        call: int = context.carry.get((self, "call"), 0)
        if call >= len(self.forced):
            raise ValueError(f"the recording has {len(self.forced)} calls of the layer in a pass; this is one more")
        context.carry[self, "call"] = call + 1
        return call


def _completed(forced: Routing, routing: Routing) -> Routing:
    """Return a recording whose unknown tokens have the experts that the router selects."""
    assert forced.experts_TK is not None
    unknown_TK, own_TK = forced.experts_TK == UNKNOWN, routing.experts_TK
    if own_TK is None or own_TK.shape != forced.experts_TK.shape:
        if not unknown_TK.any():
            return forced
        own = "no fixed number of" if own_TK is None else own_TK.shape[1]
        raise ValueError(
            f"the recording has {forced.experts_TK.shape[1]} experts for each token, and tokens without any, where the "
            f"router would select {own}: give the router the recording's top_k"
        )
    experts_TK = torch.where(unknown_TK, own_TK, forced.experts_TK)
    return replace(forced, experts_TK=experts_TK, may_drop=forced.may_drop or routing.may_drop)


@contextmanager
def replay(
    model: nn.Module, routings: Mapping[int | MoE, Sequence[Routing]], *, weights: Weights = "current"
) -> Iterator[None]:
    """Send tokens to recorded experts for a while, in every pass through the model.

    Stay inside it for the backward pass too where activations are checkpointed: their recomputation routes again.

    Args:
        model: a model with MoE layers.
        routings: the routing of each call in a pass, as `Recording.joined` gives them, by the layer or by its index
            among `routerzoo.moe_layers(model)`; other layers route as ever.
        weights: the router's weights for those experts, or the recorded ones.

    Raises:
        ValueError: no such layer, or recorded weights of a recording that has none, such as an engine's.
    """
    recorded = [one for calls in routings.values() for one in calls if weights == "recorded"]
    if any(one.weights_TK is not None and bool(one.weights_TK.isnan().any()) for one in recorded):
        raise ValueError("the recording has no weights, as those of inference engines: replay with weights='current'")

    def build(spec: LayerSpec, router: Callable[[LayerSpec], Router], forced: Sequence[Routing]) -> ReplayRouter:
        replayed = ReplayRouter(spec, router=router, weights=weights)
        replayed.forced = forced
        return replayed

    with wrapped_routers(model, routings, build):
        yield
