"""HashFirstRouter: a fixed table chooses experts in the first layers, a learned gate in the others (DeepSeek-V4)."""
# Shape suffixes: T tokens, D model width, E experts, K choices per token, V token ids.

from __future__ import annotations

from typing import final

from torch import Tensor

from routerzoo import HashRouter, LayerSpec, Router, RouterWrapper, Routing, RoutingContext, register_router
from routerzoo.functional.topk import ScoreFunction
from routerzoo_topk.topk import TopKRouter


@register_router
@final
class HashFirstRouter(RouterWrapper):
    """Selects by token id in the first MoE layers of a model, by a `TopKRouter` in the others; a gate weights in all.

    Scores are `sqrt(softplus(x W^T))`. In the hash layers a token's experts are those of a table of token ids, in the
    others the k largest scores, with a selection bias against imbalance. The weights are the experts' scores, divided
    by their sum, times `scale`. As transformers 5.24 has it for DeepSeek-V4 (`DeepseekV4HashRouter`,
    `DeepseekV4TopKRouter`), whose defaults are those of V4-Flash: 3 hash layers, 6 of 256 experts, scale 1.5.

    There the table `[V, k]` comes with the checkpoint, and how it was made is not said; here a row is a random
    permutation of the experts, as in `routerzoo.HashRouter`, of which the first k count.

    Args:
        spec: sizes of the layer the router sits in, with `vocab_size` and `layer`.
        top_k: experts per token.
        hash_layers: MoE layers that select by token id.
        score: how the gate's logits become scores.
        bias_speed: step of the selection bias in the layers after them.
        renormalize: divide the selected scores by their sum.
        scale: factor on the weights.
        seed: seed of the tables; by default torch's. Each layer draws its own.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: a negative number of hash layers.
    """

    paper = "DeepSeek-AI 2026 (transformers 5.24, deepseek_v4); Roller et al., NeurIPS 2021, arXiv:2106.04426"
    table: Tensor | None

    def __init__(
        self,
        spec: LayerSpec,
        *,
        top_k: int = 2,
        hash_layers: int = 3,
        score: ScoreFunction = "sqrt_softplus",
        bias_speed: float = 1e-3,
        renormalize: bool = True,
        scale: float = 1.5,
        seed: int | None = None,
        init_std: float = 0.02,
    ) -> None:
        if hash_layers < 0:
            raise ValueError(f"hash_layers must be at least 0, got {hash_layers}")
        # HashRouter refuses a layer without an index.
        hashed = hash_layers > 0 and (spec.layer is None or spec.layer < hash_layers)
        table = HashRouter(spec, top_k=top_k, seed=seed).table if hashed else None

        def build(spec: LayerSpec) -> Router:
            return TopKRouter(
                spec,
                top_k=top_k,
                score=score,
                bias_speed=0.0 if hashed else bias_speed,
                renormalize=renormalize,
                scale=scale,
                init_std=init_std,
            )

        super().__init__(spec, router=build)
        self.register_buffer("table", table)
        if hashed:
            self.require("token_ids")

    def select_experts(self, logits_TE: Tensor) -> Tensor:
        """Select as the gate does; refuse in the hash layers.

        Raises:
            NotImplementedError: a hash layer.
        """
        if self.table is not None:
            raise NotImplementedError("HashFirstRouter's hash layers select experts by token ids, not by logits")
        return super().select_experts(logits_TE)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Select by the layer's method, and weight by the gate."""
        if self.table is None:
            return self.router.route(x_TD, context)
        assert context.token_ids is not None  # `forward` checked what `requires` names.
        assert isinstance(self.router, TopKRouter)
        logits_TE = self.router.logits(x_TD, context)
        experts_TK = self.table[context.token_ids, : self.top_k]
        weights_TK = self.combine_weights(logits_TE, experts_TK, may_drop=False)
        return Routing(experts_TK, weights_TK, logits_TE, score_fn=self.router.score_fn, may_drop=False)
