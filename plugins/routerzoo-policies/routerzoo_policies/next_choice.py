"""Overflow to the next best expert with room (Fedus et al. 2021, https://arxiv.org/abs/2101.03961, appendix B)."""
# Shape suffixes: T tokens, E experts, K choices per token, N assignments, G groups of tokens (sequences),
# S tokens of a group.

from __future__ import annotations

import torch
from torch import Tensor

from routerzoo import Router, Routing
from routerzoo_policies.service import Groups, Order, finds_room, service_order


def next_choices(router: Router, routing: Routing, groups: Groups, order: Order) -> tuple[Tensor, Tensor]:
    """Return experts and weights where choices that find no room fall on the next best experts that have any.

    Args:
        router: selects experts, and weights them.
        routing: what it selected.
        groups: who shares a capacity.
        order: who is served first.

    Raises:
        NotImplementedError: a router that does not select by logits.
    """
    if routing.logits_TE is None or routing.experts_TK is None:
        raise NotImplementedError(f"{type(router).__name__} has no next choice: it does not select by logits")
    if order == "token":
        experts_TK = served_in_turn(router, routing.logits_TE, groups)
    else:
        order_N = service_order(routing, order)
        experts_TK = served_in_rounds(router, routing.logits_TE, routing.experts_TK, groups, order_N)
    return experts_TK, router.combine_weights(routing.logits_TE, experts_TK)


@torch.no_grad()
def served_in_turn(router: Router, logits_TE: Tensor, groups: Groups) -> Tensor:
    """Serve one token of every group at a time: each selects among the experts that have room left.

    Args:
        router: selects experts.
        logits_TE: its logits.
        groups: who shares a capacity.

    Returns:
        Experts `[T, K]`, -1 for none.
    """
    sequences, (num_tokens, num_experts) = groups.sequences, logits_TE.shape
    logits_GSE = sequences.to_padded(logits_TE)
    room_GE = groups.capacity_G.unsqueeze(1).expand(-1, num_experts).clone()
    selected = []
    for place in range(sequences.real_GS.shape[1]):
        open_GE = logits_GSE[:, place].masked_fill(room_GE <= 0, -torch.inf)
        experts_GK = _without_closed(router.select_experts(open_GE), open_GE)
        experts_GK = experts_GK.masked_fill(~sequences.real_GS[:, place].unsqueeze(1), -1)
        room_GE.scatter_add_(1, experts_GK.clamp_min(0), -(experts_GK >= 0).long())
        selected.append(experts_GK)
    if not selected:
        return sequences.token_R.new_full((num_tokens, router.top_k), -1)
    return sequences.to_flat(torch.stack(selected, dim=1), num_tokens, fill=-1)


@torch.no_grad()
def served_in_rounds(router: Router, logits_TE: Tensor, experts_TK: Tensor, groups: Groups, order_N: Tensor) -> Tensor:
    """Serve all choices; then the next choices of those that found no room, until there are none.

    Args:
        router: selects experts.
        logits_TE: its logits.
        experts_TK: the experts that it selected.
        groups: who shares a capacity.
        order_N: the choices in the order in which each round serves them.

    Returns:
        Experts `[T, K]`, -1 for none.
    """
    (num_tokens, num_experts), top_k = logits_TE.shape, experts_TK.shape[1]
    token_N = torch.arange(num_tokens, device=experts_TK.device).repeat_interleave(top_k)
    real_T1 = (groups.group_T >= 0).unsqueeze(1)
    room = groups.room(num_experts)
    settled_TK, proposed_TK = torch.full_like(experts_TK, -1), experts_TK.masked_fill(~real_T1, -1)
    tried_TE = torch.zeros_like(logits_TE, dtype=torch.bool)
    for _ in range(num_experts):
        wants_TK = proposed_TK >= 0
        if not wants_TK.any():
            break
        bin_N = groups.bins(proposed_TK.flatten(), token_N, num_experts)
        found_N = finds_room(bin_N, order_N, room)
        settled_TK = torch.where(found_N.view_as(settled_TK), proposed_TK, settled_TK)
        room = room - torch.bincount(bin_N[found_N], minlength=len(room))
        tried_TE = tried_TE.scatter_add(1, proposed_TK.clamp_min(0), wants_TK)
        open_TE = logits_TE.masked_fill(tried_TE, -torch.inf)
        best_TK = _without_closed(router.select_experts(open_TE), open_TE)
        # The n-th lost choice of a token proposes to its n-th best expert.
        lost_TK = (settled_TK < 0) & real_T1 & (experts_TK >= 0)
        nth_TK = (lost_TK.cumsum(1) - 1).clamp(0, top_k - 1)
        proposed_TK = torch.where(lost_TK, best_TK.gather(1, nth_TK), -1)
    return settled_TK


def _without_closed(experts_TK: Tensor, open_TE: Tensor) -> Tensor:
    """Leave out experts that are ruled out: a router may select them where there are too few others."""
    return experts_TK.masked_fill(open_TE.gather(1, experts_TK.clamp_min(0)) == -torch.inf, -1)
