"""The experts of a MoE layer as one operator, which keeps the hidden states and the pre-activations alone.

Composed of separate operations, the layer keeps for its backward pass each assignment's hidden state, its hidden units
and its output, so that memory grows with k at equal FLOPs. Here the hidden states are gathered and the hidden units
computed again, and the gradient of a weight is `<dy, y> = <W_down^T dy, a>`, so that no output is kept (SonicMoE,
Guo et al. 2025, https://arxiv.org/abs/2512.14080): `T D + N Z` elements and the indices, whatever the granularity.
"""
# Shape suffixes: T tokens, N assignments (rows sorted by expert), E experts, D model width, H hidden width,
# Z width of the pre-activations (2 H where gated, else H), I input width, O output width.

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from routerzoo.moe.activations import ACTIVATIONS, GRADIENTS, Activation, activated
from routerzoo.moe.grouped_linear import (
    compute_capability,
    grouped_linear,
    grouped_refuses,
    multiply,
    rows_of_16_bytes,
    weight_grad,
)
from routerzoo.moe.permute import sum_bags
from routerzoo.moe.rows import Order, Rows, place_rows

HAS_TRITON = find_spec("triton") is not None
"""Whether Triton is installed; torch brings it on Linux."""

Means = Literal["torch", "hybrid", "triton"]
"""How it is computed: on a CPU by torch; on a GPU with torch's grouped product, or without."""


class Assigned(NamedTuple):
    """What a bank needs beside hidden states to return sums by token."""

    order: Order
    weight_N: Tensor
    means: Means


class FeedForward(NamedTuple):
    """The weights of a bank of two-layer networks: `W_down act(W_up x + b_up) + b_down`.

    Where gated, the first map has two halves: `act(gate) * up`.
    """

    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    activation: Activation
    dropout: float

    @property
    def hidden_dim(self) -> int:
        """Width of the hidden units."""
        return self.down.shape[2]


def apply_low_memory(x_TD: Tensor, assigned: Assigned, network: FeedForward) -> Tensor:
    """Return the weighted sum of each token's experts, `[T, D]`, in the autocast dtype where autocast is on.

    Args:
        x_TD: hidden states.
        assigned: the assignments, sorted by expert, and the weight of each, in the order of tokens.
        network: the bank's weights; its dropout is that of now.
    """
    (expert_N, order_N, begin_T, top_k), weight_N, means = assigned
    device_type = x_TD.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x_TD.dtype
    if len(x_TD) == 0 or len(order_N) == 0:
        return (x_TD * 0.0).to(dtype)
    seed = torch.randint(2**31, (), device=x_TD.device) if network.dropout > 0 else None
    tensors = (x_TD, weight_N, network.up, network.up_bias, network.down, network.down_bias)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    out_TD: Tensor = _experts(
        *tensors,
        expert_N,
        order_N,
        begin_T,
        seed,
        top_k or 0,
        network.activation,
        network.dropout,
        dtype,
        means,
        keep,
    )[0]
    return out_TD


def means_for(x_TD: Tensor, network: FeedForward) -> Means | None:
    """Return how the low-memory form is computed for these tensors; None where it is not."""
    if x_TD.device.type == "cpu":
        return "torch"
    if x_TD.device.type != "cuda" or not HAS_TRITON:
        return None
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x_TD.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    capability = compute_capability(x_TD.device.index or 0)
    if dtype == torch.bfloat16 and 0 < capability < 8:
        return None  # Triton has no such products there
    if dtype != torch.bfloat16 or capability != 9:
        return "triton"  # elsewhere torch copies the ends to the host and multiplies expert by expert
    refused = any(grouped_refuses(x_TD, weight, dtype) for weight in (network.up, network.down))
    return "triton" if refused else "hybrid"


# One operator a pass: `torch.compile` takes them as they are, and no compiler decides what is kept.


@custom_op("routerzoo::experts", mutates_args=())
def _experts(
    x_TD: Tensor,
    weight_N: Tensor,
    up_EZD: Tensor,
    up_bias_EZ: Tensor | None,
    down_EDH: Tensor,
    down_bias_ED: Tensor | None,
    expert_N: Tensor,
    order_N: Tensor,
    begin_T: Tensor | None,
    seed: Tensor | None,
    top_k: int,
    activation: str,
    dropout: float,
    dtype: torch.dtype,
    means: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    compute = _parts(means)
    with torch.autocast(x_TD.device.type, enabled=False), on_device_of(x_TD):
        rows = compute.place_rows(Order(expert_N, order_N, begin_T, top_k or None), len(x_TD), len(down_EDH))
        x_TD, up_EZD, down_EDH = (rows_of_16_bytes(values.to(dtype)) for values in (x_TD, up_EZD, down_EDH))
        weight_N = weight_N.contiguous()
        up_bias_EZ, down_bias_ED = map(_contiguous, (up_bias_EZ, down_bias_ED))
        z_NZ = compute.product(x_TD, up_EZD, rows, gather=True)
        a_NH = compute.activate(z_NZ, up_bias_EZ, rows, down_EDH.shape[2], cast(Activation, activation), dropout, seed)
        y_ND = compute.product(a_NH, down_EDH, rows)
        del a_NH
        out_TD = compute.combine(y_ND, down_bias_ED, weight_N, rows, dtype)
    if not keep:
        return out_TD, z_NZ.new_empty(0), rows.order_N.new_empty(0)
    return out_TD, z_NZ, rows.order_N


def on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Make a tensor's GPU the current one, where Triton launches; of a tensor on a CPU, do nothing."""
    here: AbstractContextManager[None] = torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
    return here


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@_experts.register_fake
def _(x_TD, weight_N, up_EZD, *others):  # type: ignore[no-untyped-def]
    order_N, dtype, keep = others[4], others[10], others[12]
    num_kept = order_N.shape[0] if keep else 0
    kept = (num_kept, up_EZD.shape[1]) if keep else (0,)
    out_TD, z_NZ = x_TD.new_empty(x_TD.shape, dtype=dtype), x_TD.new_empty(kept, dtype=dtype)
    return out_TD, z_NZ, order_N.new_empty(num_kept, dtype=torch.int32)


@custom_op("routerzoo::experts_backward", mutates_args=())
def _experts_backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    weight_N: Tensor,
    up_EZD: Tensor,
    up_bias_EZ: Tensor | None,
    down_EDH: Tensor,
    down_bias_ED: Tensor | None,
    expert_N: Tensor,
    order_N: Tensor,
    begin_T: Tensor | None,
    seed: Tensor | None,
    z_NZ: Tensor,
    top_k: int,
    activation: str,
    dropout: float,
    means: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    compute, dtype = _parts(means), z_NZ.dtype
    dx_TD, dweight_N, dup_EZD, dup_bias_EZ, ddown_EDH, ddown_bias_ED = (grad_TD.new_empty(0) for _ in range(6))
    needs_x, needs_weight, needs_up, needs_up_bias, needs_down, needs_down_bias = needs
    with torch.autocast(x_TD.device.type, enabled=False), on_device_of(x_TD):
        rows = compute.place_rows(Order(expert_N, order_N, begin_T, top_k or None), len(x_TD), len(down_EDH))
        grad_TD = rows_of_16_bytes(grad_TD.to(dtype))
        weight_N = weight_N.contiguous()
        up_bias_EZ, down_bias_ED = map(_contiguous, (up_bias_EZ, down_bias_ED))
        grad, by_token = compute.gathered(grad_TD, rows)
        da_NH = compute.product(grad, rows_of_16_bytes(down_EDH.to(dtype)).mT, rows, gather=by_token)
        bias_part_TE = None
        if needs_weight and down_bias_ED is not None:
            bias_part_TE = grad_TD @ down_bias_ED.to(dtype).T
        dz_NZ, wa_NH, dweight_N = compute.activate_backward(
            da_NH, z_NZ, up_bias_EZ, weight_N, bias_part_TE, rows, cast(Activation, activation), dropout, seed
        )
        del da_NH
        if needs_down:
            ddown_EDH = compute.weight_grad(grad, wa_NH, rows, down_EDH.dtype, gather="g" if by_token else "")
        del wa_NH, grad
        if needs_up_bias or needs_down_bias:
            biases = up_bias_EZ if needs_up_bias else None, down_bias_ED if needs_down_bias else None
            dup_bias_EZ, ddown_bias_ED = compute.bias_grads(dz_NZ, grad_TD, weight_N, *biases, rows)
        if needs_up:
            dup_EZD = compute.weight_grad(dz_NZ, rows_of_16_bytes(x_TD.to(dtype)), rows, up_EZD.dtype, gather="x")
        if needs_x:
            dx_ND = compute.product(dz_NZ, rows_of_16_bytes(up_EZD.to(dtype)).mT, rows)
            dx_TD = compute.combine(dx_ND, None, None, rows, x_TD.dtype)
    return [dx_TD, dweight_N, dup_EZD, dup_bias_EZ, ddown_EDH, ddown_bias_ED]


@_experts_backward.register_fake
def _(grad_TD, x_TD, weight_N, up, up_bias, down, down_bias, *others):  # type: ignore[no-untyped-def]
    like = (x_TD, weight_N, up, up_bias, down, down_bias)
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if tensor is not None and (needed or tensor is weight_N)
        else grad_TD.new_empty(0)
        for tensor, needed in zip(like, others[-1], strict=True)
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, z_NZ, order_N = output  # the order in 32 bits
    ctx.save_for_backward(*inputs[:7], order_N, *inputs[8:10], z_NZ)
    ctx.options = inputs[10:15]
    ctx.mark_non_differentiable(z_NZ, order_N)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_TD: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, z_NZ = ctx.saved_tensors
    top_k, activation, dropout, _dtype, means = ctx.options
    needs = list(ctx.needs_input_grad[:6])
    if grad_TD is None:
        return (None,) * 16
    if torch.is_grad_enabled():
        grads: Sequence[Tensor | None] = _differentiable(grad_TD, tensors, needs, ctx.options)
    else:
        grads = _experts_backward(grad_TD, *tensors, z_NZ, top_k, activation, dropout, means, needs)
    return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), *(None,) * 10


_experts.register_autograd(_backward, setup_context=_setup)


# FLOPs of the products, two per multiply-add, as in `routerzoo.moe.grouped_linear`: a counter does not look inside an
# operator, and without these a run on a GPU would cost what it costs without experts.


def _num_rows(expert_N: Tensor, num_experts: int) -> int:
    """Return how many rows belong to an expert; all rows where a tensor without values cannot tell."""
    if type(expert_N) is not Tensor or expert_N.is_meta:
        return expert_N.shape[0]
    return int((expert_N < num_experts).sum())


@register_flop_formula(torch.ops.routerzoo.experts, get_raw=True)
def _experts_flops(
    x_TD: Tensor, weight_N: Tensor, up: Tensor, up_bias: Any, down: Tensor, down_bias: Any, *others: Any, **kwargs: Any
) -> int:
    size: int = up[0].numel() + down[0].numel()
    return 2 * _num_rows(others[0], len(up)) * size


@register_flop_formula(torch.ops.routerzoo.experts_backward, get_raw=True)
def _experts_backward_flops(
    grad_TD: Tensor,
    x_TD: Tensor,
    weight_N: Tensor,
    up: Tensor,
    up_bias: Any,
    down: Tensor,
    down_bias: Any,
    *others: Any,
    **kwargs: Any,
) -> int:
    needs_x, needs_weight, needs_up, _, needs_down, _ = others[-1]
    by_row: int = (needs_x + needs_up) * up[0].numel() + (1 + needs_down) * down[0].numel()
    by_token = down_bias.numel() if needs_weight and down_bias is not None else 0
    return 2 * (_num_rows(others[0], len(up)) * by_row + x_TD.shape[0] * by_token)


def _differentiable(
    grad_TD: Tensor, tensors: Sequence[Any], needs: Sequence[bool], options: tuple[Any, ...]
) -> list[Tensor | None]:
    """Return gradients that can be differentiated themselves: those of plain operations, computed again."""
    top_k, activation, dropout, dtype, _ = options
    # Views, so that the gradient of one holds nothing that comes by way of another: weights depend on hidden states.
    inputs: list[Any] = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors[:6]]
    x_TD, weight_N, up_EZD, up_bias_EZ, down_EDH, down_bias_ED = inputs
    expert_N, order_N, begin_T = tensors[6:9]
    rows = place_rows(Order(expert_N, order_N, begin_T, top_k or None), len(x_TD), len(down_EDH))
    if dropout > 0:
        raise NotImplementedError("gradients of gradients of experts with dropout: set dropout to 0")
    up, up_bias, down, down_bias = (
        None if tensor is None else tensor.to(dtype) for tensor in (up_EZD, up_bias_EZ, down_EDH, down_bias_ED)
    )
    assert up is not None
    assert down is not None
    z_NZ = grouped_linear(x_TD.to(dtype).index_select(0, rows.source_N), up, rows.ends_E, up_bias)
    a_NH = activated(z_NZ, down_EDH.shape[2], activation)
    y_ND = grouped_linear(a_NH, down, rows.ends_E, down_bias)
    real_N = rows.expert_N < len(rows.ends_E)
    weight_N1 = weight_N.to(dtype).index_select(0, rows.order_N).unsqueeze(1)
    y_ND = torch.where(real_N.unsqueeze(1), y_ND * weight_N1, 0)
    out_TD = torch.zeros_like(grad_TD).index_add(0, rows.source_N, y_ND)
    wanted = [tensor for tensor, needed in zip(inputs, needs, strict=True) if needed]
    grads = iter(torch.autograd.grad(out_TD, wanted, grad_TD, create_graph=True, allow_unused=True))
    return [next(grads) if needed else None for needed in needs]


# --- the parts on a CPU; `routerzoo.moe.kernel_calls` has them on a GPU ---


class _Torch:
    """The parts by torch's own operations."""

    place_rows = staticmethod(place_rows)

    @staticmethod
    def gathered(x_TD: Tensor, rows: Rows) -> tuple[Tensor, bool]:
        return x_TD.index_select(0, rows.source_N), False

    @staticmethod
    def product(x: Tensor, weight_EOI: Tensor, rows: Rows, *, gather: bool = False) -> Tensor:
        return multiply(x.index_select(0, rows.source_N) if gather else x, weight_EOI, rows.ends_E)

    @staticmethod
    def weight_grad(g: Tensor, x: Tensor, rows: Rows, dtype: torch.dtype, *, gather: str) -> Tensor:
        return weight_grad(g, x.index_select(0, rows.source_N) if gather == "x" else x, rows.ends_E).to(dtype)

    @staticmethod
    def activate(
        z_NZ: Tensor,
        bias_EZ: Tensor | None,
        rows: Rows,
        hidden_dim: int,
        activation: Activation,
        dropout: float,
        seed: Tensor | None,
    ) -> Tensor:
        a_NH = activated(_with_bias(z_NZ, bias_EZ, rows), hidden_dim, activation)
        return a_NH * _dropout_factor(a_NH, dropout, seed) if seed is not None else a_NH

    @staticmethod
    def activate_backward(
        da_NH: Tensor,
        z_NZ: Tensor,
        bias_EZ: Tensor | None,
        weight_N: Tensor,
        bias_part_TE: Tensor | None,
        rows: Rows,
        activation: Activation,
        dropout: float,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight_N1 = weight_N.index_select(0, rows.order_N).to(da_NH.dtype).unsqueeze(1)
        z_NZ = _with_bias(z_NZ, bias_EZ, rows)
        dz_NZ = torch.empty_like(z_NZ)
        factor_NH = _dropout_factor(da_NH, dropout, seed) if seed is not None else None
        gated = z_NZ.shape[1] > da_NH.shape[1]
        gate_NH, up_NH = z_NZ.chunk(2, dim=-1) if gated else (z_NZ, None)
        dgate_NH, dup_NH = dz_NZ.chunk(2, dim=-1) if gated else (dz_NZ, None)
        value_NH = ACTIVATIONS[activation](gate_NH)
        a_NH = value_NH * up_NH if up_NH is not None else value_NH
        if factor_NH is not None:
            a_NH = a_NH * factor_NH
        dweight_N = (da_NH * a_NH).sum(1)
        if bias_part_TE is not None:
            num_experts = bias_part_TE.shape[1]
            places_N = rows.source_N.long() * num_experts + rows.expert_N.clamp_max(num_experts - 1)
            dweight_N += bias_part_TE.flatten().index_select(0, places_N)
        dweight_N[int(rows.ends_E[-1]) :] = 0
        dweight_N = dweight_N.index_select(0, rows.row_N).to(weight_N.dtype)
        da_NH = da_NH.mul_(weight_N1) if factor_NH is None else da_NH.mul_(weight_N1).mul_(factor_NH)
        if up_NH is not None and dup_NH is not None:
            torch.mul(da_NH, value_NH, out=dup_NH)
            da_NH = da_NH.mul_(up_NH)
        dgate_NH.copy_(GRADIENTS[activation](da_NH, gate_NH))
        return dz_NZ, a_NH.mul_(weight_N1), dweight_N

    @staticmethod
    def combine(
        y_ND: Tensor, bias_ED: Tensor | None, weight_N: Tensor | None, rows: Rows, dtype: torch.dtype
    ) -> Tensor:
        y_ND[int(rows.ends_E[-1]) :] = 0
        if bias_ED is not None:
            for expert, start, end in _segments(rows.ends_E):
                y_ND[start:end] += bias_ED[expert].to(y_ND.dtype)
        if rows.begin_T is not None:
            begin_T = rows.begin_T[:-1]
        else:
            assert rows.top_k is not None
            begin_T = torch.arange(rows.num_tokens, dtype=torch.int32) * rows.top_k
        return sum_bags(y_ND, rows.row_N, begin_T, None if weight_N is None else weight_N.to(y_ND.dtype)).to(dtype)

    @staticmethod
    def bias_grads(
        dz_NZ: Tensor,
        grad_TD: Tensor,
        weight_N: Tensor,
        up_bias_EZ: Tensor | None,
        down_bias_ED: Tensor | None,
        rows: Rows,
    ) -> tuple[Tensor, Tensor]:
        dup_bias_EZ, ddown_bias_ED = grad_TD.new_empty(0), grad_TD.new_empty(0)
        if up_bias_EZ is not None:
            dup_bias_EZ = _column_sums(dz_NZ, up_bias_EZ, rows)
        if down_bias_ED is not None:
            grad_ND = grad_TD.index_select(0, rows.source_N)
            grad_ND.mul_(weight_N.index_select(0, rows.order_N).to(grad_ND.dtype).unsqueeze(1))
            ddown_bias_ED = _column_sums(grad_ND, down_bias_ED, rows)
        return dup_bias_EZ, ddown_bias_ED


def _column_sums(g_NC: Tensor, bias_EC: Tensor, rows: Rows) -> Tensor:
    sums_EC = torch.zeros_like(bias_EC)
    for expert, start, end in _segments(rows.ends_E):
        torch.sum(g_NC[start:end], 0, dtype=bias_EC.dtype, out=sums_EC[expert])
    return sums_EC


def _segments(ends_E: Tensor) -> list[tuple[int, int, int]]:
    ends = [0, *ends_E.tolist()]
    return [(e, ends[e], ends[e + 1]) for e in range(len(ends_E)) if ends[e + 1] > ends[e]]


def _with_bias(z_NZ: Tensor, bias_EZ: Tensor | None, rows: Rows) -> Tensor:
    if bias_EZ is None:
        return z_NZ
    return z_NZ + bias_EZ.to(z_NZ.dtype).index_select(0, rows.expert_N.int().clamp_max(len(bias_EZ) - 1))


def _dropout_factor(like: Tensor, probability: float, seed: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(int(seed))
    return torch.empty_like(like).bernoulli_(1 - probability, generator=generator).div_(1 - probability)


class _Hybrid:
    """torch's grouped product, and kernels between."""

    gathered = _Torch.gathered

    @staticmethod
    def product(x: Tensor, weight_EOI: Tensor, rows: Rows, *, gather: bool = False) -> Tensor:
        x = x.index_select(0, rows.source_N) if gather else x
        return F.grouped_mm(x, weight_EOI.transpose(1, 2), offs=rows.ends_E)

    @staticmethod
    def weight_grad(g: Tensor, x: Tensor, rows: Rows, dtype: torch.dtype, *, gather: str) -> Tensor:
        x = x.index_select(0, rows.source_N) if gather == "x" else x
        return F.grouped_mm(g.T, x, offs=rows.ends_E).to(dtype)


def _parts(means: str) -> Any:
    if means == "torch":
        return _Torch
    from routerzoo.moe import kernel_calls  # Triton takes long to import, and is not everywhere

    return kernel_calls if means == "triton" else _hybrid(kernel_calls)


@cache
def _hybrid(kernel_calls: ModuleType) -> type:
    between = ("place_rows", "activate", "activate_backward", "combine", "bias_grads")
    return type("_HybridParts", (_Hybrid,), {name: staticmethod(getattr(kernel_calls, name)) for name in between})
