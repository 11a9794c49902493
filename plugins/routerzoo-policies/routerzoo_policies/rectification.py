"""Rectify-Router (Zeng et al. 2024, https://arxiv.org/abs/2402.12399): overflow to local experts, and free slots.

Inspired by the paper, of which we know equations and prose second-hand.
"""
# Shape suffixes: T tokens, E experts, K choices per token, G groups of tokens (sequences).

from __future__ import annotations

import torch
from torch import Tensor

from routerzoo import Routing
from routerzoo_policies.service import Groups, finds_room


def rectified(
    routing: Routing, kept_TK: Tensor, groups: Groups, *, local: bool, fill: bool, devices: int
) -> tuple[Tensor, Tensor]:
    """Return experts and weights where lost choices go to a local expert, and free slots to next choices.

    Args:
        routing: what the router selected, with logits.
        kept_TK: those of its choices that had room.
        groups: who shares a capacity.
        local: send a token that lost m choices to the best expert of its own device, beyond that one's capacity, which
            counts m times in the softmax ("intra-GPU rectification").
        fill: give free slots to the largest next choices; the softmax's denominator then counts as a constant in the
            gradient ("fill-in rectification").
        devices: devices that experts, and tokens by their place in the batch, are split over evenly.
    """
    logits_TE, selected_TK = routing.logits_TE, routing.experts_TK
    assert logits_TE is not None
    assert selected_TK is not None
    columns, counts = [kept_TK], [torch.ones_like(kept_TK)]
    if local:
        lost_T = ((kept_TK < 0) & (selected_TK >= 0)).sum(1).masked_fill(groups.group_T < 0, 0)
        columns.append(local_experts(logits_TE, lost_T, devices).unsqueeze(1))
        counts.append(lost_T.unsqueeze(1))
    if fill:
        columns.append(fill_ins(logits_TE, selected_TK, kept_TK, groups).unsqueeze(1))
        counts.append(torch.ones_like(columns[-1]))
    return weighted_by_counts(logits_TE, torch.cat(columns, 1), torch.cat(counts, 1), constant_total=fill)


def local_experts(logits_TE: Tensor, lost_T: Tensor, devices: int) -> Tensor:
    """Return the best expert of the token's own device where it lost choices, -1 elsewhere: `[T]`."""
    num_tokens, num_experts = logits_TE.shape
    device_T = torch.arange(num_tokens, device=logits_TE.device) * devices // max(num_tokens, 1)
    device_E = torch.arange(num_experts, device=logits_TE.device) // (num_experts // devices)
    local_TE = device_E == device_T.unsqueeze(1)
    return logits_TE.detach().masked_fill(~local_TE, -torch.inf).argmax(1).masked_fill(lost_T == 0, -1)


@torch.no_grad()
def fill_ins(logits_TE: Tensor, selected_TK: Tensor, kept_TK: Tensor, groups: Groups) -> Tensor:
    """Return the expert whose free slot each token gets, -1 for none: `[T]`.

    Args:
        logits_TE: logits.
        selected_TK: the experts that the router selected; a token's next choice is the best of the others.
        kept_TK: those that had room.
        groups: who shares a capacity.
    """
    num_tokens, num_experts = logits_TE.shape
    selected_TE = torch.zeros_like(logits_TE).scatter_add(
        1, selected_TK.clamp_min(0), (selected_TK >= 0).to(logits_TE.dtype)
    )
    score_T, next_T = logits_TE.masked_fill(selected_TE > 0, -torch.inf).max(1)
    tokens_T = torch.arange(num_tokens, device=logits_TE.device)
    taken = groups.bins(kept_TK.flatten(), tokens_T.repeat_interleave(kept_TK.shape[1]), num_experts)
    room = groups.room(num_experts)
    free = room - torch.bincount(taken[taken >= 0], minlength=len(room))
    bin_T = groups.bins(next_T.masked_fill(score_T == -torch.inf, -1), tokens_T, num_experts)
    fits_T = finds_room(bin_T, score_T.sort(descending=True, stable=True).indices, free)
    return torch.where(fits_T, next_T, -1)


def weighted_by_counts(
    logits_TE: Tensor, experts_TK: Tensor, count_TK: Tensor, *, constant_total: bool
) -> tuple[Tensor, Tensor]:
    """Weight by the softmax over the experts of a token, each as often as it counts; an expert may occur twice."""
    count_TK = count_TK.to(logits_TE.dtype).masked_fill(experts_TK < 0, 0.0)
    count_TE = torch.zeros_like(logits_TE).scatter_add(1, experts_TK.clamp_min(0), count_TK)
    twice_TK = (experts_TK.unsqueeze(2) == experts_TK.unsqueeze(1)).tril(-1).any(2)
    experts_TK = experts_TK.masked_fill(twice_TK, -1)
    none_TK = experts_TK < 0
    lowest = torch.finfo(logits_TE.dtype).min
    logits_TK = logits_TE.gather(1, experts_TK.clamp_min(0)).masked_fill(none_TK, lowest)
    share_TK = (logits_TK - logits_TK.amax(1, keepdim=True).detach()).exp()
    share_TK = share_TK * count_TE.gather(1, experts_TK.clamp_min(0)).masked_fill(none_TK, 0.0)
    total_T1 = share_TK.sum(1, keepdim=True)
    total_T1 = total_T1.detach() if constant_total else total_T1
    return experts_TK, torch.where(none_TK, 0.0, share_TK / total_T1.masked_fill(total_T1 == 0, 1.0))
