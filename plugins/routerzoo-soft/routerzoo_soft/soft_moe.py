"""SoftMoERouter: experts compute weighted averages of tokens (Puigcerver et al. 2024, arXiv:2308.00951)."""
# Shape suffixes: T tokens, D model width, E experts, G sequences, S tokens of a sequence, P slots of an expert.

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routerzoo import LayerSpec, Router, Routing, RoutingContext, register_router
from routerzoo.functional.gate import at_least_float32
from routerzoo.functional.ragged import group_by_sequence


@register_router
@final
class SoftMoERouter(Router):
    """Each expert computes slots, averages of a sequence's tokens; each token gets an average of all slots.

    `z = scale * normalize(x) @ normalize(phi)`; a slot's input is weighted by the softmax of z over tokens, a token's
    output by the softmax over all slots (Puigcerver et al., ICLR 2024, algorithm 1 and section 2.3). Everything is
    differentiable, every expert always computes as much, and no loss is needed. Every token looks at all tokens of its
    sequence: not for decoders, in any form.

    The tokens of a sequence must be adjacent, and sequences of one length, as images are. Padding is left out of the
    averages. The weights cost `S * E * slots` products of width D for each sequence, quadratic in S where the number of
    slots grows with it.

    Args:
        spec: sizes of the layer the router sits in.
        slots: slots of an expert. By default as many as make a sequence of `spec.num_positions` cost what one expert
            per token would, at least 1; the paper's best models have one.
        init_scale: initial value of the learned scale.

    Raises:
        ValueError: no slots; in use, sequences of several lengths.
    """

    paper = "Puigcerver et al., ICLR 2024, arXiv:2308.00951"
    requires = frozenset({"sequence_ids"})
    causal = False
    tokenwise = False
    normalized = True
    compiles = False

    def __init__(self, spec: LayerSpec, *, slots: int | None = None, init_scale: float = 1.0) -> None:
        if slots is None:
            slots = max(round((spec.num_positions or 1) / spec.num_experts), 1)
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        super().__init__(spec, top_k=1, max_top_k=1)
        self.phi = nn.Parameter(torch.randn(spec.num_experts, slots, spec.d_model) * spec.d_model**-0.5)
        self.scale = nn.Parameter(torch.tensor(float(init_scale)))

    @torch.no_grad()
    def scale_initial_logits(self, factor: float) -> None:
        """Multiply the learned scale."""
        self.scale.mul_(factor)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Weight every token for every slot, and every slot for every token."""
        groups, length = _rectangle(len(x_TD), context.sequence_ids, x_TD.device)
        slots_EPD = F.normalize(self.phi, dim=-1)
        logits_TEP = self.scale * torch.einsum("td,epd->tep", F.normalize(at_least_float32(x_TD), dim=-1), slots_EPD)
        logits_GSEP = logits_TEP.view(groups, length, *slots_EPD.shape[:2])
        dispatch_GSEP, combine_GSEP = logits_GSEP, logits_GSEP.flatten(2).softmax(-1).view_as(logits_GSEP)
        if context.padding_mask is not None:
            padding_GS11 = context.padding_mask.view(groups, length, 1, 1)
            # Not minus infinity: a sequence that is all padding would be NaN.
            dispatch_GSEP = dispatch_GSEP.masked_fill(padding_GS11, torch.finfo(dispatch_GSEP.dtype).min)
            combine_GSEP = combine_GSEP.masked_fill(padding_GS11, 0.0)
        return Routing(dispatch_GSEP=dispatch_GSEP.softmax(1), combine_GSEP=combine_GSEP)


def _rectangle(num_tokens: int, sequence_ids: Tensor | None, device: torch.device) -> tuple[int, int]:
    """Return number and length of the sequences.

    Raises:
        ValueError: they have several lengths, or their tokens are not adjacent.
    """
    sequences = group_by_sequence(num_tokens, sequence_ids, None, device)
    groups, length = sequences.real_GS.shape
    if not sequences.real_GS.all() or not torch.equal(
        sequences.token_GS.sort(0).values.flatten(), torch.arange(num_tokens, device=device)
    ):
        lengths = sorted(set(sequences.lengths_G.tolist()))
        raise ValueError(
            f"SoftMoERouter takes sequences of one length with adjacent tokens; theirs are {lengths}: pad them, and "
            "give a padding_mask"
        )
    return groups, length
