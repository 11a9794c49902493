"""A routing from a mask over experts."""
# Shape suffixes: T tokens, E experts, K choices per token, N assignments.

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from routerzoo import Routing


def routing_of(
    chosen_TE: Tensor,
    weights_TE: Tensor,
    logits_TE: Tensor,
    losses: Mapping[str, Tensor],
    balance_probs_TE: Tensor | None = None,
) -> Routing:
    """Return the routing that sends each token to the experts of a mask, as many as they are.

    Counting them waits for the device, so that no more is computed than was chosen. A token whose weights are no
    numbers is sent to expert 0, so that the fault shows.
    """
    broken_T1 = weights_TE.isnan().any(dim=1, keepdim=True)
    first_E = torch.arange(chosen_TE.shape[1], device=chosen_TE.device) == 0
    chosen_TE = torch.where(broken_T1, first_E, chosen_TE)
    token_N, expert_N = chosen_TE.nonzero().unbind(1)
    return Routing(
        token_N=token_N,
        expert_N=expert_N,
        weight_N=weights_TE[token_N, expert_N],
        logits_TE=logits_TE,
        losses=losses,
        balance_probs_TE=balance_probs_TE,
        may_drop=False,
    )


def choices(chosen_TE: Tensor) -> Tensor:
    """Return a mask as `[T, E]` choices, -1 where an expert is not chosen, as balance losses take them."""
    experts_E = torch.arange(chosen_TE.shape[1], device=chosen_TE.device)
    return torch.where(chosen_TE, experts_E, -1)
