"""Auxiliary losses of routing: one normalization of each, in one place.

Each is a raw scalar that does not grow with the number of tokens. The task multiplies it with its coefficient. Losses
that count or average experts take a `scope`: over all tokens of the micro-batch, on all processes where the context
names them; or in each sequence by itself, averaged over sequences weighted by their length. The others are means over
tokens, the same in either scope.
"""
# Shape suffixes: T tokens, K choices per token, E experts, G groups (sequences; or one, the whole batch).

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from routerzoo.distributed.collectives import sum_over_ranks
from routerzoo.functional.ids import checked_ids
from routerzoo.functional.ragged import add_by_index

if TYPE_CHECKING:
    from routerzoo.routing import RoutingContext

Scope = Literal["batch", "sequence"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


def fields_of_scope(scope: Scope) -> frozenset[str]:
    """Return the context fields that losses of a scope need.

    Raises:
        ValueError: an unknown scope.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope must be batch or sequence, got {scope!r}")
    return frozenset({"sequence_ids"} if scope == "sequence" else ())


class ScopeArguments(TypedDict):
    """What the losses that count or average experts take to know over which tokens."""

    scope: Scope
    sequence_ids: Tensor | None
    padding_mask: Tensor | None
    process_group: ProcessGroup | None


def scope_of(scope: Scope, context: RoutingContext) -> ScopeArguments:
    """Return the arguments of a loss of that scope."""
    return {
        "scope": scope,
        "sequence_ids": context.sequence_ids,
        "padding_mask": context.padding_mask,
        "process_group": context.process_group,
    }


def sums_in(scope: Scope, context: RoutingContext, *values_TE: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Add up values over the tokens that a loss of that scope looks at together, for losses of a router's own.

    Returns:
        The sums, `[G, E]` for each of the values, and the number of tokens, `[G, 1]`: padding left out, and over all
        processes that train together in the scope of a batch. Where `G` is not 1, groups without tokens are 0.
    """
    return _groups(values_TE[0], **scope_of(scope, context)).sums(*values_TE)


def balance_loss(
    probs_TE: Tensor,
    experts_TK: Tensor,
    *,
    weighted: bool = False,
    normalized: bool = False,
    may_drop: bool = True,
    earlier_E: Tensor | None = None,
    scope: Scope = "batch",
    sequence_ids: Tensor | None = None,
    padding_mask: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Return Switch's load-balancing loss, `E * sum_e f_e * P_e` (Fedus et al. 2022, equations 4 to 6).

    `f_e` is the share of all assignments that expert e gets (choices of -1 aside), so that the value is 1 at perfect
    balance and E at collapse, whatever k is. (Implementations that divide by tokens instead have a minimum of k.)
    `P_e` is the mean probability of expert e. The gradient flows through `P_e` alone. In the scope of a sequence it is
    DeepSeek-V3's sequence-wise loss (equations 17 to 20), whose `f_e` counts the experts of the largest scores, before
    any selection bias or groups: give those as `experts_TK`.

    Args:
        probs_TE: scores of each token; each row is normalized to sum to 1 here, as sigmoid scores need,
            unless `normalized`.
        experts_TK: chosen experts, -1 for none.
        weighted: let `f_e` be the mean over tokens of an expert's score where it is chosen (DynMoLE, Li et al. 2025),
            which has a gradient too.
        normalized: each row of the scores sums to 1 already.
        may_drop: whether `experts_TK` may hold -1; False saves the masking.
        earlier_E: assignments of each expert that `f_e` counts beside these: those of the earlier micro-batches of the
            optimizer step (Qiu et al. 2025, https://arxiv.org/abs/2501.11873). In the scope of a batch, unweighted.
        scope: `batch` or `sequence`.
        sequence_ids: [tokens] int64, from 0 and below the number of tokens, but for padding; needed in the scope of a
            sequence.
        padding_mask: [tokens] bool, True for tokens to leave out.
        process_group: processes whose tokens make up the batch together; matters in the scope of a batch.

    Returns:
        A scalar; 0 where there is no token.

    Raises:
        ValueError: an unknown scope, no `sequence_ids` where they are needed, or `earlier_E` with another scope or
            weighted; on a CPU, ids out of range.
    """
    num_tokens, num_experts = probs_TE.shape
    if earlier_E is not None and (weighted or scope != "batch"):
        raise ValueError("earlier_E counts for the scope of a batch, unweighted: leave it out")
    if not normalized:
        probs_TE = probs_TE / probs_TE.sum(-1, keepdim=True).clamp_min(torch.finfo(probs_TE.dtype).tiny)
    if may_drop:
        chosen_TE = probs_TE.new_zeros(num_tokens, num_experts + 1)
        chosen_TE = chosen_TE.scatter_(1, experts_TK.remainder(num_experts + 1), 1.0)[:, :num_experts]
    else:
        chosen_TE = probs_TE.new_zeros(num_tokens, num_experts).scatter_(1, experts_TK, 1.0)
    plain = scope == "batch" and padding_mask is None and process_group is None and earlier_E is None
    if plain and not weighted and not may_drop:
        # The most frequent case in a fifth of the operations: a GPU waits for each of them in a small model.
        factor = num_experts / max(experts_TK.numel() * num_tokens, 1)
        return torch.dot(chosen_TE.sum(0), probs_TE.sum(0)) * factor
    groups = _groups(probs_TE, scope, sequence_ids, padding_mask, process_group)
    counted_TE = chosen_TE * probs_TE if weighted else chosen_TE
    (counted_GE, probs_GE), tokens_G1 = groups.sums(counted_TE, probs_TE)
    if earlier_E is not None:
        counted_GE = counted_GE + sum_over_ranks(earlier_E.to(counted_GE.dtype), process_group)
    f_GE = counted_GE / (tokens_G1 if weighted else counted_GE.sum(1, keepdim=True)).clamp_min(1)
    P_GE = probs_GE / tokens_G1.clamp_min(1)
    return _average(num_experts * (f_GE * P_GE).sum(1), tokens_G1)


def importance_loss(
    gates_TE: Tensor,
    *,
    scope: Scope = "batch",
    sequence_ids: Tensor | None = None,
    padding_mask: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Return the squared coefficient of variation of the experts' importance.

    The importance of an expert is the sum of its gates over tokens. 0 at balance, E - 1 at collapse.

    Args:
        gates_TE: the combine weights, 0 where an expert is not chosen (Shazeer et al. 2017, equations 6 and 7;
            coefficient 0.1), or the softmax over all experts without noise, before any selection (V-MoE, Riquelme et
            al. 2021, https://arxiv.org/abs/2106.05974; coefficient 0.005).
        scope: see `balance_loss`; likewise the other arguments, the result and the errors.
        sequence_ids: see `balance_loss`.
        padding_mask: see `balance_loss`.
        process_group: see `balance_loss`.
    """
    groups = _groups(gates_TE, scope, sequence_ids, padding_mask, process_group)
    return _variation_of(groups, gates_TE)


def load_loss(
    logits_TE: Tensor,
    top_k: int,
    *,
    noisy_logits_TE: Tensor | None = None,
    noise_std: float | Tensor | None = None,
    exclude_itself: bool = False,
    scope: Scope = "batch",
    sequence_ids: Tensor | None = None,
    padding_mask: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Return the squared coefficient of variation of the experts' load, a smooth estimate of how many tokens each gets.

    The load of expert e is the sum over tokens of `1 - Phi((threshold_t - z_te) / std)`: the probability that it is
    among the k largest if its noise were drawn anew. V-MoE (Riquelme et al. 2021): threshold is the k-th
    largest noisy logit, std is 1 / E. Shazeer et al. 2017 (equations 8 to 11): the k-th largest noisy logit of the
    *other* experts, std learned. V-MoE's coefficient is 0.005, Shazeer's 0.1. The gradient flows through the threshold
    as well, as in V-MoE's code.

    Args:
        logits_TE: logits without noise.
        top_k: experts per token.
        noisy_logits_TE: the logits that experts were chosen by; by default those without noise.
        noise_std: standard deviation of the noise, a number or `[T, E]`; by default 1 / E.
        exclude_itself: leave an expert's own noisy logit out of its threshold, as Shazeer.
        scope: see `balance_loss`; likewise the arguments that follow, the result and the errors.
        sequence_ids: see `balance_loss`.
        padding_mask: see `balance_loss`.
        process_group: see `balance_loss`.
    """
    num_experts = logits_TE.shape[1]
    noisy_logits_TE = logits_TE if noisy_logits_TE is None else noisy_logits_TE
    noise_std = 1 / num_experts if noise_std is None else noise_std
    groups = _groups(logits_TE, scope, sequence_ids, padding_mask, process_group)
    if exclude_itself and top_k == num_experts:
        # Every expert is chosen whatever the noise.
        return _variation_of(groups, torch.ones_like(logits_TE)) + 0.0 * logits_TE.sum()
    largest_TK = noisy_logits_TE.topk(min(top_k + exclude_itself, num_experts), dim=-1).values
    threshold_TE = largest_TK[:, top_k - 1 : top_k].expand_as(logits_TE)
    if exclude_itself:
        among_TE = noisy_logits_TE > largest_TK[:, top_k:]
        threshold_TE = torch.where(among_TE, largest_TK[:, top_k:], threshold_TE)
    chance_TE = torch.special.ndtr((logits_TE - threshold_TE) / noise_std)
    return _variation_of(groups, chance_TE)


def z_loss(logits_TE: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
    """Return the mean of squared log-partition values, `logsumexp(logits)^2` (Zoph et al. 2022, equation 5)."""
    log_partition_T = torch.logsumexp(logits_TE, dim=-1)
    if padding_mask is None:
        return torch.dot(log_partition_T, log_partition_T) / max(len(log_partition_T), 1)
    return masked_mean(log_partition_T.square(), padding_mask)


def stablemoe_balance_loss(
    gates_T: Tensor,
    experts_T: Tensor,
    num_experts: int,
    *,
    scope: Scope = "batch",
    sequence_ids: Tensor | None = None,
    padding_mask: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Return StableMoE's balance loss (Dai et al. 2022, equation 8) as a mean over tokens, without its factor alpha.

    `sum_i (|A_i| - n) / n * sum_{t in A_i} sigmoid(s_ti)`, where `A_i` are the tokens of expert i and `n = T / E`. The
    paper and its code sum over tokens, as they do for the language-modeling loss; here both are means.

    Args:
        gates_T: sigmoid of each token's score for its expert.
        experts_T: the expert of each token; -1 leaves a token out.
        num_experts: number of experts.
        scope: see `balance_loss`; likewise the arguments that follow, the result and the errors.
        sequence_ids: see `balance_loss`.
        padding_mask: see `balance_loss`.
        process_group: see `balance_loss`.
    """
    padding_mask = experts_T < 0 if padding_mask is None else padding_mask | (experts_T < 0)
    chosen_TE = F.one_hot(experts_T.clamp_min(0), num_experts).to(gates_T.dtype)
    groups = _groups(gates_T, scope, sequence_ids, padding_mask, process_group)
    (load_GE, gates_GE), tokens_G1 = groups.sums(chosen_TE, chosen_TE * gates_T.unsqueeze(1))
    share_GE = load_GE / tokens_G1.clamp_min(1)
    return _average(((share_GE * num_experts - 1) * gates_GE / tokens_G1.clamp_min(1)).sum(1), tokens_G1)


def distillation_loss(student_TE: Tensor, teacher_T: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
    """Return the mean cross-entropy of a student router's logits with a teacher's choices (Dai et al. 2022, eq. 11)."""
    return masked_mean(F.cross_entropy(student_TE, teacher_T, reduction="none"), padding_mask)


def masked_mean(values_T: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Average over tokens that are not padding; 0 where there is none."""
    if padding_mask is None:
        return values_T.sum() / max(values_T.numel(), 1)
    return values_T.masked_fill(padding_mask, 0.0).sum() / (~padding_mask).sum().clamp_min(1)


class _Groups(NamedTuple):
    """The tokens that a loss looks at together.

    Args:
        group_T: group of each token; None where all tokens are one.
        keep_T1: 1 for tokens that count, 0 for padding.
        process_group: processes whose tokens are one group together with these; None for this one alone.
    """

    group_T: Tensor | None
    keep_T1: Tensor
    process_group: ProcessGroup | None

    def sums(self, *values_TE: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Add up over the tokens of each group, `[G, E]` for each of the values, and count them, `[G, 1]`.

        All in one message, where it takes one.
        """
        sums = [_sum_by_group(values * self.keep_T1, self.group_T) for values in values_TE]
        together = torch.cat([*sums, _sum_by_group(self.keep_T1, self.group_T)], dim=1)
        widths = [*(values.shape[1] for values in sums), 1]
        *totals, tokens_G1 = torch.split(sum_over_ranks(together, self.process_group), widths, dim=1)
        return tuple(totals), tokens_G1


def _groups(
    like: Tensor,
    scope: Scope,
    sequence_ids: Tensor | None,
    padding_mask: Tensor | None,
    process_group: ProcessGroup | None,
) -> _Groups:
    num_tokens = len(like)
    if "sequence_ids" in fields_of_scope(scope) and sequence_ids is None:
        raise ValueError("a loss in the scope of a sequence needs sequence_ids; the context has none")
    keep_T1 = like.new_ones(num_tokens, 1) if padding_mask is None else (~padding_mask).unsqueeze(1).to(like.dtype)
    if scope == "batch" or sequence_ids is None:
        return _Groups(None, keep_T1, process_group)
    use, advice = "a loss in the scope of a sequence groups tokens by sequence_ids", "number the sequences from 0"
    # No sequence lies on two processes.
    return _Groups(checked_ids(sequence_ids, num_tokens, padding_mask, use, advice), keep_T1, None)


def _average(losses_G: Tensor, tokens_G1: Tensor) -> Tensor:
    """Average over groups, weighted by their number of tokens."""
    tokens_G = tokens_G1.squeeze(1)
    return (losses_G * tokens_G).sum() / tokens_G.sum().clamp_min(1)


def _variation_of(groups: _Groups, values_TE: Tensor) -> Tensor:
    (sums_GE,), tokens_G1 = groups.sums(values_TE)
    return _average(_squared_variation(sums_GE / tokens_G1.clamp_min(1)), tokens_G1)


def _sum_by_group(values_TE: Tensor, group_T: Tensor | None) -> Tensor:
    if group_T is None:
        return values_TE.sum(0, keepdim=True)
    # As many groups as there are tokens, so that no number is read back from the device; groups without a token
    # count nothing.
    return add_by_index(values_TE, group_T, values_TE.shape[0])


def _squared_variation(means_GE: Tensor) -> Tensor:
    """Return the squared coefficient of variation of each row, over the whole population as in V-MoE's code."""
    mean_G1 = means_GE.mean(1, keepdim=True)
    return ((means_GE / mean_G1.clamp_min(torch.finfo(means_GE.dtype).tiny) - 1).square()).mean(1) * (mean_G1[:, 0] > 0)
