"""Which experts each token was sent to, as sets: the order of the choices does not matter to any metric."""
# Shape suffixes: T tokens, E experts, N assignments.

from __future__ import annotations

import torch
from torch import Tensor

from routerzoo.routing import Routing


def expert_sets(routing: Routing, num_experts: int) -> Tensor:
    """Return for each token which experts it was assigned to, bool `[T, E]`; none for padding.

    Raises:
        ValueError: a routing that mixes has no sets.
    """
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
