"""Triton kernels of the MoE layer: what lies between the experts' products, and the products where torch has none.

No atomics: each sum has one order, so that a run repeats bit for bit. Nothing is read back by the host: a tile of rows
finds its expert on the device. Sums are float32's. Rows that belong to no expert are neither read nor written.
"""
# Shape suffixes: T tokens, N assignments (rows sorted by expert), E experts, D model width, H hidden width,
# Z width of the pre-activations (2 H where gated, else H), IN input width, OUT output width, C columns.

from __future__ import annotations

import os

import triton
import triton.language as tl

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
    elif ACTIVATION == "quick_gelu":
        sigmoid = tl.sigmoid(1.702 * v)
        value = v * sigmoid
        slope = sigmoid + 1.702 * value * (1 - sigmoid)
    elif ACTIVATION == "sigmoid":
        value = tl.sigmoid(v)
        slope = value * (1 - value)
    elif ACTIVATION == "relu2":
        positive = tl.maximum(v, 0.0)
        value = positive * positive
        slope = 2 * positive
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


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "top_k", "row_step", "token_step"])
def place_rows(
    expert_ptr,
    order_ptr,
    begin_ptr,
    ends_ptr,
    narrow_ptr,
    source_ptr,
    row_ptr,
    num_rows,
    num_tokens,
    top_k,
    row_step,
    token_step,
    E: tl.constexpr,
    NARROW: tl.constexpr,
    RAGGED: tl.constexpr,
    B: tl.constexpr,
):
    """Of a block of sorted rows, write the tokens, and the rows of assignments; of experts, their ends.

    An expert's end, and where tokens have different numbers of assignments a row's token, is found by bisection, from
    the largest power of 2 that is no larger than the number of rows, or of tokens. With NARROW, the order is copied.
    """
    place = tl.program_id(0) * B + tl.arange(0, B)
    inside = place < num_rows
    n = tl.load(order_ptr + place, mask=inside, other=0)
    if NARROW:
        tl.store(narrow_ptr + place, n.to(tl.int32), mask=inside)
    tl.store(row_ptr + n, place, mask=inside)
    if RAGGED:
        token = tl.zeros((B,), tl.int32)
        step = token_step
        while step > 0:
            later = token + step
            begin = tl.load(begin_ptr + later, mask=inside & (later < num_tokens), other=num_rows)
            token = tl.where(begin <= n, later, token)
            step = step // 2
        tl.store(source_ptr + place, token, mask=inside)
    else:
        tl.store(source_ptr + place, (n // top_k).to(tl.int32), mask=inside)
    if tl.program_id(0) * B < E:
        end = tl.zeros((B,), tl.int32)
        step = row_step
        while step > 0:
            beyond = end + step
            known = (place < E) & (beyond <= num_rows)
            expert = tl.load(expert_ptr + beyond - 1, mask=known, other=E).to(tl.int32)
            end = tl.where(expert <= place, beyond, end)
            step = step // 2
        tl.store(ends_ptr + place, end, mask=place < E)


@triton.jit
def activate(
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
    """Write the hidden units of a row."""
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
def activate_backward(
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
def _weighted_row(
    y_ptr,
    bias_ptr,
    weight_ptr,
    expert_ptr,
    row_ptr,
    n,
    total,
    d,
    D: tl.constexpr,
    BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    row = tl.load(row_ptr + n).to(tl.int64)
    inside = d < tl.where(row < total, D, 0)  # rows from the last end on belong to no expert
    y = tl.load(y_ptr + row * D + d, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        expert = tl.load(expert_ptr + row).to(tl.int64)
        y += tl.load(bias_ptr + expert * D + d, mask=inside, other=0.0).to(tl.float32)
    if WEIGHTED:
        y *= tl.load(weight_ptr + n).to(tl.float32)
    return y


@triton.jit
def combine(
    y_ptr,
    bias_ptr,
    weight_ptr,
    expert_ptr,
    row_ptr,
    begin_ptr,
    out_ptr,
    ends_ptr,
    top_k,
    E: tl.constexpr,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    RAGGED: tl.constexpr,
    BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BD: tl.constexpr,
):
    """Add up a token's rows, weighted, in the order of its assignments."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    total = tl.load(ends_ptr + E - 1)
    sum_D = tl.zeros((BD,), tl.float32)
    if TOP_K > 0:
        for k in tl.static_range(TOP_K):
            n = t * TOP_K + k
            sum_D += _weighted_row(y_ptr, bias_ptr, weight_ptr, expert_ptr, row_ptr, n, total, d, D, BIAS, WEIGHTED)
    else:
        if RAGGED:
            n = tl.load(begin_ptr + t).to(tl.int64)
            end = tl.load(begin_ptr + t + 1).to(tl.int64)
        else:
            n = t * top_k
            end = n + top_k
        while n < end:
            sum_D += _weighted_row(y_ptr, bias_ptr, weight_ptr, expert_ptr, row_ptr, n, total, d, D, BIAS, WEIGHTED)
            n += 1
    tl.store(out_ptr + t * D + d, sum_D.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _tiles(ends_ptr, E: tl.constexpr, E2: tl.constexpr, BM: tl.constexpr):
    """Return how many tiles of BM rows each expert has, where they end, and where its rows begin and end."""
    e = tl.arange(0, E2)
    end = tl.load(ends_ptr + e, mask=e < E, other=0)
    start = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles = tl.where(e < E, (end - start + BM - 1) // BM, 0)
    return tiles, tl.cumsum(tiles, 0), start, end


@triton.jit
def _tile(ends_ptr, tile, E: tl.constexpr, E2: tl.constexpr, BM: tl.constexpr):
    """Return the expert that a tile of rows belongs to, the tile's first row, and where the expert's rows end."""
    tiles, until, start, end = _tiles(ends_ptr, E, E2, BM)
    expert = tl.sum((until <= tile).to(tl.int32), 0)
    here = tl.arange(0, E2) == expert
    first = tl.sum(tl.where(here, until - tiles, 0), 0)
    row = tl.sum(tl.where(here, start, 0), 0) + (tile - first) * BM
    return expert, row, tl.sum(tl.where(here, end, 0), 0)


@triton.jit
def _chunk_sum(
    g_ptr,
    source_ptr,
    order_ptr,
    weight_ptr,
    start,
    end,
    c,
    C: tl.constexpr,
    GATHERED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
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
    return sum_C


@triton.jit
def column_sums(
    dz_ptr,
    grad_ptr,
    source_ptr,
    order_ptr,
    weight_ptr,
    ends_ptr,
    parts_ptr,
    E: tl.constexpr,
    E2: tl.constexpr,
    Z: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Add up each chunk of an expert's rows: parts of the biases' gradients, 0 columns of one that none is asked of.

    The second bias's rows are those of the tokens' gradients, gathered and weighted. Chunks are short, so that no
    program waits for one whose expert has all the rows.
    """
    expert, start, end = _tile(ends_ptr, tl.program_id(0), E, E2, CHUNK)
    if expert >= E:
        return
    end = tl.minimum(end, start + CHUNK)
    parts_ptr += tl.program_id(0).to(tl.int64) * (Z + D)
    block = tl.program_id(1)
    if block < (Z + BC - 1) // BC:
        c = block * BC + tl.arange(0, BC)
        sum_C = _chunk_sum(dz_ptr, source_ptr, order_ptr, weight_ptr, start, end, c, Z, False, BR, BC)
        tl.store(parts_ptr + c, sum_C, mask=c < Z)
    else:
        c = (block - (Z + BC - 1) // BC) * BC + tl.arange(0, BC)
        sum_C = _chunk_sum(grad_ptr, source_ptr, order_ptr, weight_ptr, start, end, c, D, True, BR, BC)
        tl.store(parts_ptr + Z + c, sum_C, mask=c < D)


@triton.jit
def sum_chunks(
    parts_ptr,
    ends_ptr,
    up_ptr,
    down_ptr,
    E: tl.constexpr,
    E2: tl.constexpr,
    Z: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Add up the parts of each expert's sums."""
    expert = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    tiles, until, _, _ = _tiles(ends_ptr, E, E2, CHUNK)
    here = tl.arange(0, E2) == expert
    end = tl.sum(tl.where(here, until, 0), 0)
    start = end - tl.sum(tl.where(here, tiles, 0), 0)
    sum_C = tl.zeros((BC,), tl.float32)
    while start < end:
        rows = start + tl.arange(0, BR)
        mask = (rows < end)[:, None] & (c < Z + D)[None, :]
        sum_C += tl.sum(tl.load(parts_ptr + rows.to(tl.int64)[:, None] * (Z + D) + c[None, :], mask=mask, other=0.0), 0)
        start += BR
    expert = expert.to(tl.int64)
    tl.store(up_ptr + expert * Z + c, sum_C.to(up_ptr.dtype.element_ty), mask=c < Z)
    inside = (c >= Z) & (c < Z + D)
    tl.store(down_ptr + expert * D + c - Z, sum_C.to(down_ptr.dtype.element_ty), mask=inside)


@triton.jit
def product(
    x_ptr,
    weight_ptr,
    source_ptr,
    ends_ptr,
    y_ptr,
    E: tl.constexpr,
    E2: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
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
    x_ptrs = x_ptr + at[:, None] * IN + i[None, :]
    weight_ptrs = weight_ptr + expert.to(tl.int64) * OUT * IN + o[None, :] * STRIDE_O + i[:, None] * STRIDE_I
    y = tl.zeros((BM, BN), tl.float32)
    for begin in range(0, IN, BK):
        left = begin + i < IN
        x = tl.load(x_ptrs + begin, mask=inside[:, None] & left[None, :], other=0.0)
        weight = tl.load(weight_ptrs + begin * STRIDE_I, mask=left[:, None] & (o < OUT)[None, :], other=0.0)
        y = _dot(x, weight, y, PRECISION)
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * OUT + o[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=inside[:, None] & (o < OUT)[None, :])


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
    OUT: tl.constexpr,
    IN: tl.constexpr,
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
    g = tl.load(g_ptr + g_at[None, :] * OUT + o[:, None], mask=inside[None, :] & (o < OUT)[:, None], other=0.0)
    x = tl.load(x_ptr + x_at[:, None] * IN + i[None, :], mask=inside[:, None] & (i < IN)[None, :], other=0.0)
    return _dot(g, x, grad, PRECISION)


@triton.jit
def weight_grad(
    g_ptr,
    x_ptr,
    source_ptr,
    ends_ptr,
    grad_ptr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    GATHERED_G: tl.constexpr,
    GATHERED_X: tl.constexpr,
    PRECISION: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    BK: tl.constexpr,
):
    """Multiply `g^T x` over each expert's rows; of either, rows by token are gathered while they are read."""
    expert = tl.program_id(2).to(tl.int64)
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    grad = tl.zeros((BO, BI), tl.float32)
    if _INTERPRETED:  # Triton 3.6's interpreter knows no range of tensors
        while start < end:
            grad = _add_rows(
                grad, g_ptr, x_ptr, source_ptr, start, end, o, i, OUT, IN, GATHERED_G, GATHERED_X, PRECISION, BK
            )
            start += BK
    else:  # a loop that the compiler pipelines
        for begin in range(start, end, BK):
            grad = _add_rows(
                grad, g_ptr, x_ptr, source_ptr, begin, end, o, i, OUT, IN, GATHERED_G, GATHERED_X, PRECISION, BK
            )
    grad_ptrs = grad_ptr + expert * OUT * IN + o[:, None] * IN + i[None, :]
    tl.store(grad_ptrs, grad.to(grad_ptr.dtype.element_ty), mask=(o < OUT)[:, None] & (i < IN)[None, :])


@triton.jit
def _counted(padding_ptr, t, num_tokens, PADDED: tl.constexpr):
    inside = t < num_tokens
    if PADDED:
        inside &= tl.load(padding_ptr + t, mask=inside, other=1) == 0
    return inside


@triton.jit
def softmax_sums(
    logits_ptr,
    experts_ptr,
    padding_ptr,
    log_partition_ptr,
    sums_ptr,
    num_tokens,
    top_k,
    E: tl.constexpr,
    E2: tl.constexpr,
    PADDED: tl.constexpr,
    BT: tl.constexpr,
):
    """Over a block of tokens, padding left out, sum each expert's softmax and choices, `log Z` squared, and tokens."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    e = tl.arange(0, E2)
    inside = _counted(padding_ptr, t, num_tokens, PADDED)
    logits_TE = tl.load(logits_ptr + t[:, None] * E + e[None, :], mask=inside[:, None] & (e < E)[None, :], other=0.0)
    logits_TE = tl.where((e < E)[None, :], logits_TE, -float("inf"))
    largest_T = tl.max(logits_TE, 1)
    exp_TE = tl.exp(logits_TE - largest_T[:, None])
    total_T = tl.sum(exp_TE, 1)
    log_partition_T = largest_T + tl.log(total_T)
    tl.store(log_partition_ptr + t, log_partition_T, mask=inside)
    softmax_TE = tl.where(inside[:, None], exp_TE / total_T[:, None], 0.0)
    chosen_E = tl.zeros((E2,), tl.float32)
    k = top_k * 0
    while k < top_k:
        expert_T = tl.load(experts_ptr + t * top_k + k, mask=inside, other=-1)
        chosen_E += tl.sum((expert_T[:, None] == e[None, :]).to(tl.float32), 0)
        k += 1
    row = sums_ptr + tl.program_id(0).to(tl.int64) * (2 * E + 2)
    tl.store(row + e, tl.sum(softmax_TE, 0), mask=e < E)
    tl.store(row + E + e, chosen_E, mask=e < E)
    tl.store(row + 2 * E, tl.sum(tl.where(inside, log_partition_T * log_partition_T, 0.0), 0))
    tl.store(row + 2 * E + 1, tl.sum(inside.to(tl.float32), 0))


@triton.jit
def _factors(chosen_E, tokens, E: tl.constexpr):
    """Return by how much the balance loss grows with the sum of each expert's softmax."""
    return chosen_E * (E / tl.maximum(tokens, 1.0) / tl.maximum(tl.sum(chosen_E, 0), 1.0))


@triton.jit(do_not_specialize=["num_parts"])
def softmax_losses(
    parts_ptr, sums_ptr, balance_ptr, z_ptr, num_parts, E: tl.constexpr, E2: tl.constexpr, BP: tl.constexpr
):
    """Add up the sums over blocks of tokens, and write them, the balance loss and the z-loss."""
    e = tl.arange(0, E2)
    softmax_E = tl.zeros((E2,), tl.float32)
    chosen_E = tl.zeros((E2,), tl.float32)
    squares_P = tl.zeros((BP,), tl.float32)
    tokens_P = tl.zeros((BP,), tl.float32)
    start = num_parts * 0
    while start < num_parts:
        part = start + tl.arange(0, BP)
        inside = part < num_parts
        row = parts_ptr + part.to(tl.int64) * (2 * E + 2)
        mask = inside[:, None] & (e < E)[None, :]
        softmax_E += tl.sum(tl.load(row[:, None] + e[None, :], mask=mask, other=0.0), 0)
        chosen_E += tl.sum(tl.load(row[:, None] + E + e[None, :], mask=mask, other=0.0), 0)
        squares_P += tl.load(row + 2 * E, mask=inside, other=0.0)
        tokens_P += tl.load(row + 2 * E + 1, mask=inside, other=0.0)
        start += BP
    squares, tokens = tl.sum(squares_P, 0), tl.sum(tokens_P, 0)
    tl.store(sums_ptr + e, softmax_E, mask=e < E)
    tl.store(sums_ptr + E + e, chosen_E, mask=e < E)
    tl.store(sums_ptr + 2 * E, squares)
    tl.store(sums_ptr + 2 * E + 1, tokens)
    tl.store(balance_ptr, tl.sum(softmax_E * _factors(chosen_E, tokens, E), 0))
    tl.store(z_ptr, squares / tl.maximum(tokens, 1.0))


@triton.jit
def softmax_losses_backward(
    logits_ptr,
    padding_ptr,
    log_partition_ptr,
    sums_ptr,
    grad_balance_ptr,
    grad_z_ptr,
    grad_ptr,
    num_tokens,
    E: tl.constexpr,
    E2: tl.constexpr,
    PADDED: tl.constexpr,
    BALANCE: tl.constexpr,
    Z_LOSS: tl.constexpr,
    BT: tl.constexpr,
):
    """Write the gradient of the logits, of either loss or of both; 0 for padding."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    e = tl.arange(0, E2)
    inside = _counted(padding_ptr, t, num_tokens, PADDED)
    mask = inside[:, None] & (e < E)[None, :]
    logits_TE = tl.load(logits_ptr + t[:, None] * E + e[None, :], mask=mask, other=-float("inf"))
    log_partition_T = tl.load(log_partition_ptr + t, mask=inside, other=0.0)
    softmax_TE = tl.exp(logits_TE - log_partition_T[:, None])
    tokens = tl.load(sums_ptr + 2 * E + 1)
    factor_E = _factors(tl.load(sums_ptr + E + e, mask=e < E, other=0.0), tokens, E)
    grad_TE = tl.zeros((BT, E2), tl.float32)
    if BALANCE:
        mean_T = tl.sum(softmax_TE * factor_E[None, :], 1)
        grad_TE += softmax_TE * (factor_E[None, :] - mean_T[:, None]) * tl.load(grad_balance_ptr)
    if Z_LOSS:
        grad_TE += softmax_TE * (log_partition_T * (2 * tl.load(grad_z_ptr) / tl.maximum(tokens, 1.0)))[:, None]
    mask = (t < num_tokens)[:, None] & (e < E)[None, :]
    tl.store(grad_ptr + t[:, None] * E + e[None, :], grad_TE, mask=mask)
