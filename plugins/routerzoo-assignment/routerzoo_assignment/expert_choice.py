"""ExpertChoiceRouter: experts select tokens (Zhou et al., NeurIPS 2022, https://arxiv.org/abs/2202.09368)."""
# Shape suffixes: T tokens, D model width, E experts, G sequences, S tokens of a sequence,
# C tokens of an expert in a sequence.

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from routerzoo import LayerSpec, LogitRouter, Routing, RoutingContext, register_router
from routerzoo.functional import gate_linear
from routerzoo.functional.ragged import group_by_sequence


@register_router
@final
class ExpertChoiceRouter(LogitRouter):
    """In each sequence, every expert takes its `top_k * S / E` best tokens (rounded up), by the softmax over experts.

    Loads are equal by construction, without a loss; a token may have no expert, or many. `top_k` is the mean number of
    experts per token, the paper's capacity factor. The weight is the softmax's value.

    V-MoE's library adds normal noise of standard deviation 1 / E to the logits in training, which Liu et al. 2024
    (https://arxiv.org/abs/2401.15969) and Soft MoE's comparisons use: `noise=1`. The paper has none, the default. It
    changes 13 % of the selected pairs at initialization (D = 256, E = 16, 196 tokens), 3 % once logits are 5 times as
    large.

    An expert's choice among the tokens of a sequence looks at later tokens, so this is not for decoders;
    `ExpertThresholdRouter` is. Experts select within a sequence or image, never across a batch, where one user's tokens
    would push out another's.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: mean number of experts per token.
        noise: in training, standard deviation of the logits' noise times E.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: negative noise.
    """

    paper = "Zhou et al., NeurIPS 2022, arXiv:2202.09368"
    requires = frozenset({"sequence_ids"})
    renormalize = False
    causal = False
    causal_form = "ExpertThresholdRouter"
    tokenwise = False
    compiles = False

    def __init__(self, spec: LayerSpec, *, top_k: int = 2, noise: float = 0.0, init_std: float = 0.02) -> None:
        if noise < 0:
            raise ValueError(f"noise must be at least 0, got {noise}")
        super().__init__(spec, top_k=top_k)
        self.noise = noise
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * init_std)

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return `x W^T`."""
        return gate_linear(x_TD, self.weight)

    def noise_std(self, x_TD: Tensor) -> float | None:
        """Return `noise / E`."""
        return self.noise / self.spec.num_experts or None

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Let each expert take its tokens."""
        num_experts = self.spec.num_experts
        logits_TE, clean_TE, std = self.noisy_logits(x_TD, context)
        sequences = group_by_sequence(len(x_TD), context.sequence_ids, context.padding_mask, x_TD.device)
        probs_GSE = sequences.to_padded(logits_TE.softmax(-1), fill=-1.0)  # below all probabilities
        capacity_G = -(-sequences.lengths_G * self.top_k // num_experts)
        length = sequences.real_GS.shape[1]
        capacity = min(-(-length * self.top_k // num_experts), length)
        weight_GCE, selected_GCE = probs_GSE.topk(capacity, dim=1)
        token_GCE = sequences.token_GS.unsqueeze(-1).expand_as(probs_GSE).gather(1, selected_GCE)
        rank_C = torch.arange(capacity, device=x_TD.device)
        taken_GCE = (rank_C < capacity_G.unsqueeze(1)).unsqueeze(-1) & (token_GCE >= 0)
        expert_GCE = torch.arange(num_experts, device=x_TD.device).expand_as(token_GCE)
        return Routing(
            token_N=token_GCE.clamp_min(0).flatten(),
            expert_N=expert_GCE.where(taken_GCE, -1).flatten(),
            weight_N=weight_GCE.where(taken_GCE, 0.0).flatten(),
            logits_TE=logits_TE,
            clean_logits_TE=clean_TE,
            noise_std=std,
        )

    def select_experts(self, logits_TE: Tensor) -> Tensor:
        """Refuse: experts select tokens."""
        raise NotImplementedError("ExpertChoiceRouter's experts select tokens: no token has experts by itself")
