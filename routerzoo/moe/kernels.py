"""Triton kernels of the MoE layer: what lies between the experts' products, and the products where torch has none.

No atomics: each sum has one order, so that a run repeats bit for bit. Nothing is read back by the host: a tile of rows
finds its expert on the device. Sums are float32's. Rows that belong to no expert are neither read nor written.
"""
# Shape suffixes: T tokens, N assignments (rows sorted by expert), E experts, D model width, H hidden width,
# Z width of the pre-activations (2 H where gated, else H), I input width, O output width, C columns.

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from routerzoo.moe.rows import Rows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs the kernels, on a CPU."""
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _dot(a, b, sum, PRECISION: tl.constexpr):
    if _INTERPRETED:  # its dot product takes bfloat16's raw bits for numbers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision=PRECISION)


@triton.jit
def _value_and_slope(v, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(v)
        value = v * sigmoid
        slope = sigmoid + value * (1 - sigmoid)
    elif ACTIVATION == "gelu":
        below = 0.5 * (1 + tl.erf(v * 0.7071067811865476))
        value = v * below
        slope = below + v * tl.exp(-0.5 * v * v) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        tanh = 2 * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v)) - 1
        value = 0.5 * v * (1 + tanh)
        slope = 0.5 * (1 + tanh) + 0.3989422804014327 * v * (1 - tanh * tanh) * (1 + 0.134145 * v * v)
    else:
        tl.static_assert(ACTIVATION == "relu")
        value = tl.maximum(v, 0.0)
        slope = tl.where(v > 0, 1.0, 0.0)
    return value, slope


@triton.jit
def _kept(seed_ptr, place, probability):
    """Dropout's factor of a hidden unit, the same in both passes."""
    return tl.where(tl.rand(tl.load(seed_ptr), place) >= probability, 1 / (1 - probability), 0.0)


@triton.jit
def _biased(z_ptr, bias_ptr, row, expert, column, mask, Z: tl.constexpr, BIAS: tl.constexpr):
    v = tl.load(z_ptr + row * Z + column, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        v += tl.load(bias_ptr + expert * Z + column, mask=mask, other=0.0).to(tl.float32)
    return v


@triton.jit
def _activate(
    z_ptr,
    bias_ptr,
    expert_ptr,
    seed_ptr,
    a_ptr,
    dropout,
    E: tl.constexpr,
    H: tl.constexpr,
    Z: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    BH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    expert = tl.load(expert_ptr + row).to(tl.int64)
    if expert >= E:
        return
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    inside = h < H
    a, _ = _value_and_slope(_biased(z_ptr, bias_ptr, row, expert, h, inside, Z, BIAS), ACTIVATION)
    if Z > H:
        a *= _biased(z_ptr, bias_ptr, row, expert, H + h, inside, Z, BIAS)
    if DROPOUT:
        a *= _kept(seed_ptr, row * H + h, dropout)
    tl.store(a_ptr + row * H + h, a.to(a_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _activate_backward(
    da_ptr,
    z_ptr,
    bias_ptr,
    weight_ptr,
    expert_ptr,
    order_ptr,
    source_ptr,
    seed_ptr,
    bias_part_ptr,
    dz_ptr,
    wa_ptr,
    dweight_ptr,
    dropout,
    E: tl.constexpr,
    H: tl.constexpr,
    Z: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr,
    DOWN_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    BH: tl.constexpr,
):
    """One pass over a row: the gradient of the pre-activations, the weighted activations, the weight's gradient.

    The last is `<dy, y> = <dy W_down, a> + <dy, b_down>`, so that no expert's output is kept.
    """
    row = tl.program_id(0).to(tl.int64)
    expert = tl.load(expert_ptr + row).to(tl.int64)
    n = tl.load(order_ptr + row)
    if expert >= E:
        tl.store(dweight_ptr + n, 0.0)
        return
    weight = tl.load(weight_ptr + n).to(tl.float32)
    dweight_H = tl.zeros((BH,), tl.float32)
    for start in range(0, H, BH):
        h = start + tl.arange(0, BH)
        inside = h < H
        da = tl.load(da_ptr + row * H + h, mask=inside, other=0.0).to(tl.float32)
        value, slope = _value_and_slope(_biased(z_ptr, bias_ptr, row, expert, h, inside, Z, BIAS), ACTIVATION)
        if DROPOUT:
            kept = _kept(seed_ptr, row * H + h, dropout)
            value *= kept
            slope *= kept
        if Z > H:
            up = _biased(z_ptr, bias_ptr, row, expert, H + h, inside, Z, BIAS)
            dup = da * weight * value
            tl.store(dz_ptr + row * Z + H + h, dup.to(dz_ptr.dtype.element_ty), mask=inside)
            value *= up
            slope *= up
        dweight_H += da * value
        tl.store(wa_ptr + row * H + h, (value * weight).to(wa_ptr.dtype.element_ty), mask=inside)
        tl.store(dz_ptr + row * Z + h, (da * weight * slope).to(dz_ptr.dtype.element_ty), mask=inside)
    dweight = tl.sum(dweight_H, 0)
    if DOWN_BIAS:
        token = tl.load(source_ptr + row).to(tl.int64)
        dweight += tl.load(bias_part_ptr + token * E + expert).to(tl.float32)
    tl.store(dweight_ptr + n, dweight)


@triton.jit
def _combine(
    y_ptr,
    bias_ptr,
    weight_ptr,
    expert_ptr,
    row_ptr,
    begin_ptr,
    out_ptr,
    top_k,
    E: tl.constexpr,
    D: tl.constexpr,
    RAGGED: tl.constexpr,
    BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BD: tl.constexpr,
):
    """Add up a token's rows, weighted, in the order of its assignments."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    sum_D = tl.zeros((BD,), tl.float32)
    if RAGGED:
        n = tl.load(begin_ptr + t).to(tl.int64)
        end = tl.load(begin_ptr + t + 1).to(tl.int64)
    else:
        n = t * top_k
        end = n + top_k
    while n < end:
        row = tl.load(row_ptr + n).to(tl.int64)
        expert = tl.load(expert_ptr + row).to(tl.int64)
        inside = d < tl.where(expert < E, D, 0)
        y = tl.load(y_ptr + row * D + d, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            y += tl.load(bias_ptr + expert * D + d, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            y *= tl.load(weight_ptr + n).to(tl.float32)
        sum_D += y
        n += 1
    tl.store(out_ptr + t * D + d, sum_D.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _column_sums(
    g_ptr,
    source_ptr,
    order_ptr,
    weight_ptr,
    ends_ptr,
    sums_ptr,
    C: tl.constexpr,
    GATHERED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Add up each expert's rows: a bias's gradient. Rows by token are gathered and weighted."""
    expert = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    sum_C = tl.zeros((BC,), tl.float32)
    while start < end:
        rows = start + tl.arange(0, BR)
        inside = rows < end
        at = rows.to(tl.int64)
        if GATHERED:
            at = tl.load(source_ptr + rows, mask=inside, other=0).to(tl.int64)
        mask = inside[:, None] & (c < C)[None, :]
        g = tl.load(g_ptr + at[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        if GATHERED:
            n = tl.load(order_ptr + rows, mask=inside, other=0)
            g *= tl.load(weight_ptr + n, mask=inside, other=0.0).to(tl.float32)[:, None]
        sum_C += tl.sum(g, 0)
        start += BR
    tl.store(sums_ptr + expert * C + c, sum_C.to(sums_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def _tile(ends_ptr, tile, E: tl.constexpr, E2: tl.constexpr, BM: tl.constexpr):
    """Return the expert that a tile of rows belongs to, the tile's first row, and where the expert's rows end."""
    e = tl.arange(0, E2)
    end = tl.load(ends_ptr + e, mask=e < E, other=0)
    start = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles = tl.where(e < E, (end - start + BM - 1) // BM, 0)
    until = tl.cumsum(tiles, 0)
    expert = tl.sum((until <= tile).to(tl.int32), 0)
    here = e == expert
    first = tl.sum(tl.where(here, until - tiles, 0), 0)
    row = tl.sum(tl.where(here, start, 0), 0) + (tile - first) * BM
    return expert, row, tl.sum(tl.where(here, end, 0), 0)


@triton.jit
def _product(
    x_ptr,
    weight_ptr,
    source_ptr,
    ends_ptr,
    y_ptr,
    E: tl.constexpr,
    E2: tl.constexpr,
    I: tl.constexpr,
    O: tl.constexpr,
    STRIDE_O: tl.constexpr,
    STRIDE_I: tl.constexpr,
    GATHERED: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Multiply each row with its expert's weight; rows by token are gathered while they are read."""
    expert, start, end = _tile(ends_ptr, tl.program_id(0) // COLUMNS, E, E2, BM)
    if expert >= E:
        return
    rows = start + tl.arange(0, BM)
    inside = rows < end
    at = rows.to(tl.int64)
    if GATHERED:
        at = tl.load(source_ptr + rows, mask=inside, other=0).to(tl.int64)
    o = (tl.program_id(0) % COLUMNS) * BN + tl.arange(0, BN)
    i = tl.arange(0, BK)
    x_ptrs = x_ptr + at[:, None] * I + i[None, :]
    weight_ptrs = weight_ptr + expert.to(tl.int64) * O * I + o[None, :] * STRIDE_O + i[:, None] * STRIDE_I
    y = tl.zeros((BM, BN), tl.float32)
    for begin in range(0, I, BK):
        left = begin + i < I
        x = tl.load(x_ptrs + begin, mask=inside[:, None] & left[None, :], other=0.0)
        weight = tl.load(weight_ptrs + begin * STRIDE_I, mask=left[:, None] & (o < O)[None, :], other=0.0)
        y = _dot(x, weight, y, PRECISION)
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * O + o[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside[:, None] & (o < O)[None, :])


@triton.jit
def _add_rows(
    grad,
    g_ptr,
    x_ptr,
    source_ptr,
    start,
    end,
    o,
    i,
    O: tl.constexpr,
    I: tl.constexpr,
    GATHERED_G: tl.constexpr,
    GATHERED_X: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
):
    rows = start + tl.arange(0, BK)
    inside = rows < end
    g_at = rows.to(tl.int64)
    x_at = g_at
    if GATHERED_G:
        g_at = tl.load(source_ptr + rows, mask=inside, other=0).to(tl.int64)
    if GATHERED_X:
        x_at = tl.load(source_ptr + rows, mask=inside, other=0).to(tl.int64)
    g = tl.load(g_ptr + g_at[None, :] * O + o[:, None], mask=inside[None, :] & (o < O)[:, None], other=0.0)
    x = tl.load(x_ptr + x_at[:, None] * I + i[None, :], mask=inside[:, None] & (i < I)[None, :], other=0.0)
    return _dot(g, x, grad, PRECISION)


@triton.jit
def _weight_grad(
    g_ptr,
    x_ptr,
    source_ptr,
    ends_ptr,
    grad_ptr,
    O: tl.constexpr,
    I: tl.constexpr,
    GATHERED_G: tl.constexpr,
    GATHERED_X: tl.constexpr,
    PRECISION: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    BK: tl.constexpr,
):
    """Multiply `g^T x` over each expert's rows; of either, rows by token are gathered while they are read."""
    expert = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    i = tl.program_id(2) * BI + tl.arange(0, BI)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    grad = tl.zeros((BO, BI), tl.float32)
    if _INTERPRETED:  # Triton 3.6's interpreter knows no range of tensors
        while start < end:
            grad = _add_rows(
                grad, g_ptr, x_ptr, source_ptr, start, end, o, i, O, I, GATHERED_G, GATHERED_X, PRECISION, BK
            )
            start += BK
    else:  # a loop that the compiler pipelines
        for begin in range(start, end, BK):
            grad = _add_rows(
                grad, g_ptr, x_ptr, source_ptr, begin, end, o, i, O, I, GATHERED_G, GATHERED_X, PRECISION, BK
            )
    grad_ptrs = grad_ptr + expert * O * I + o[:, None] * I + i[None, :]
    tl.store(grad_ptrs, grad.to(grad_ptr.dtype.element_ty), mask=(o < O)[:, None] & (i < I)[None, :])


def tile_sizes(dtype: torch.dtype, rows_per_expert: int) -> dict[str, int]:
    """Return the tiles of the products: rows, columns, inner width, and how many warps and stages work on one.

    Args:
        dtype: of the operands. float32 is multiplied without tensor cores, unless torch is told otherwise.
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
    highest = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if highest else "tf32"


def _width(columns: int, most: int = 1024) -> dict[str, Any]:
    block = min(most, triton.next_power_of_2(columns))
    return {"BH": block, "num_warps": max(1, min(8, block // 128))}


def activate(
    z_NZ: Tensor, bias_EZ: Tensor | None, rows: Rows, hidden_dim: int, activation: str, dropout: float, seed: Tensor | None
) -> Tensor:
    """Return the hidden units of each row, `[N, H]`."""
    (num_rows, width), num_experts = z_NZ.shape, len(rows.ends_E)
    a_NH = z_NZ.new_empty(num_rows, hidden_dim)
    sizes = _width(hidden_dim)
    _activate[(num_rows, triton.cdiv(hidden_dim, sizes["BH"]))](
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
    _activate_backward[(num_rows,)](
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


def combine(y_ND: Tensor, bias_ED: Tensor | None, weight_N: Tensor | None, rows: Rows) -> Tensor:
    """Return the sum of each token's rows, weighted where weights are given, `[T, D]`."""
    width = y_ND.shape[1]
    out_TD = y_ND.new_empty(rows.num_tokens, width)
    sizes = _width(width)
    block = sizes.pop("BH")
    _combine[(rows.num_tokens, triton.cdiv(width, block))](
        y_ND,
        bias_ED if bias_ED is not None else y_ND,
        weight_N if weight_N is not None else y_ND,
        rows.expert_N,
        rows.row_N,
        rows.begin_T if rows.begin_T is not None else rows.row_N,
        out_TD,
        rows.top_k or 0,
        E=len(rows.ends_E),
        D=width,
        RAGGED=rows.begin_T is not None,
        BIAS=bias_ED is not None,
        WEIGHTED=weight_N is not None,
        BD=block,
        **sizes,
    )
    return out_TD


def column_sums(g: Tensor, rows: Rows, weight_N: Tensor | None = None) -> Tensor:
    """Return the sum of each expert's rows, `[E, C]`; with weights, the rows of `g` are tokens."""
    sums_EC = g.new_empty(len(rows.ends_E), g.shape[1])
    block = 16 if INTERPRETED else 64
    _column_sums[(len(rows.ends_E), triton.cdiv(g.shape[1], block))](
        g,
        rows.source_N,
        rows.order_N,
        weight_N if weight_N is not None else g,
        rows.ends_E,
        sums_EC,
        C=g.shape[1],
        GATHERED=weight_N is not None,
        BR=16 if INTERPRETED else 64,
        BC=block,
        num_warps=4,
    )
    return sums_EC


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
    _product[(tiles * columns,)](
        x,
        weight_EOI,
        rows.source_N,
        rows.ends_E,
        y_NO,
        E=num_experts,
        E2=triton.next_power_of_2(num_experts),
        I=in_width,
        O=out_width,
        STRIDE_O=weight_EOI.stride(1),
        STRIDE_I=weight_EOI.stride(2),
        GATHERED=gather,
        PRECISION=_precision(x.dtype),
        COLUMNS=columns,
        **sizes,
    )
    return y_NO


def weight_grad(g: Tensor, x: Tensor, rows: Rows, *, gather: str) -> Tensor:
    """Return `g^T x` over each expert's rows, `[E, O, I]`.

    Args:
        g: rows sorted by expert, or tokens.
        x: likewise.
        rows: which rows are whose.
        gather: `g` or `x`, whose rows are tokens.
    """
    num_experts, out_width, in_width = len(rows.ends_E), g.shape[1], x.shape[1]
    grad_EOI = g.new_empty(num_experts, out_width, in_width)
    sizes = tile_sizes(g.dtype, 128)
    sizes["BO"], sizes["BI"] = sizes.pop("BM"), sizes.pop("BN")
    _weight_grad[(num_experts, triton.cdiv(out_width, sizes["BO"]), triton.cdiv(in_width, sizes["BI"]))](
        g,
        x,
        rows.source_N,
        rows.ends_E,
        grad_EOI,
        O=out_width,
        I=in_width,
        GATHERED_G=gather == "g",
        GATHERED_X=gather == "x",
        PRECISION=_precision(g.dtype),
        **sizes,
    )
    return grad_EOI
