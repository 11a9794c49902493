"""AttentionRouter: tokens are routed like those they attend to (Nguyen et al. 2025, https://arxiv.org/abs/2505.00792)."""
# Shape suffixes: T tokens, D model width, H heads, E experts, G sequences, S tokens of a sequence.

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from routerzoo import LayerSpec, LogitRouter, RoutingContext, register_router
from routerzoo.functional import gate_linear


@register_router
@final
class AttentionRouter(LogitRouter):
    """A token's logits are averaged with those of the tokens that it attends to, by the attention layer before.

    `logits = mean_h A_h L`, with A the attention weights of the layer before the MoE layer and L a linear gate's; then
    the softmax over the k largest. Inspired by attention-aware routing in "graph of tokens", whose equations could not
    be read here. The model has to compute its attention weights openly, `S^2` numbers a head, where a fused kernel
    would not; generation computes all tokens again in each step.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: experts per token.
        causal: leave later tokens out, whatever the attention says of them.
        init_std: standard deviation of the gate's initial weights.
    """

    paper = "Nguyen et al. 2025, arXiv:2505.00792"
    inspired_by = True
    requires = frozenset({"attention", "positions", "sequence_ids"})
    tokenwise = False
    compiles = False
    causal_form = "AttentionRouter with causal=True"

    def __init__(self, spec: LayerSpec, *, top_k: int = 2, causal: bool = True, init_std: float = 0.02) -> None:
        super().__init__(spec, top_k=top_k)
        self.causal = causal
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * init_std)

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return the gate's logits, averaged by the attention."""
        attention_THS, place_T, ids_T = context.attention, context.positions, context.sequence_ids
        assert attention_THS is not None
        assert place_T is not None
        assert ids_T is not None
        own_TE = gate_linear(x_TD, self.weight)
        return mixed_by_attention(own_TE, attention_THS, place_T, ids_T, context.padding_mask, bool(self.causal))


def mixed_by_attention(
    values_TE: Tensor,
    attention_THS: Tensor,
    place_T: Tensor,
    ids_T: Tensor,
    padding_mask: Tensor | None,
    causal: bool,
) -> Tensor:
    """Return the mean of each sequence's values under each token's attention, averaged over heads.

    A token whose attention leaves nothing (padding, or all of it to what is left out) keeps its own values.
    """
    num_tokens, num_places = len(values_TE), attention_THS.shape[2]
    if num_tokens == 0:
        return values_TE
    real_T = torch.ones_like(ids_T, dtype=torch.bool) if padding_mask is None else ~padding_mask
    _, group_T = torch.unique(ids_T, return_inverse=True)
    num_groups = int(group_T.max()) + 1
    cell_T = group_T * num_places + place_T
    weight_TS = attention_THS.to(values_TE.dtype).mean(1)
    if causal:
        places_S = torch.arange(num_places, device=ids_T.device)
        weight_TS = weight_TS.masked_fill(places_S > place_T.unsqueeze(1), 0.0)
    # Rows and columns of one rectangle a sequence; places without a token, and padding, are zeros.
    real_GS = torch.zeros(num_groups * num_places, device=ids_T.device, dtype=values_TE.dtype)
    real_GS = real_GS.index_put((cell_T,), real_T.to(values_TE.dtype)).view(num_groups, 1, num_places)
    values_GSE = values_TE.new_zeros(num_groups * num_places, values_TE.shape[1])
    values_GSE = values_GSE.index_put((cell_T,), values_TE * real_T.unsqueeze(1))
    weight_GSS = weight_TS.new_zeros(num_groups * num_places, num_places).index_put((cell_T,), weight_TS)
    weight_GSS = weight_GSS.view(num_groups, num_places, num_places) * real_GS
    total_GS1 = weight_GSS.sum(-1, keepdim=True)
    mixed_GSE = weight_GSS @ values_GSE.view(num_groups, num_places, -1) / total_GS1.clamp_min(1e-20)
    found_T1 = (total_GS1.flatten().index_select(0, cell_T) > 0).unsqueeze(1)
    return torch.where(found_T1, mixed_GSE.flatten(0, 1).index_select(0, cell_T), values_TE)
