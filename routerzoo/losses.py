"""Auxiliary losses of routing: one normalisation of each, in one place.

Each is a raw scalar, a mean over tokens. The task multiplies it with its coefficient.
"""
# Shape suffixes: T tokens, K choices per token, E experts, G sequences.

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from routerzoo.routing import Routing, RoutingContext


def balance_loss(
    probs_TE: Tensor, experts_TK: Tensor, *, padding_mask: Tensor | None = None, sequence_ids: Tensor | None = None
) -> Tensor:
    """Return Switch's load-balancing loss, `E * sum_e f_e * P_e` (Fedus et al. 2022, equations 4 to 6).

    `f_e` is the share of all assignments that expert e gets (choices of -1 aside), so that the value is 1 at perfect
    balance and E at collapse, whatever k is. (Implementations that divide by tokens instead have a minimum of k.)
    `P_e` is the mean probability of expert e. The gradient flows through `P_e` alone.

    Args:
        probs_TE: scores of each token; each row is normalised to sum to 1 here, as sigmoid scores need.
        experts_TK: chosen experts, -1 for none.
        padding_mask: [tokens] bool, True for tokens to leave out.
        sequence_ids: [tokens] int64 from 0. Where given, the loss is taken in each sequence and averaged over
            sequences, weighted by their length (DeepSeek-V3's sequence-wise balance loss); otherwise over all tokens.

    Returns:
        A scalar; 0 where there is no token.
    """
    num_tokens, num_experts = probs_TE.shape
    if num_tokens == 0:
        return probs_TE.sum()
    probs_TE = probs_TE / probs_TE.sum(-1, keepdim=True).clamp_min(torch.finfo(probs_TE.dtype).tiny)
    chosen_TE = probs_TE.new_zeros(num_tokens, num_experts + 1)
    chosen_TE = chosen_TE.scatter(1, experts_TK.remainder(num_experts + 1), 1.0)[:, :num_experts]
    if padding_mask is not None:
        keep_T1 = (~padding_mask).unsqueeze(1).to(probs_TE.dtype)
        probs_TE, chosen_TE = probs_TE * keep_T1, chosen_TE * keep_T1
        tokens_T = keep_T1.squeeze(1)
    else:
        tokens_T = probs_TE.new_ones(num_tokens)
    if sequence_ids is None:
        f_E = chosen_TE.sum(0) / chosen_TE.sum().clamp_min(1)
        return num_experts * (f_E * probs_TE.sum(0)).sum() / tokens_T.sum().clamp_min(1)
    # A sequence's id may be any number below the number of tokens; sequences without a token count nothing.
    groups_GE = probs_TE.new_zeros(num_tokens, num_experts)
    f_GE = groups_GE.index_add(0, sequence_ids, chosen_TE)
    f_GE = f_GE / f_GE.sum(1, keepdim=True).clamp_min(1)
    probs_GE = groups_GE.index_add(0, sequence_ids, probs_TE)
    return num_experts * (f_GE * probs_GE).sum() / tokens_T.sum().clamp_min(1)


def z_loss(logits_TE: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
    """Return the mean of squared log-partition values, `logsumexp(logits)^2` (Zoph et al. 2022, equation 5)."""
    return _masked_mean(torch.logsumexp(logits_TE, dim=-1).square(), padding_mask)


def stablemoe_balance_loss(gates_T: Tensor, experts_T: Tensor, num_experts: int) -> Tensor:
    """Return StableMoE's balance loss (Dai et al. 2022, equation 8) as a mean over tokens, without its factor alpha.

    `sum_i (|A_i| - n) / n * sum_{t in A_i} sigmoid(s_ti)`, where `A_i` are the tokens of expert i and `n = T / E`. The
    paper and its code sum over tokens, as they do for the language-modelling loss; here both are means.

    Args:
        gates_T: sigmoid of each token's score for its expert.
        experts_T: the expert of each token; -1 leaves a token out.
        num_experts: number of experts.
    """
    if gates_T.numel() == 0:
        return gates_T.sum()
    bins = experts_T.remainder(num_experts + 1)
    counts_E = gates_T.new_zeros(num_experts + 1).index_add(0, bins, torch.ones_like(gates_T))[:num_experts]
    gates_E = gates_T.new_zeros(num_experts + 1).index_add(0, bins, gates_T)[:num_experts]
    total = counts_E.sum().clamp_min(1)
    mean = total / num_experts
    return ((counts_E - mean) / mean * gates_E).sum() / total


def distillation_loss(student_TE: Tensor, teacher_T: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
    """Return the mean cross-entropy of a student router's logits with a teacher's choices (Dai et al. 2022, eq. 11)."""
    return _masked_mean(F.cross_entropy(student_TE, teacher_T, reduction="none"), padding_mask)


def _masked_mean(values_T: Tensor, padding_mask: Tensor | None) -> Tensor:
    if padding_mask is None:
        return values_T.sum() / max(values_T.numel(), 1)
    return values_T.masked_fill(padding_mask, 0.0).sum() / (~padding_mask).sum().clamp_min(1)


def _balance_of(routing: Routing, context: RoutingContext) -> Tensor | None:
    if routing.logits_TE is None or routing.experts_TK is None:
        return None
    return balance_loss(routing.logits_TE.softmax(-1), routing.experts_TK, padding_mask=context.padding_mask)


def _z_of(routing: Routing, context: RoutingContext) -> Tensor | None:
    return None if routing.logits_TE is None else z_loss(routing.logits_TE, padding_mask=context.padding_mask)


GENERIC_LOSSES: dict[str, Callable[[Routing, RoutingContext], Tensor | None]] = {"balance": _balance_of, "z": _z_of}
"""Losses that can be had of any router with logits, by the name that a task's `loss_weights` uses."""


def auxiliary_loss(name: str, routing: Routing, context: RoutingContext) -> Tensor:
    """Return a routing's raw loss of that name: the router's own where it has one, else the generic one.

    Raises:
        ValueError: neither the router nor the generic losses have it.
    """
    if name in routing.losses:
        return routing.losses[name]
    loss = GENERIC_LOSSES[name](routing, context) if name in GENERIC_LOSSES else None
    if loss is None:
        known = sorted({*routing.losses, *(GENERIC_LOSSES if routing.logits_TE is not None else ())})
        raise ValueError(f"this router has no loss {name!r}; it has {', '.join(known) or 'none'}")
    return loss
