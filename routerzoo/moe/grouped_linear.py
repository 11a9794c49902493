"""`grouped_linear`: one linear map per expert, over rows sorted by expert. The backends differ in speed only."""
# Shape suffixes: N rows sorted by expert, E experts, I input width, O output width.

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import flop_registry, register_flop_formula

from routerzoo.functional.ragged import add_by_index
from routerzoo.functional.transforms import in_transform
from routerzoo.moe.cpu_upcast import FEWEST_ROWS_PER_EXPERT, Widening, widens

Backend = Literal["auto", "grouped", "loop", "reference"]
BACKENDS: tuple[str, ...] = get_args(Backend)


def grouped_linear(
    x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor, bias_EO: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    """Multiply each row with the weights of the expert that it belongs to.

    Args:
        x_NI: rows sorted by expert. Rows from `ends_E[-1]` on belong to none; their result is unspecified.
        weight_EOI: weights of all experts, laid out as in `torch.nn.Linear`.
        ends_E: int32, where each expert's rows end: the running sum of the number of rows.
        bias_EO: added to each row, where given.
        backend: `auto` chooses by device, dtype and shape.

            - `grouped`: `torch.nn.functional.grouped_mm`, no host synchronization.
            - `loop`: one product per expert that has rows, into preallocated memory; any device and dtype. Products of
              16 bits are computed in float32 where the CPU has no instructions for them (`routerzoo.moe.cpu_upcast`).
            - `reference`: indexes the weights in a loop under plain autograd. Slow (its backward allocates the whole
              weight gradient once per expert); what the others are tested against.

    Returns:
        `[N, O]`, in the autocast dtype where autocast is on.

    Raises:
        ValueError: an unknown backend, or one that cannot take these tensors.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if torch.is_autocast_enabled(x_NI.device.type):
        # Autocast does not know grouped products.
        dtype = torch.get_autocast_dtype(x_NI.device.type)
        x_NI, weight_EOI = x_NI.to(dtype), weight_EOI.to(dtype)
        bias_EO = None if bias_EO is None else bias_EO.to(dtype)
    if backend == "auto":
        backend = _choose(x_NI, weight_EOI)
    elif backend == "grouped" and (reason := grouped_refuses(x_NI, weight_EOI)):
        raise ValueError(f"backend 'grouped' cannot take this: {reason}; use 'loop' or 'auto'")
    y_NO = _FUNCTIONS[backend](x_NI, weight_EOI, ends_E)
    if bias_EO is None:
        return y_NO
    if x_NI.device.type == "cpu" and not torch.compiler.is_compiling() and not in_transform():
        added: Tensor = _BiasBySegment.apply(y_NO, bias_EO, ends_E)
        return added
    if x_NI.device.type == "cuda" and not torch.compiler.is_exporting():
        by_row: Tensor = _BiasByRow.apply(bias_EO, _expert_of_row(ends_E, x_NI.shape[0]))
        return y_NO + by_row
    return y_NO + _per_row(bias_EO, ends_E, x_NI.shape[0])


def multiply(x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Return `grouped_linear` without biases and without gradients, by the backend that `auto` chooses."""
    return _FUNCTIONS[_choose(x_NI, weight_EOI)](x_NI, weight_EOI, ends_E)


def weight_grad(grad_NO: Tensor, x_NI: Tensor, ends_E: Tensor) -> Tensor:
    """Return the gradient of the weights of a `grouped_linear`, `[E, O, I]`, likewise."""
    sizes_EOI = x_NI.new_empty(ends_E.shape[0], grad_NO.shape[1], x_NI.shape[1], device="meta")
    grad_EOI: Tensor
    if _choose(x_NI, sizes_EOI) == "grouped":
        grad_NO, x_NI = rows_of_16_bytes(grad_NO), rows_of_16_bytes(x_NI)
        grad_EOI = torch.nn.functional.grouped_mm(grad_NO.T, x_NI, offs=ends_E)
    else:
        grad_EOI = _weight_grad(grad_NO, x_NI, ends_E)
    return grad_EOI


class _BiasBySegment(torch.autograd.Function):
    """Adds each expert's bias to its rows in place, so that no bias is written out for every row.

    Where the ends of the segments can be read without waiting for a device.
    """

    @staticmethod
    def forward(ctx: Any, y_NO: Tensor, bias_EO: Tensor, ends_E: Tensor) -> Tensor:
        ctx.ends = ends_E.tolist()
        ctx.mark_dirty(y_NO)
        for expert, start, end in _segments(ctx.ends):
            y_NO[start:end].add_(bias_EO[expert])
        return y_NO

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor, Tensor, None]:
        rows = {expert: grad_NO[start:end].sum(0) for expert, start, end in _segments(ctx.ends)}
        nothing_O = grad_NO.new_zeros(grad_NO.shape[1])
        return grad_NO, torch.stack([rows.get(expert, nothing_O) for expert in range(len(ctx.ends))]), None


def _segments(ends: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield expert, start and end of the rows of each expert that has any."""
    for expert, (start, end) in enumerate(itertools.pairwise([0, *ends])):
        if end > start:
            yield expert, start, end


def _expert_of_row(ends_E: Tensor, num_rows: int) -> Tensor:
    """Return the expert of each row; E for none."""
    rows = torch.arange(num_rows, device=ends_E.device, dtype=ends_E.dtype)
    return torch.searchsorted(ends_E, rows, right=True)


def _per_row(bias_EO: Tensor, ends_E: Tensor, num_rows: int) -> Tensor:
    return bias_EO.index_select(0, _expert_of_row(ends_E, num_rows).clamp_max(bias_EO.shape[0] - 1))


class _BiasByRow(torch.autograd.Function):
    """The bias of each row, whose gradient is summed in float32 and always in the same order."""

    @staticmethod
    def forward(bias_EO: Tensor, expert_N: Tensor) -> Tensor:
        return bias_EO.index_select(0, expert_N.clamp_max(bias_EO.shape[0] - 1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.num_experts, ctx.dtype = inputs[0].shape[0], inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor, None]:
        (expert_N,) = ctx.saved_tensors
        return add_by_index(grad_NO.float(), expert_N, ctx.num_experts + 1)[:-1].to(ctx.dtype), None


MOST_GROUPS = 1024


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def compute_capability(device: int) -> int:
    """Return the generation of an NVIDIA GPU: 8 for Ampere and Ada, 9 for Hopper, 10 for Blackwell; 0 of others."""
    if torch.version.hip is not None or not torch.cuda.is_available():  # none where tensors have no values
        return 0
    return torch.cuda.get_device_capability(device)[0]


# Up to this share of the experts in rows, visiting only experts that have rows wins on a CPU.
FEW_ROWS_PER_EXPERT = 1 / 8


def _choose(x_NI: Tensor, weight_EOI: Tensor) -> Backend:
    """Choose by what was measured; shapes, device and dtype decide, so that nothing is read back from a device.

    - `grouped` wherever torch has it. Over the benchmark's grid on a CPU in float32 it takes 0.97 of the time of `loop`
      in the median (`benchmarks/results/layer.md`), and on a GPU `loop` waits for the device.
    - `loop` elsewhere, and on a CPU for few rows, as when a decoder generates: `grouped` takes 1.7 to 2.0 times as long
      with 1 or 2 rows for 64 experts, 3.1 to 5.0 times with 1 or 2 for 256, is level at 8 to 16 rows for 64 and 16 to
      32 for 256, and takes 0.7 to 1.0 of the time of `loop` beyond. With 8 experts it is 0.7 to 1.1 throughout.
    - `loop` for 16-bit tensors on a CPU without instructions for them, where it computes in float32: in bfloat16 both
      passes take 1.1 of the time of `grouped` with 4 rows for each expert in the mean, 0.8 to 0.9 with 8, 0.6 to 0.7
      with 16, 0.5 to 0.6 with 32, 0.4 with 512.
    """
    if grouped_refuses(x_NI, weight_EOI):
        return "loop"
    if torch.compiler.is_compiling():  # the number of rows may be a symbol, which a comparison would pin down
        return "grouped"
    rows, num_experts = x_NI.shape[0], weight_EOI.shape[0]
    few = x_NI.device.type == "cpu" and rows <= FEW_ROWS_PER_EXPERT * num_experts
    wider = widens(x_NI.device.type, x_NI.dtype) and rows >= FEWEST_ROWS_PER_EXPERT[x_NI.dtype] * num_experts
    return "loop" if few or wider else "grouped"


def grouped_refuses(x_NI: Tensor, weight_EOI: Tensor, dtype: torch.dtype | None = None) -> str:
    """Say why torch's grouped product cannot take these tensors; empty where it can.

    Args:
        x_NI: rows.
        weight_EOI: weights.
        dtype: that both will be converted to; by default that of the rows.
    """
    dtype = x_NI.dtype if dtype is None else dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"torch has no grouped product in {dtype}"
    if x_NI.device.type == "cuda" and dtype != torch.bfloat16:
        return "on CUDA torch's grouped product is bfloat16 only"
    if x_NI.device.type == "cuda" and len(weight_EOI) >= MOST_GROUPS:
        return f"on CUDA torch's grouped product takes fewer than {MOST_GROUPS} experts"
    if x_NI.device.type == "cuda" and compute_capability(x_NI.device.index or 0) == 10:
        # pytorch/pytorch#172439: weights of experts without rows get the gradients that the memory happened to hold.
        return "on GPUs of compute capability 10 torch's grouped product is wrong for experts without rows"
    if x_NI.device.type not in ("cpu", "cuda"):
        return f"torch has no grouped product on {x_NI.device.type}"
    if torch.compiler.is_compiling() and dtype != torch.bfloat16:
        return "torch compiles its grouped product in bfloat16 only"
    if any(width * dtype.itemsize % 16 for width in weight_EOI.shape[1:]):
        return f"rows must be multiples of 16 bytes, widths are {list(weight_EOI.shape[1:])}"
    if not torch.compiler.is_compiling() and x_NI.shape[0] == 0:
        return "there are no rows"
    return ""


def _grouped(x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    if not weight_EOI.mT.is_contiguous():  # a transposed bank is taken as it is
        weight_EOI = rows_of_16_bytes(weight_EOI)
    y_NO = torch.nn.functional.grouped_mm(rows_of_16_bytes(x_NI), weight_EOI.mT, offs=ends_E)
    with_rows: Tensor = _GradientWithRows.apply(y_NO)
    return with_rows


def rows_of_16_bytes(tensor: Tensor) -> Tensor:
    """Lay a tensor out as torch's grouped product takes it; a sum's gradient, for one, is a single number expanded."""
    tensor = tensor.contiguous()
    if torch.compiler.is_compiling():  # a compiler follows no offset into memory
        return tensor
    return tensor.clone() if tensor.storage_offset() * tensor.element_size() % 16 else tensor


class _GradientWithRows(torch.autograd.Function):
    """Hands on a grouped product, and to its backward pass a gradient that it takes."""

    @staticmethod
    def forward(y_NO: Tensor) -> Tensor:
        return y_NO

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.mark_dirty(output)  # so that it is no view, and biases can be added in place

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> Tensor:
        return rows_of_16_bytes(grad_NO)


def _reference(x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    ends = [0, *ends_E.tolist()]
    parts = [x_NI[ends[e] : ends[e + 1]] @ weight_EOI[e].T for e in range(weight_EOI.shape[0])]
    parts.append(x_NI.new_zeros(x_NI.shape[0] - ends[-1], weight_EOI.shape[1]))
    return torch.cat(parts)


def _widening(x_NI: Tensor, weight_EOI: Tensor, ends: list[int]) -> Widening | None:
    # Of two dtypes, the product that torch has complains.
    if x_NI.dtype != weight_EOI.dtype or not widens(x_NI.device.type, x_NI.dtype):
        return None
    return Widening(weight_EOI[0], max(end - start for start, end in itertools.pairwise([0, *ends])))


# Custom operators, so that `torch.compile` takes the loops as they are: their trip counts depend on data. They wait for
# a GPU, which no CUDA graph can.


@custom_op("routerzoo::grouped_matmul", mutates_args=(), tags=[torch.Tag.cudagraph_unsafe])
def _matmul(x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    y_NO = x_NI.new_empty(x_NI.shape[0], weight_EOI.shape[1])
    ends = ends_E.tolist()
    widening = _widening(x_NI, weight_EOI, ends)
    for expert, start, end in _segments(ends):
        if widening is not None and widening.takes(end - start):
            widening.multiply(x_NI[start:end], weight_EOI[expert], y_NO[start:end])
            continue
        torch.mm(x_NI[start:end], weight_EOI[expert].T, out=y_NO[start:end])
    y_NO[ends[-1] :] = 0
    return y_NO


@_matmul.register_fake
def _(x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return x_NI.new_empty(x_NI.shape[0], weight_EOI.shape[1])


@custom_op("routerzoo::grouped_weight_grad", mutates_args=(), tags=[torch.Tag.cudagraph_unsafe])
def _weight_grad(grad_NO: Tensor, x_NI: Tensor, ends_E: Tensor) -> Tensor:
    grad_EOI = x_NI.new_empty(ends_E.shape[0], grad_NO.shape[1], x_NI.shape[1])
    ends = ends_E.tolist()
    widening = _widening(x_NI, grad_EOI, ends)
    start = 0
    for e, end in enumerate(ends):
        if widening is not None and widening.takes(end - start):
            widening.weight_grad(grad_NO[start:end], x_NI[start:end], grad_EOI[e])
        elif end > start:
            torch.mm(grad_NO[start:end].T, x_NI[start:end], out=grad_EOI[e])
        else:
            grad_EOI[e] = 0
        start = end
    return grad_EOI


@_weight_grad.register_fake
def _(grad_NO: Tensor, x_NI: Tensor, ends_E: Tensor) -> Tensor:
    return x_NI.new_empty(ends_E.shape[0], grad_NO.shape[1], x_NI.shape[1])


def _save_inputs(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _matmul_backward(ctx, grad_NO: Tensor):  # type: ignore[no-untyped-def]
    x_NI, weight_EOI, ends_E = ctx.saved_tensors
    grad_NO = grad_NO.contiguous()
    grad_x = _matmul(grad_NO, weight_EOI.transpose(1, 2), ends_E) if ctx.needs_input_grad[0] else None
    grad_weight = _weight_grad(grad_NO, x_NI, ends_E) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, None


def _weight_grad_backward(ctx, grad_EOI: Tensor):  # type: ignore[no-untyped-def]
    grad_NO, x_NI, ends_E = ctx.saved_tensors
    return _matmul(x_NI, grad_EOI, ends_E), _matmul(grad_NO, grad_EOI.transpose(1, 2), ends_E), None


_matmul.register_autograd(_matmul_backward, setup_context=_save_inputs)
_weight_grad.register_autograd(_weight_grad_backward, setup_context=_save_inputs)

# FLOPs of the grouped products, two per multiply-add, for `torch.utils.flop_counter.FlopCounterMode`.


def num_rows(ends_E: Tensor, rows: int) -> int:
    """Return how many rows belong to an expert; all rows where a tensor without values cannot tell."""
    return int(ends_E[-1]) if type(ends_E) is Tensor and not ends_E.is_meta else rows


@register_flop_formula(torch.ops.routerzoo.grouped_matmul, get_raw=True)
def _matmul_flops(x_NI: Tensor, weight_EOI: Tensor, ends_E: Tensor, **kwargs: Any) -> int:
    return 2 * num_rows(ends_E, x_NI.shape[0]) * weight_EOI.shape[1] * weight_EOI.shape[2]


@register_flop_formula(torch.ops.routerzoo.grouped_weight_grad, get_raw=True)
def _weight_grad_flops(grad_NO: Tensor, x_NI: Tensor, ends_E: Tensor, **kwargs: Any) -> int:
    return 2 * num_rows(ends_E, x_NI.shape[0]) * grad_NO.shape[1] * x_NI.shape[1]


def _grouped_mm_flops(a: Tensor, b: Tensor, offs: Tensor | None = None, *args: Any, **kwargs: Any) -> int:
    m, k, n = *a.shape[-2:], b.shape[-1]
    if offs is None:
        return 2 * a.shape[0] * m * k * n
    # The groups divide the dimension that one operand has no batch for: rows, columns, or for two matrices the sum.
    if b.ndim == 3:
        m = num_rows(offs, m)
    elif a.ndim == 3:
        n = num_rows(offs, n)
    else:
        k = num_rows(offs, k)
    return 2 * m * k * n


if torch.ops.aten._grouped_mm not in flop_registry:  # torch 2.15 has no formula for it
    register_flop_formula(torch.ops.aten._grouped_mm, get_raw=True)(_grouped_mm_flops)

_FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "grouped": _grouped,
    "loop": _matmul,
    "reference": _reference,
}
