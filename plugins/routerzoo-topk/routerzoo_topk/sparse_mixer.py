"""SparseMixerRouter: experts are sampled, with a gradient of the choice (Liu et al. 2024, arXiv:2409.12136)."""
# Shape suffixes: T tokens, D model width, E experts, K choices per token.

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from routerzoo import LayerSpec, LogitRouter, Routing, RoutingContext, register_router
from routerzoo.functional import gate_linear


@register_router
@final
class SparseMixerRouter(LogitRouter):
    """Linear gate that chooses expert after expert, each by a softmax of its own (SparseMixer-v2, of GRIN and Phi-MoE).

    For each choice, experts chosen before are ruled out, and so are those whose logit z falls behind the largest one by
    more than `2 * threshold * max(|z|, largest)`. The softmax over the rest is the distribution that training samples
    from; evaluation takes the largest. The weight is the chosen expert's probability, so that weights of one token sum
    to more than 1. In training Heun's third-order method estimates the gradient of the choice: an expert that is not
    the most probable one counts a third with probability 3/4, with the gradient of its whole weight.

    As transformers 5.24 has it (`PhimoeTopKRouter`), for any k; its constants 0.3333 and 0.6667 are thirds here, and
    jitter on the hidden states is left to the model.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: experts per token; 2 as published.
        threshold: how far behind a logit may fall.
        init_std: standard deviation of the gate's initial weights.
    """

    paper = "Liu et al. 2024, arXiv:2409.12136; Abdin et al. 2024, arXiv:2404.14219"
    normalized = False
    trains_at_top_1 = True
    checked_with: ClassVar[Mapping[str, Any]] = {"threshold": 1.0}  # else a random gate leaves one expert

    def __init__(self, spec: LayerSpec, *, top_k: int = 2, threshold: float = 0.01, init_std: float = 0.02) -> None:
        super().__init__(spec, top_k=top_k)
        self.threshold = threshold
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * init_std)

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return `x W^T`."""
        return gate_linear(x_TD, self.weight)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Sample in training; take the most probable experts in evaluation."""
        logits_TE = self.logits(x_TD, context)
        if not self.training:
            experts_TK = self.select_experts(logits_TE)
            weights_TK = self.combine_weights(logits_TE, experts_TK, may_drop=False)
            return Routing(experts_TK, weights_TK, logits_TE, may_drop=False)
        left_TE, experts, weights = logits_TE, [], []
        for _ in range(self.top_k):
            probs_TE = self._probs(logits_TE, left_TE)
            chosen_T1 = (probs_TE.detach() / torch.empty_like(probs_TE).exponential_()).argmax(-1, keepdim=True)
            weight_T1 = probs_TE.gather(1, chosen_T1)
            whole_T1 = (chosen_T1 == probs_TE.argmax(-1, keepdim=True)) | (torch.rand_like(weight_T1) > 0.75)
            # A third of the weight, with the whole weight's gradient.
            weights.append(weight_T1 - (weight_T1 * (~whole_T1 * (2 / 3))).detach())
            experts.append(chosen_T1)
            left_TE = left_TE.scatter(1, chosen_T1, -torch.inf)
        return Routing(torch.cat(experts, -1), torch.cat(weights, -1), logits_TE, may_drop=False)

    def combine_weights(self, logits_TE: Tensor, experts_TK: Tensor, *, may_drop: bool = True) -> Tensor:
        """Return the probability of each expert among those that were not chosen before it."""
        left_TE, weights = logits_TE, []
        for expert_T1 in experts_TK.T.unsqueeze(-1):
            chosen_T1 = expert_T1.clamp_min(0) if may_drop else expert_T1
            weight_T1 = self._probs(logits_TE, left_TE).gather(1, chosen_T1)
            ruled_out_TE = left_TE.scatter(1, chosen_T1, -torch.inf)
            if may_drop:
                weight_T1 = weight_T1.masked_fill(expert_T1 < 0, 0.0)
                ruled_out_TE = torch.where(expert_T1 < 0, left_TE, ruled_out_TE)
            weights.append(weight_T1)
            left_TE = ruled_out_TE
        return torch.cat(weights, -1)

    def _probs(self, logits_TE: Tensor, left_TE: Tensor) -> Tensor:
        """Return the softmax over the experts that are left and not far behind; 0 for all where none is left."""
        largest_T1 = left_TE.detach().amax(-1, keepdim=True)
        scale_TE = torch.maximum(logits_TE.detach().abs(), largest_T1)
        behind_TE = (largest_T1 - logits_TE.detach()) / scale_TE > 2 * self.threshold
        left_TE = left_TE.masked_fill(behind_TE, -torch.inf)
        exp_TE = (left_TE - largest_T1.clamp_min(torch.finfo(left_TE.dtype).min)).exp()
        return exp_TE / exp_TE.sum(-1, keepdim=True).clamp_min(torch.finfo(left_TE.dtype).tiny)
