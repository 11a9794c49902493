"""Entropic optimal transport between tokens and experts, in the log domain."""
# Shape suffixes: T tokens, R real tokens (not padding), G groups of tokens, S tokens of a group, E experts.

from __future__ import annotations

import math

import torch
from torch import Tensor

from routerzoo import RoutingContext
from routerzoo.distributed.collectives import rows_of_all_ranks
from routerzoo.functional.losses import Scope
from routerzoo.functional.ragged import group_by_sequence


@torch.no_grad()
def transport_plan(
    scores_TE: Tensor,
    context: RoutingContext,
    *,
    scope: Scope,
    epsilon: float,
    iterations: int,
    tolerance: float = 0.0,
) -> Tensor:
    """Return the logarithm of the transport plan of a batch, or of each of its sequences; see `log_sinkhorn`.

    The plan of a batch is that of all processes that train together.

    Args:
        scores_TE: what is to be large where tokens go.
        context: the sequences, the padding and the processes.
        scope: what is balanced, the `batch` or each `sequence`.
        epsilon: weight of the entropy.
        iterations: at most so many.
        tolerance: stop when no potential moves by more than that.

    Returns:
        `[T, E]`; padding keeps its scores.
    """
    mask = context.padding_mask
    ids = context.sequence_ids if scope == "sequence" else None
    sequences = group_by_sequence(len(scores_TE), ids, mask, scores_TE.device)
    if scope == "batch":
        all_RE, own = rows_of_all_ranks(scores_TE[sequences.token_R], context.process_group)
        real_1R = torch.ones(1, len(all_RE), dtype=torch.bool, device=all_RE.device)
        plan_1RE = log_sinkhorn(
            all_RE.unsqueeze(0), real_1R, epsilon=epsilon, iterations=iterations, tolerance=tolerance
        )
        plan_TE = torch.zeros_like(scores_TE).index_copy(0, sequences.token_R, plan_1RE[0, own])
    else:
        plan_GSE = log_sinkhorn(
            sequences.to_padded(scores_TE),
            sequences.real_GS,
            epsilon=epsilon,
            iterations=iterations,
            tolerance=tolerance,
        )
        plan_TE = sequences.to_flat(plan_GSE, len(scores_TE))
    return plan_TE if mask is None else plan_TE.where(~mask.unsqueeze(1), scores_TE)


def check_transport(epsilon: float, iterations: int) -> None:
    """Check the options of a plan.

    Raises:
        ValueError: an entropy weight that is not positive, or no iterations.
    """
    if epsilon <= 0:
        raise ValueError(f"epsilon must be above 0, got {epsilon}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")


@torch.no_grad()
def log_sinkhorn(
    scores_GSE: Tensor, real_GS: Tensor, *, epsilon: float = 1.0, iterations: int = 20, tolerance: float = 0.0
) -> Tensor:
    """Return the logarithm of the transport plan that gives each token one unit and each expert as much as the others.

    `argmax <P, scores> + epsilon H(P)`, rows summing to 1 and columns to `n / E`, for the n tokens of each group
    (Cuturi 2013; Clark et al. 2022, https://arxiv.org/abs/2202.01169, section 3.2). In the log domain, where a
    logit of 100 does not overflow. Rows are normalized last, so that they hold exactly.

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
