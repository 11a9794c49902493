"""Calls of the Triton kernels: the parts of the experts' operator on a GPU."""
# Shape suffixes: T tokens, N assignments (rows sorted by expert), E experts, D model width, H hidden width,
# Z width of the pre-activations (2 H where gated, else H), I input width, O output width, C columns.

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from routerzoo.moe import kernels
from routerzoo.moe.kernels import INTERPRETED
from routerzoo.moe.rows import Order, Rows

MOST_UNROLLED = 16
"""Of so many experts per token the kernels are compiled for each k; of more, for all."""

MOST_SUMMED_AT_ONCE = 2**15
"""Up to so many partial sums one program adds up while another launch would begin (by count, not measured)."""

SUM_SIZES = {"CHUNK": 32, "BR": 16, "BC": 16} if INTERPRETED else {"CHUNK": 1024, "BR": 64, "BC": 64, "num_warps": 4}
"""How the rows of experts are added up: by chunks, in blocks of rows and columns."""


def tile_sizes(dtype: torch.dtype, rows_per_expert: int) -> dict[str, int]:
    """Return the tiles of the products: rows, columns, inner width, and how many warps and stages work on one.

    Args:
        dtype: of the operands. float32 products use tensor cores only if
            `torch.backends.cuda.matmul.fp32_precision` is `tf32`.
        rows_per_expert: in the mean; tiles of few rows where there are few.
    """
    if INTERPRETED:
        return {"BM": 16, "BN": 16, "BK": 16, "num_warps": 4, "num_stages": 2}
    if dtype == torch.float32:
        return {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 3}
    if rows_per_expert < 32:
        return {"BM": 16, "BN": 128, "BK": 64, "num_warps": 4, "num_stages": 3}
    if rows_per_expert < 96:
        return {"BM": 64, "BN": 128, "BK": 64, "num_warps": 4, "num_stages": 3}
    return {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3}


def _precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _width(columns: int, most: int = 1024) -> dict[str, Any]:
    block = min(most, triton.next_power_of_2(columns))
    return {"BH": block, "num_warps": max(1, min(8, block // 128))}


def place_rows(order: Order, num_tokens: int, num_experts: int) -> Rows:
    """Return what follows from an order."""
    expert_N, order_N, begin_T, top_k = order
    num_rows, block = len(order_N), 16 if INTERPRETED else 256
    ends_E = order_N.new_empty(num_experts, dtype=torch.int32)
    source_N, row_N = (order_N.new_empty(num_rows, dtype=torch.int32) for _ in range(2))
    narrow_N = order_N if order_N.dtype == torch.int32 else torch.empty_like(source_N)
    kernels.place_rows[(triton.cdiv(max(num_rows, num_experts), block),)](
        expert_N,
        order_N,
        begin_T if begin_T is not None else order_N,
        ends_E,
        narrow_N,
        source_N,
        row_N,
        num_rows,
        num_tokens,
        top_k or 1,
        1 << num_rows.bit_length() >> 1,
        1 << num_tokens.bit_length() >> 1,
        E=num_experts,
        NARROW=narrow_N is not order_N,
        RAGGED=begin_T is not None,
        B=block,
        num_warps=4,
    )
    return Rows(ends_E, expert_N, narrow_N, source_N, row_N, begin_T, top_k, num_tokens)


def activate(
    z_NZ: Tensor,
    bias_EZ: Tensor | None,
    rows: Rows,
    hidden_dim: int,
    activation: str,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    """Return the hidden units of each row, `[N, H]`."""
    (num_rows, width), num_experts = z_NZ.shape, len(rows.ends_E)
    a_NH = z_NZ.new_empty(num_rows, hidden_dim)
    sizes = _width(hidden_dim)
    kernels.activate[(num_rows, triton.cdiv(hidden_dim, sizes["BH"]))](
        z_NZ,
        bias_EZ if bias_EZ is not None else z_NZ,
        rows.expert_N,
        seed if seed is not None else rows.order_N,
        a_NH,
        dropout,
        E=num_experts,
        H=hidden_dim,
        Z=width,
        ACTIVATION=activation,
        BIAS=bias_EZ is not None,
        DROPOUT=seed is not None,
        **sizes,
    )
    return a_NH


def activate_backward(
    da_NH: Tensor,
    z_NZ: Tensor,
    bias_EZ: Tensor | None,
    weight_N: Tensor,
    bias_part_TE: Tensor | None,
    rows: Rows,
    activation: str,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of pre-activations, `[N, Z]`, the weighted hidden units, and the gradients of weights.

    Args:
        da_NH: the gradient of the hidden units, without the weights.
        z_NZ: pre-activations, without the bias.
        bias_EZ: their bias.
        weight_N: the weight of each assignment.
        bias_part_TE: the product of each token's gradient and each expert's second bias, where there is one.
        rows: which rows are whose.
        activation: its name.
        dropout: probability of dropping a hidden unit.
        seed: of the dropout; None for none.
    """
    (num_rows, hidden_dim), width = da_NH.shape, z_NZ.shape[1]
    dz_NZ, wa_NH, dweight_N = torch.empty_like(z_NZ), torch.empty_like(da_NH), torch.empty_like(weight_N)
    kernels.activate_backward[(num_rows,)](
        da_NH,
        z_NZ,
        bias_EZ if bias_EZ is not None else z_NZ,
        weight_N,
        rows.expert_N,
        rows.order_N,
        rows.source_N,
        seed if seed is not None else rows.order_N,
        bias_part_TE if bias_part_TE is not None else da_NH,
        dz_NZ,
        wa_NH,
        dweight_N,
        dropout,
        E=len(rows.ends_E),
        H=hidden_dim,
        Z=width,
        ACTIVATION=activation,
        BIAS=bias_EZ is not None,
        DOWN_BIAS=bias_part_TE is not None,
        DROPOUT=seed is not None,
        **_width(hidden_dim),
    )
    return dz_NZ, wa_NH, dweight_N


def combine(y_ND: Tensor, bias_ED: Tensor | None, weight_N: Tensor | None, rows: Rows, dtype: torch.dtype) -> Tensor:
    """Return the sum of each token's rows, weighted where weights are given, `[T, D]`."""
    width = y_ND.shape[1]
    out_TD = y_ND.new_empty(rows.num_tokens, width, dtype=dtype)
    sizes = _width(width)
    block = sizes.pop("BH")
    kernels.combine[(rows.num_tokens, triton.cdiv(width, block))](
        y_ND,
        bias_ED if bias_ED is not None else y_ND,
        weight_N if weight_N is not None else y_ND,
        rows.expert_N,
        rows.row_N,
        rows.begin_T if rows.begin_T is not None else rows.row_N,
        out_TD,
        rows.ends_E,
        rows.top_k or 0,
        E=len(rows.ends_E),
        D=width,
        TOP_K=rows.top_k if rows.top_k is not None and rows.top_k <= MOST_UNROLLED else 0,
        RAGGED=rows.begin_T is not None,
        BIAS=bias_ED is not None,
        WEIGHTED=weight_N is not None,
        BD=block,
        **sizes,
    )
    return out_TD


def bias_grads(
    dz_NZ: Tensor,
    grad_TD: Tensor,
    weight_N: Tensor,
    up_bias_EZ: Tensor | None,
    down_bias_ED: Tensor | None,
    rows: Rows,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of both biases, summed in float32 and rounded once; nothing for None.

    Args:
        dz_NZ: the gradient of the pre-activations.
        grad_TD: the gradient of the output, by token.
        weight_N: the weight of each assignment.
        up_bias_EZ: the first bias.
        down_bias_ED: the second.
        rows: which rows are whose.
    """
    num_rows, num_experts = len(rows.source_N), len(rows.ends_E)
    dup_bias_EZ, ddown_bias_ED = (
        grad_TD.new_empty(0) if bias is None else torch.empty_like(bias) for bias in (up_bias_EZ, down_bias_ED)
    )
    z_width, width = (0 if bias is None else bias.shape[1] for bias in (up_bias_EZ, down_bias_ED))
    sizes = {"E": num_experts, "E2": triton.next_power_of_2(num_experts), "Z": z_width, "D": width, **SUM_SIZES}
    chunks = num_rows // sizes["CHUNK"] + min(num_experts, num_rows)  # at most so many, whatever the loads
    parts = grad_TD.new_empty(chunks, z_width + width, dtype=torch.float32)
    kernels.column_sums[(chunks, triton.cdiv(z_width, sizes["BC"]) + triton.cdiv(width, sizes["BC"]))](
        dz_NZ, grad_TD, rows.source_N, rows.order_N, weight_N, rows.ends_E, parts, **sizes
    )
    kernels.sum_chunks[(num_experts, triton.cdiv(z_width + width, sizes["BC"]))](
        parts, rows.ends_E, dup_bias_EZ, ddown_bias_ED, **sizes
    )
    return dup_bias_EZ, ddown_bias_ED


def gathered(x_TD: Tensor, rows: Rows) -> tuple[Tensor, bool]:
    """Return what products read, and whether they gather it: here they do."""
    return x_TD, True


def product(x: Tensor, weight_EOI: Tensor, rows: Rows, *, gather: bool = False) -> Tensor:
    """Return each row times its expert's weight, transposed as in `torch.nn.Linear`, `[N, O]`.

    Args:
        x: rows sorted by expert, or with `gather` tokens.
        weight_EOI: weights, of any strides that cover them.
        rows: which rows are whose.
        gather: read the rows of `x` by token.
    """
    num_rows, (num_experts, out_width, in_width) = len(rows.source_N), weight_EOI.shape
    y_NO = x.new_empty(num_rows, out_width)
    sizes = tile_sizes(x.dtype, num_rows // num_experts)
    columns = triton.cdiv(out_width, sizes["BN"])
    tiles = num_rows // sizes["BM"] + min(num_experts, num_rows)  # at most so many, whatever the loads
    kernels.product[(tiles * columns,)](
        x,
        weight_EOI,
        rows.source_N,
        rows.ends_E,
        y_NO,
        E=num_experts,
        E2=triton.next_power_of_2(num_experts),
        IN=in_width,
        OUT=out_width,
        STRIDE_O=weight_EOI.stride(1),
        STRIDE_I=weight_EOI.stride(2),
        GATHERED=gather,
        PRECISION=_precision(x.dtype),
        COLUMNS=columns,
        **sizes,
    )
    return y_NO


def weight_grad(g: Tensor, x: Tensor, rows: Rows, dtype: torch.dtype, *, gather: str) -> Tensor:
    """Return `g^T x` over each expert's rows, `[E, O, I]`.

    Args:
        g: rows sorted by expert, or tokens.
        x: likewise.
        rows: which rows are whose.
        dtype: of the result, which is rounded once.
        gather: `g` or `x`, whose rows are tokens; empty for neither.
    """
    num_experts, out_width, in_width = len(rows.ends_E), g.shape[1], x.shape[1]
    grad_EOI = g.new_empty(num_experts, out_width, in_width, dtype=dtype)
    sizes = tile_sizes(g.dtype, 128)
    sizes["BO"], sizes["BI"] = sizes.pop("BM"), sizes.pop("BN")
    # Experts are the slowest dimension: blocks that run together read the same rows.
    kernels.weight_grad[(triton.cdiv(out_width, sizes["BO"]), triton.cdiv(in_width, sizes["BI"]), num_experts)](
        g,
        x,
        rows.source_N,
        rows.ends_E,
        grad_EOI,
        OUT=out_width,
        IN=in_width,
        GATHERED_G=gather == "g",
        GATHERED_X=gather == "x",
        PRECISION=_precision(g.dtype),
        **sizes,
    )
    return grad_EOI


def softmax_losses(
    logits_TE: Tensor, experts_TK: Tensor, padding_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the balance loss and the z-loss, the log-partition values, and the sums, `[2 E + 2]`."""
    (num_tokens, num_experts), top_k = logits_TE.shape, experts_TK.shape[1]
    sizes = _token_blocks(num_experts)
    num_blocks = triton.cdiv(num_tokens, sizes["BT"])
    log_partition_T = logits_TE.new_empty(num_tokens)
    parts = logits_TE.new_empty(num_blocks, 2 * num_experts + 2)
    kernels.softmax_sums[(num_blocks,)](
        logits_TE,
        experts_TK,
        padding_mask if padding_mask is not None else experts_TK,
        log_partition_T,
        parts,
        num_tokens,
        top_k,
        E=num_experts,
        PADDED=padding_mask is not None,
        **sizes,
    )
    if num_blocks * sizes["E2"] > MOST_SUMMED_AT_ONCE:
        parts = parts.sum(0, keepdim=True)
    balance, z, sums = logits_TE.new_empty(()), logits_TE.new_empty(()), parts.new_empty(2 * num_experts + 2)
    kernels.softmax_losses[(1,)](
        parts,
        sums,
        balance,
        z,
        len(parts),
        E=num_experts,
        E2=sizes["E2"],
        BP=min(max(1, 4096 // sizes["E2"]), triton.next_power_of_2(len(parts))),
        num_warps=8,
    )
    return balance, z, log_partition_T, sums


def softmax_losses_backward(
    grad_balance: Tensor | None,
    grad_z: Tensor | None,
    logits_TE: Tensor,
    padding_mask: Tensor | None,
    log_partition_T: Tensor,
    sums: Tensor,
) -> Tensor:
    """Return the gradient of the logits."""
    num_tokens, num_experts = logits_TE.shape
    grad_TE = torch.empty_like(logits_TE)
    sizes = _token_blocks(num_experts)
    kernels.softmax_losses_backward[(triton.cdiv(num_tokens, sizes["BT"]),)](
        logits_TE,
        padding_mask if padding_mask is not None else logits_TE,
        log_partition_T,
        sums,
        grad_balance if grad_balance is not None else sums,
        grad_z if grad_z is not None else sums,
        grad_TE,
        num_tokens,
        E=num_experts,
        PADDED=padding_mask is not None,
        BALANCE=grad_balance is not None,
        Z_LOSS=grad_z is not None,
        **sizes,
    )
    return grad_TE


def _token_blocks(num_experts: int) -> dict[str, int]:
    width = triton.next_power_of_2(num_experts)
    return {"E2": width, "BT": max(1, min(64, 4096 // width))}
