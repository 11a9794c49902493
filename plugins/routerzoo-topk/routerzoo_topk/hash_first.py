"""HashFirstRouter: a fixed table in the first layers, a learned gate in the others."""
# Shape suffixes: T tokens, D model width, V token ids.

from __future__ import annotations

from dataclasses import replace
from typing import final

from torch import Tensor

from routerzoo import HashRouter, LayerSpec, Router, RouterWrapper, Routing, RoutingContext, register_router
from routerzoo.functional.topk import ScoreFunction
from routerzoo_topk.topk import TopKRouter


@register_router
@final
class HashFirstRouter(RouterWrapper):
    """Routes by token id in the first MoE layers of a model, and by a `TopKRouter` in the others.

    Inspired by what is reported of DeepSeek-V4: three hash layers, then sqrt-softplus scores, 6 of 384 experts, weights
    renormalized times 2.5, a selection bias against imbalance. Its report could not be read here, so the details of the
    hash layers are `routerzoo.HashRouter`'s: a random table and equal weights, times the same scale.

    Args:
        spec: sizes of the layer the router sits in, with `vocab_size` and `layer`.
        top_k: experts per token.
        hash_layers: MoE layers that route by token id.
        score: how the gate's logits become scores.
        bias_speed: step of the gate's selection bias.
        renormalize: divide the gate's selected scores by their sum.
        scale: factor on all weights.
        seed: seed of the tables.

    Raises:
        ValueError: a negative number of hash layers.
    """

    paper = "DeepSeek-AI 2026 (second-hand); Roller et al., NeurIPS 2021, arXiv:2106.04426"
    inspired_by = True

    def __init__(
        self,
        spec: LayerSpec,
        *,
        top_k: int = 2,
        hash_layers: int = 3,
        score: ScoreFunction = "sqrt_softplus",
        bias_speed: float = 1e-3,
        renormalize: bool = True,
        scale: float = 2.5,
        seed: int = 0,
    ) -> None:
        if hash_layers < 0:
            raise ValueError(f"hash_layers must be at least 0, got {hash_layers}")

        def build(spec: LayerSpec) -> Router:
            # HashRouter refuses a layer without an index.
            if hash_layers and (spec.layer is None or spec.layer < hash_layers):
                return HashRouter(spec, top_k=top_k, seed=seed)
            return TopKRouter(
                spec, top_k=top_k, score=score, bias_speed=bias_speed, renormalize=renormalize, scale=scale
            )

        super().__init__(spec, router=build)
        self.scale = scale
        self.normalized &= scale == 1.0

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route by the layer's method."""
        routing = self.router.route(x_TD, context)
        if isinstance(self.router, HashRouter) and routing.weights_TK is not None:
            return replace(routing, weights_TK=routing.weights_TK * self.scale)
        return routing
