"""SimilarityRouter: similar tokens are routed alike (Nguyen et al. 2025, https://arxiv.org/abs/2505.00792)."""
# Shape suffixes: T tokens, D model width, E experts, G sequences, S tokens of a sequence.

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from routerzoo import LayerSpec, LogitRouter, RoutingContext, register_router
from routerzoo.functional import gate_linear
from routerzoo.functional.gate import at_least_float32
from routerzoo.functional.ragged import group_by_sequence


@register_router
@final
class SimilarityRouter(LogitRouter):
    """A token's logits are averaged with those of the tokens that it resembles, itself and earlier ones.

    `logits = softmax(x W x^T / (temperature * sqrt(D))) L` within a sequence, with L a linear gate's; then the softmax
    over the k largest. Inspired by similarity-aware routing in "graph of tokens", whose equations could not be read
    here; with `causal=False` the average is over all tokens of the sequence. Costs `S^2 D` for each sequence of S
    tokens, like attention; generation computes all tokens again in each step.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: experts per token.
        temperature: the higher, the wider the average.
        causal: leave later tokens out.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: a temperature that is not positive.
    """

    paper = "Nguyen et al. 2025, arXiv:2505.00792"
    inspired_by = True
    requires = frozenset({"sequence_ids"})
    tokenwise = False
    compiles = False
    causal_form = "SimilarityRouter with causal=True"

    def __init__(
        self,
        spec: LayerSpec,
        *,
        top_k: int = 2,
        temperature: float = 1.0,
        causal: bool = True,
        init_std: float = 0.02,
    ) -> None:
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        super().__init__(spec, top_k=top_k)
        self.temperature, self.causal = temperature, causal
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * init_std)
        self.similarity = nn.Parameter(torch.eye(spec.d_model))

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return the gate's logits, averaged over similar tokens."""
        sequences = group_by_sequence(len(x_TD), context.sequence_ids, context.padding_mask, x_TD.device)
        x_GSD = sequences.to_padded(at_least_float32(x_TD))
        scale = self.temperature * self.spec.d_model**0.5
        likeness_GSS = (x_GSD @ self.similarity) @ x_GSD.mT / scale
        # A place without token sees itself, so that no row is empty.
        itself_SS = torch.eye(x_GSD.shape[1], dtype=torch.bool, device=x_TD.device)
        seen_GSS = sequences.real_GS.unsqueeze(1) | itself_SS
        if self.causal:
            seen_GSS = seen_GSS & torch.ones_like(seen_GSS).tril()
        mixing_GSS = likeness_GSS.masked_fill(~seen_GSS, -torch.inf).softmax(-1)
        return sequences.to_flat(mixing_GSS @ gate_linear(x_GSD, self.weight), len(x_TD))
