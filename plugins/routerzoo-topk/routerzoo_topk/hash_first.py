"""HashFirstRouter: a fixed table in the first layers, a learned gate in the others."""
# Shape suffixes: T tokens, D model width, V token ids.

from __future__ import annotations

from dataclasses import replace
from typing import final

from torch import Tensor

from routerzoo import HashRouter, LayerSpec, Router, Routing, RoutingContext, register_router
from routerzoo_topk.gate import Score, TopKRouter


@register_router
@final
class HashFirstRouter(Router):
    """Routes by token id in the first MoE layers of a model, and by a `TopKRouter` in the others.

    Inspired by what is told of DeepSeek-V4: three hash layers, then sqrt-softplus scores, 6 of 384 experts, weights
    renormalised times 2.5, a selection bias against imbalance. Its report could not be read here, so the details of the
    hash layers are `routerzoo.HashRouter`'s: a random table and equal weights, times the same scale.

    Args:
        spec: sizes of the layer the router sits in, with `vocab_size`.
        top_k: experts per token.
        hash_layers: MoE layers that route by token id.
        score: how the gate's logits become scores.
        bias_speed: step of the gate's selection bias.
        renormalize: divide the gate's chosen scores by their sum.
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
        score: Score = "sqrt_softplus",
        bias_speed: float = 1e-3,
        renormalize: bool = True,
        scale: float = 2.5,
        seed: int = 0,
    ) -> None:
        if hash_layers < 0:
            raise ValueError(f"hash_layers must be at least 0, got {hash_layers}")
        super().__init__(spec, top_k=top_k)
        self.hashes = spec.layer < hash_layers
        self.also_require(*(["token_ids"] if self.hashes else []))
        self.scale = scale
        self.gate: Router = (
            HashRouter(spec, top_k=top_k, seed=seed)
            if self.hashes
            else TopKRouter(spec, top_k=top_k, score=score, bias_speed=bias_speed, renormalize=renormalize, scale=scale)
        )
        self.trainable, self.trains_at_top_1 = self.gate.trainable, self.gate.trains_at_top_1
        self.normalized = self.gate.normalized and scale == 1.0
        self.adapted_buffers = frozenset(f"gate.{name}" for name in self.gate.adapted_buffers)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route by the layer's method."""
        self.gate.top_k = self.top_k
        routing = self.gate.route(x_TD, context)
        if self.hashes and routing.weights_TK is not None:
            return replace(routing, weights_TK=routing.weights_TK * self.scale)
        return routing

    def calibrate(self, token_counts_V: Tensor) -> None:
        """Pass it on."""
        self.gate.calibrate(token_counts_V)

    def before_optimizer_step(self) -> None:
        """Pass it on."""
        self.gate.before_optimizer_step()

    def freeze(self) -> None:
        """Freeze the gate too."""
        super().freeze()
        self.gate.freeze()

    def scale_initial_logits(self, factor: float) -> None:
        """Scale the gate; hash layers have no logits."""
        self.gate.scale_initial_logits(factor)
