"""Rows of tokens into the order of experts, and back: the memory traffic of a MoE layer outside its products."""
# Shape suffixes: T tokens, N assignments (token-expert pairs), D model width.

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from routerzoo.functional.ragged import add_by_index
from routerzoo.functional.transforms import in_transform


class Permutation(NamedTuple):
    """Where the assignments of T tokens go when they are sorted by expert.

    Assignments are numbered in the order of their tokens, rows in the order of their experts.

    Args:
        token_N: the token of each assignment, rising.
        order_N: the assignment in each row.
        source_N: the token in each row.
        num_tokens: T.
        top_k: assignments of every token, where all have as many.
        bags: the row of each assignment, and where each token's assignments begin; None where rows are better indexed.
    """

    token_N: Tensor
    order_N: Tensor
    source_N: Tensor
    num_tokens: int
    top_k: int | None
    bags: tuple[Tensor, Tensor] | None


def permutation_of(token_N: Tensor, order_N: Tensor, num_tokens: int, top_k: int | None) -> Permutation:
    """Return a permutation from the rising tokens of assignments and the order of these by expert."""
    source_N = token_N.index_select(0, order_N)
    bags = None
    # torch's embedding bags sum gathered, weighted rows in one pass without a copy of them; under a compiler plain
    # indexing is the faster one on a CPU. On a GPU the gradient of indexing adds in no fixed order.
    plain = torch.compiler.is_exporting() if order_N.device.type == "cuda" else torch.compiler.is_compiling()
    if order_N.device.type in ("cpu", "cuda") and not plain and not in_transform() and order_N.shape[0]:
        rising_N = torch.arange(order_N.shape[0], device=order_N.device)
        row_N = torch.empty_like(order_N).scatter_(0, order_N, rising_N)
        tokens_T = torch.arange(num_tokens, device=order_N.device)
        begin_T = tokens_T * top_k if top_k is not None else torch.searchsorted(token_N, tokens_T)
        bags = row_N, begin_T
    return Permutation(token_N, order_N, source_N, num_tokens, top_k, bags)


def permute(x_TD: Tensor, permutation: Permutation) -> Tensor:
    """Return each assignment's token, in the order of experts, `[N, D]`."""
    if permutation.bags is None:
        return x_TD.index_select(0, permutation.source_N)
    rows_ND: Tensor = _Permute.apply(x_TD, permutation.source_N, *permutation.bags, permutation.top_k)
    return rows_ND


def unpermute(y_ND: Tensor, weight_N: Tensor, permutation: Permutation) -> Tensor:
    """Add up the rows of each token, weighted.

    Args:
        y_ND: rows in the order of experts.
        weight_N: weight of each assignment, in the order of tokens.
        permutation: as rows were permuted.

    Returns:
        `[T, D]`; zeros for a token without assignments.
    """
    _, order_N, source_N, num_tokens, top_k, bags = permutation
    weight_N = weight_N.to(y_ND.dtype)
    if bags is not None:
        summed_TD: Tensor = _Unpermute.apply(y_ND, weight_N, order_N, source_N, *bags, top_k)
        return summed_TD
    y_ND = y_ND * weight_N.index_select(0, order_N).unsqueeze(1)
    return y_ND.new_zeros(num_tokens, y_ND.shape[1]).index_add(0, source_N, y_ND)


class _Permute(torch.autograd.Function):
    """`x_TD[source_N]`, whose gradient sums each token's rows in one pass."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, source_N: Tensor, row_N: Tensor, begin_T: Tensor, top_k: int | None) -> Tensor:
        ctx.save_for_backward(source_N, row_N, begin_T)
        ctx.top_k = top_k
        return x_TD.index_select(0, source_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None, None, None]:
        source_N, row_N, begin_T = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates the gradient
            zeros_TD = grad_ND.new_zeros(begin_T.shape[0], grad_ND.shape[1])
            return zeros_TD.index_add(0, source_N, grad_ND), None, None, None, None
        return sum_bags(grad_ND, row_N, begin_T, top_k=ctx.top_k), None, None, None, None


class _Unpermute(torch.autograd.Function):
    """The weighted sum of each token's rows, and its gradients, the sum without a weighted copy of the rows."""

    @staticmethod
    def forward(
        ctx: Any,
        y_ND: Tensor,
        weight_N: Tensor,
        order_N: Tensor,
        source_N: Tensor,
        row_N: Tensor,
        begin_T: Tensor,
        top_k: int | None,
    ) -> Tensor:
        ctx.save_for_backward(y_ND, weight_N, order_N, source_N, row_N)
        return sum_bags(y_ND, row_N, begin_T, weight_N, top_k)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        y_ND, weight_N, order_N, source_N, row_N = ctx.saved_tensors
        grad_y: Tensor | None = None
        grad_weight: Tensor | None = None
        grad_ND = grad_TD.index_select(0, source_N)
        if ctx.needs_input_grad[1]:
            # Not the bags' own gradient: it is faster, but rounds a sum over D beyond what recorded gates allow.
            grad_weight = (grad_ND * y_ND).sum(1).index_select(0, row_N)
        if ctx.needs_input_grad[0]:
            weight_N1 = weight_N.index_select(0, order_N).unsqueeze(1)
            # In place, unless somebody differentiates the gradient.
            grad_y = grad_ND * weight_N1 if torch.is_grad_enabled() else grad_ND.mul_(weight_N1)
        return grad_y, grad_weight, None, None, None, None, None


_SUM = 0  # torch's number for the mode


def sum_bags(
    rows: Tensor, row_N: Tensor, begin_T: Tensor, weight_N: Tensor | None = None, top_k: int | None = None
) -> Tensor:
    """Return the sum of each token's rows, weighted where weights are given, always in the same order."""
    if rows.device.type == "cpu":
        sums: Tensor = torch.embedding_bag(rows.contiguous(), row_N, begin_T, mode=_SUM, per_sample_weights=weight_N)[0]
        return sums
    return _sum_gathered(rows, row_N, begin_T, weight_N, top_k)


def _sum_gathered(rows: Tensor, row_N: Tensor, begin_T: Tensor, weight_N: Tensor | None, top_k: int | None) -> Tensor:
    gathered_ND = rows.index_select(0, row_N)
    if weight_N is not None:
        gathered_ND = gathered_ND * weight_N.unsqueeze(1)
    if top_k is not None:
        return gathered_ND.view(-1, top_k, rows.shape[1]).sum(1)
    assignments_N = torch.arange(row_N.shape[0], device=row_N.device, dtype=begin_T.dtype)
    token_N = torch.searchsorted(begin_T, assignments_N, right=True) - 1
    return add_by_index(gathered_ND.float(), token_N, begin_T.shape[0]).to(rows.dtype)
