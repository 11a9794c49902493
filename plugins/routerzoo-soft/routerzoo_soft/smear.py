"""SMEARRouter: the experts of a sequence are merged into one (Muqeeth et al. 2023, arXiv:2306.03745)."""
# Shape suffixes: T tokens, D model width, E experts, B sequences, S tokens of a sequence, C segments of a sequence,
# G groups of tokens that share a merged expert.

from __future__ import annotations

from typing import Literal, final, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routerzoo import LayerSpec, Router, Routing, RoutingContext, register_router
from routerzoo.functional.gate import at_least_float32
from routerzoo.functional.ragged import group_by_sequence

SMEARScope = Literal["sequence", "prefix"]


@register_router
@final
class SMEARRouter(Router):
    """Soft merging of experts with adaptive routing: a sequence is computed by the weighted mean of all experts.

    `weights = softmax(norm(mean_t x) norm(W)^T + b)` with a layer norm on each side, W's with a gain of 0.01 at first;
    then one expert, whose parameters are the weighted mean of the experts' (Muqeeth et al. 2023, section 3). Fully
    differentiable; as much is computed as by one expert, plus the merging: `E * parameters of an expert` for each
    sequence.

    With `scope="prefix"`, for decoders, each segment of `stride` tokens has an expert of its own, merged by the mean of
    the tokens up to the segment's first. `stride=1` merges one for each token, which costs as much as computing all
    experts.

    Args:
        spec: sizes of the layer the router sits in.
        scope: `sequence`, or `prefix` for decoders.
        stride: tokens of a segment; in the scope of a prefix.
        expert_dropout: probability of leaving an expert out of a merging in training; the others' weights are raised.
            Where all are left out, all count the same.

    Raises:
        ValueError: an argument out of range.
    """

    paper = "Muqeeth et al. 2023, arXiv:2306.03745"
    requires = frozenset({"sequence_ids"})
    tokenwise = False
    normalized = True
    compiles = False
    causal_form = "SMEARRouter with scope='prefix'"

    def __init__(
        self, spec: LayerSpec, *, scope: SMEARScope = "sequence", stride: int = 1, expert_dropout: float = 0.0
    ) -> None:
        if scope not in get_args(SMEARScope):
            raise ValueError(f"scope must be sequence or prefix, got {scope!r}")
        if stride < 1:
            raise ValueError(f"stride must be at least 1, got {stride}")
        if not 0 <= expert_dropout < 1:
            raise ValueError(f"expert_dropout must be at least 0 and below 1, got {expert_dropout}")
        super().__init__(spec, top_k=1, max_top_k=1)
        self.scope: SMEARScope = scope
        self.stride, self.expert_dropout = stride, expert_dropout
        self.causal = scope == "prefix"
        # Before a layer norm, whose epsilon of 1e-5 takes 5 % off logits at this scale, as in the authors' code.
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * 0.01)
        self.bias = nn.Parameter(torch.zeros(spec.num_experts))
        self.input_norm = nn.LayerNorm(spec.d_model)
        self.weight_norm = nn.LayerNorm(spec.d_model)
        nn.init.constant_(self.weight_norm.weight, 0.01)

    @torch.no_grad()
    def scale_initial_logits(self, factor: float) -> None:
        """Multiply the gain of the weights' norm."""
        self.weight_norm.weight.mul_(factor)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Weight the experts for each group of tokens."""
        sequences = group_by_sequence(len(x_TD), context.sequence_ids, context.padding_mask, x_TD.device)
        x_BSD = sequences.to_padded(at_least_float32(x_TD))
        if self.scope == "sequence":
            mean_BCD = x_BSD.sum(1, keepdim=True) / sequences.lengths_G.clamp_min(1).view(-1, 1, 1)
            segment_BS = torch.zeros_like(sequences.token_GS)
        else:
            counts_S = torch.arange(1, x_BSD.shape[1] + 1, device=x_TD.device)
            mean_BCD = (x_BSD.cumsum(1) / counts_S.unsqueeze(1))[:, :: self.stride]
            segment_BS = ((counts_S - 1) // self.stride).expand_as(sequences.token_GS)
        group_BS = segment_BS + torch.arange(len(segment_BS), device=x_TD.device).unsqueeze(1) * mean_BCD.shape[1]
        logits_GE = F.linear(self.input_norm(mean_BCD.flatten(0, 1)), self.weight_norm(self.weight), self.bias)
        merge_GE = logits_GE.softmax(-1)
        if self.expert_dropout and self.training:
            kept_GE = torch.rand_like(merge_GE) >= self.expert_dropout
            none_G1 = ~kept_GE.any(dim=1, keepdim=True)
            kept_GE = torch.where(none_G1, 0 * merge_GE + 1 / self.spec.num_experts, merge_GE * kept_GE)
            merge_GE = kept_GE / kept_GE.sum(1, keepdim=True)
        group_T = sequences.to_flat(group_BS, len(x_TD), fill=-1)
        # Padding has no group; its logits say nothing.
        logits_TE = logits_GE.new_zeros(len(x_TD), self.spec.num_experts)
        real_R, of_R = sequences.token_R, group_BS.flatten().index_select(0, sequences.place_R)
        logits_TE = logits_TE.index_copy(0, real_R, logits_GE.index_select(0, of_R))
        return Routing(merge_GE=merge_GE, group_T=group_T, logits_TE=logits_TE)
