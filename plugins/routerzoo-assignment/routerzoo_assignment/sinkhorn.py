"""Entropic optimal transport between tokens and experts, in the log domain."""
# Shape suffixes: G groups of tokens, S tokens of a group, E experts.

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def log_sinkhorn(
    scores_GSE: Tensor, real_GS: Tensor, *, epsilon: float = 1.0, iterations: int = 20, tolerance: float = 0.0
) -> Tensor:
    """Return the logarithm of the transport plan that gives each token one unit and each expert as much as the others.

    `argmax <P, scores> + epsilon H(P)`, rows summing to 1 and columns to `n / E`, for the n tokens of each group
    (Cuturi 2013; Clark et al. 2022, https://arxiv.org/abs/2202.01169, section 3.2). In the log domain, where a
    logit of 100 does not overflow. Rows are normalised last, so that they hold exactly.

    Args:
        scores_GSE: what is to be large where tokens go.
        real_GS: False where there is no token; such rows of the plan are 0.
        epsilon: weight of the entropy; the smaller, the nearer the plan is to an assignment, and the slower.
        iterations: at most so many.
        tolerance: stop when no potential moves by more than that; 0 for all iterations, without reading anything back
            from the device.
    """
    num_experts = scores_GSE.shape[-1]
    kernel_GSE = (scores_GSE / epsilon).masked_fill(~real_GS.unsqueeze(-1), -torch.inf)
    target_G1 = real_GS.sum(1, keepdim=True).to(scores_GSE.dtype).clamp_min(1).log() - math.log(num_experts)
    token_GS1 = scores_GSE.new_zeros(*real_GS.shape, 1)
    expert_GE = scores_GSE.new_zeros(len(real_GS), num_experts)
    for _ in range(iterations):
        moved_GE = target_G1 - (kernel_GSE + token_GS1).logsumexp(1)
        moved_GE = moved_GE.masked_fill(~moved_GE.isfinite(), 0.0)  # a group without tokens
        change = (moved_GE - expert_GE).abs().max() if tolerance and moved_GE.numel() else None
        expert_GE = moved_GE
        token_GS1 = -(kernel_GSE + expert_GE.unsqueeze(1)).logsumexp(2, keepdim=True)
        token_GS1 = token_GS1.masked_fill(~real_GS.unsqueeze(-1), 0.0)
        if change is not None and change < tolerance:
            break
    return kernel_GSE + token_GS1 + expert_GE.unsqueeze(1)
