"""DAMoERouter: attention says how many experts a token gets (Aghdam et al. 2024, https://arxiv.org/abs/2409.06669)."""
# Shape suffixes: T tokens, D model width, H heads, E experts, K choices per token, G sequences, S tokens of a sequence.

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, final

import torch
from torch import Tensor, nn

from routerzoo import LayerSpec, LogitRouter, LossWeight, Routing, RoutingContext, register_router
from routerzoo.functional import gate_linear, topk_indices

Importance = Literal["received", "spread"]


@register_router
@final
class DAMoERouter(LogitRouter):
    """A linear gate whose k is each token's own, from 1 to `top_k`, by the token's importance in the attention before.

    `received`: the attention that a token gets from its sequence, averaged over heads, in proportion to the most
    important token's; `k_t = max(1, ceil(top_k * importance))`. It looks at later tokens, so is not for decoders.
    `spread`: for decoders, how widely a token attends to itself and earlier ones: the entropy of its attention,
    averaged over heads, in proportion to the largest possible. The softmax is over the k_t chosen logits.

    Inspired by: the paper could be read second-hand only, which gives neither the map from importance to k nor a causal
    form; both are ours.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: the most experts that a token gets.
        importance: what makes a token important.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: an importance of another name.
    """

    paper = "Aghdam et al. 2024, arXiv:2409.06669"
    inspired_by = True
    requires = frozenset({"attention", "positions", "sequence_ids"})
    default_loss_weights: Mapping[str, float | LossWeight] = {"balance": 1e-2}
    tokenwise = False
    compiles = False
    causal_form = 'DAMoERouter with importance="spread"'

    def __init__(
        self, spec: LayerSpec, *, top_k: int = 2, importance: Importance = "received", init_std: float = 0.02
    ) -> None:
        if importance not in ("received", "spread"):
            raise ValueError(f"importance must be received or spread, got {importance!r}")
        super().__init__(spec, top_k=top_k)
        self.importance: Importance = importance
        self.causal = importance == "spread"
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * init_std)

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return `x W^T`."""
        return gate_linear(x_TD, self.weight)

    def select_experts(self, logits_TE: Tensor) -> Tensor:
        """Refuse: the attention decides how many are selected.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("DAMoERouter selects experts by the attention too, not by logits alone")

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Select as many of the largest logits as the attention says."""
        logits_TE = self.logits(x_TD, context)
        k_T1 = (self._importance(context) * self.top_k - 1e-4).ceil().clamp(1, self.top_k).unsqueeze(1)
        beyond_TK = torch.arange(self.top_k, device=x_TD.device) >= k_T1
        experts_TK = topk_indices(logits_TE, self.top_k).masked_fill(beyond_TK, -1)
        return Routing(experts_TK, self.combine_weights(logits_TE, experts_TK), logits_TE)

    @torch.no_grad()
    def _importance(self, context: RoutingContext) -> Tensor:
        attention_THS, place_T, ids_T = context.attention, context.positions, context.sequence_ids
        assert attention_THS is not None
        assert place_T is not None
        assert ids_T is not None
        attention_THS = attention_THS.float()
        num_places = attention_THS.shape[2]
        if self.importance == "spread":
            later_TS = torch.arange(num_places, device=ids_T.device) > place_T.unsqueeze(1)
            seen_THS = attention_THS.masked_fill(later_TS.unsqueeze(1), 0.0)
            seen_THS = seen_THS / seen_THS.sum(-1, keepdim=True).clamp_min(1e-20)
            widest_T = (place_T + 1).float().log()
            entropy_T: Tensor = torch.special.entr(seen_THS).sum(-1).mean(1)
            return entropy_T / widest_T.clamp_min(1e-6)
        if len(ids_T) == 0:
            return place_T.float()
        real_T = torch.ones_like(ids_T, dtype=torch.bool) if context.padding_mask is None else ~context.padding_mask
        _, group_T = torch.unique(ids_T, return_inverse=True)
        num_groups = int(group_T.max()) + 1
        given_TS = attention_THS.mean(1) * real_T.unsqueeze(1)
        received_GS = given_TS.new_zeros(num_groups, num_places).index_add(0, group_T, given_TS)
        received_T = received_GS[group_T, place_T].masked_fill(~real_T, 0.0)
        most_G = received_T.new_zeros(num_groups).scatter_reduce(0, group_T, received_T, "amax")
        return received_T / most_G.index_select(0, group_T).clamp_min(1e-20)
