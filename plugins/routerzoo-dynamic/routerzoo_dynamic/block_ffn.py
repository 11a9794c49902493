"""BlockFFNRouter: a ReLU gate with losses for sparse chunks (Song et al. 2025, https://arxiv.org/abs/2507.08771)."""
# Shape suffixes: T tokens, D model width, E experts, G sequences, S tokens of a sequence, C chunks,
# M tokens of a chunk.

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routerzoo import LayerSpec, LossWeight, RoutingContext, register_router
from routerzoo.functional import gate_linear
from routerzoo.functional.ragged import Sequences, group_by_sequence
from routerzoo_dynamic.mask import MaskRouter

_SHARPNESS = 100.0  # of the sigmoid that stands in for "is active", the paper's


@register_router
@final
class BlockFFNRouter(MaskRouter):
    """Experts whose logit is positive, weighted by the ReLU over its root mean square, times a learned scale.

    `a = relu(x W^T)`, `weight_e = gamma_e a_e / rms(a)` (Song et al. 2025, https://arxiv.org/abs/2507.08771). How many
    experts a token has is learned; it may have none. The paper's experts are two plain maps with SiLU between:
    `MLPExperts(activation="silu", bias=False)`, small and many.

    Two losses make tokens that follow each other share experts; the authors' code averages both over layers.
    `locality`: the binary cross-entropy between `sigmoid(100 logit)` of each token and of the one before (the paper's
    coefficient 1e-3 to 2e-3). `chunk`: the mean probability that a chunk of tokens needs an expert,
    `1 - prod_t (1 - a_te / sum a_t)` (5e-2; the paper adapts it over training, which is left to a schedule).

    Args:
        spec: sizes of the layer the router sits in.
        chunk_length: tokens of a chunk.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: a chunk without tokens.
    """

    paper = "Song et al. 2025, arXiv:2507.08771"
    requires = frozenset({"sequence_ids"})
    default_loss_weights: Mapping[str, float | LossWeight] = {
        "locality": LossWeight(1e-3, "mean"),
        "chunk": LossWeight(5e-2, "mean"),
    }
    nonnegative = False  # gamma is learned

    def __init__(self, spec: LayerSpec, *, chunk_length: int = 64, init_std: float = 0.02) -> None:
        if chunk_length < 1:
            raise ValueError(f"chunk_length must be at least 1, got {chunk_length}")
        super().__init__(spec)
        self.chunk_length = chunk_length
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * init_std)
        self.gamma = nn.Parameter(torch.ones(spec.num_experts))

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return `x W^T`."""
        return gate_linear(x_TD, self.weight)

    def mask(self, logits_TE: Tensor) -> Tensor:
        """Select the experts with a positive logit."""
        return logits_TE > 0

    def scores(self, logits_TE: Tensor) -> Tensor:
        """Return `gamma relu(logits) / rms(relu(logits))`."""
        return self.gamma * F.rms_norm(logits_TE.relu(), logits_TE.shape[-1:], eps=1e-6)

    def balance_probs(self, logits_TE: Tensor) -> Tensor:
        """Return each expert's share of the ReLU."""
        active_TE = logits_TE.relu()
        return active_TE / active_TE.sum(-1, keepdim=True).clamp_min(1e-20)

    def own_losses(self, x_TD: Tensor, logits_TE: Tensor, context: RoutingContext) -> Mapping[str, Tensor]:
        """Return both losses."""
        sequences = group_by_sequence(len(x_TD), context.sequence_ids, context.padding_mask, x_TD.device)
        chunk = chunk_loss(self.balance_probs(logits_TE), sequences, self.chunk_length)
        return {"locality": locality_loss(logits_TE, sequences), "chunk": chunk}


def locality_loss(logits_TE: Tensor, sequences: Sequences) -> Tensor:
    """Return the mean cross-entropy between what is active at a token and at the one before; 0 without such pairs."""
    sharp_GSE = sequences.to_padded(logits_TE) * _SHARPNESS
    if sharp_GSE.shape[1] < 2:
        return logits_TE.sum() * 0.0
    pair_GS1 = sequences.real_GS[:, 1:].unsqueeze(-1)
    cross_GSE = F.binary_cross_entropy_with_logits(sharp_GSE[:, :-1], sharp_GSE[:, 1:].sigmoid(), reduction="none")
    return (cross_GSE * pair_GS1).sum() / (pair_GS1.sum() * logits_TE.shape[1]).clamp_min(1)


def chunk_loss(share_TE: Tensor, sequences: Sequences, chunk_length: int) -> Tensor:
    """Return the mean over chunks and experts of the probability that a token of the chunk needs the expert."""
    share_GSE = sequences.to_padded(share_TE)
    if share_GSE.numel() == 0:
        return share_TE.sum() * 0.0
    share_GSE = F.pad(share_GSE, (0, 0, 0, -share_GSE.shape[1] % chunk_length))
    groups, length, num_experts = share_GSE.shape
    absent_GCME = (1 - share_GSE).view(groups, length // chunk_length, chunk_length, num_experts)
    begins_GC = sequences.real_GS[:, ::chunk_length].to(share_TE.dtype)  # chunks that hold a token
    needed_GC = (1 - absent_GCME.prod(2)).mean(-1)
    return (needed_GC * begins_GC).sum() / begins_GC.sum().clamp_min(1)
