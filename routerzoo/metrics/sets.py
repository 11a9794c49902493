"""The experts of each token as a set, and checks of expert ids."""
# Shape suffixes: T tokens, E experts.

from __future__ import annotations

import torch
from torch import Tensor

from routerzoo.routing import Routing


def check_num_experts(routing: Routing, num_experts: int) -> None:
    """Check that a routing is over `num_experts` experts.

    The width of its scores is always checked; expert ids only on a CPU, since reading them elsewhere waits for the
    device.

    Raises:
        ValueError: it is over another number of experts.
    """
    for scores, dim in ((routing.logits_TE, 1), (routing.merge_GE, 1), (routing.dispatch_GSEP, 2)):
        if scores is not None and scores.shape[dim] != num_experts:
            raise ValueError(
                f"the routing is over {scores.shape[dim]} experts, the metric over num_experts = {num_experts}: build "
                "the metric with the layer's num_experts"
            )
    ids = routing.experts_TK if routing.experts_TK is not None else routing.expert_N
    if ids is not None and ids.device.type == "cpu" and ids.numel():
        low, high = (int(bound) for bound in ids.aminmax())
        if low < -1 or high >= num_experts:
            raise ValueError(
                f"expert ids must be below num_experts = {num_experts}, or -1 for none; got {low if low < -1 else high}"
            )


def expert_sets(routing: Routing, num_experts: int) -> Tensor:
    """Return which experts each token is assigned to, bool `[T, E]`; none for padding.

    Raises:
        ValueError: a soft or merged routing, which has no set of experts for a token, or one over another number of
            experts.
    """
    check_num_experts(routing, num_experts)
    if routing.dense:
        raise ValueError("this routing mixes tokens, or experts; it has no set of experts for a token")
    pairs = routing.assignments()
    if routing.experts_TK is not None:
        num_tokens = len(routing.experts_TK)
    elif routing.logits_TE is not None:
        num_tokens = len(routing.logits_TE)
    else:
        num_tokens = int(pairs.token_N.max()) + 1 if len(pairs.token_N) else 0
    bins = pairs.token_N * (num_experts + 1) + pairs.expert_N.remainder(num_experts + 1)
    chosen = torch.zeros(num_tokens * (num_experts + 1), dtype=torch.bool, device=bins.device)
    return chosen.index_fill(0, bins, True).view(num_tokens, num_experts + 1)[:, :num_experts]
