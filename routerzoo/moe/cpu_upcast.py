"""`Widening`: products of 16-bit matrices on a CPU that has no instructions for them, computed in float32.

torch emulates such instructions, or does without vectors: on a core with AVX-512 alone a bfloat16 product takes two to
four times as long as both conversions and the float32 product together, a float16 one up to a hundred times
(`benchmarks/results/layer.md`). The sums are float32's either way, and the result is rounded once.
"""
# Shape suffixes: M rows, I input width, O output width.

from __future__ import annotations

import platform
from functools import partial

import torch
from torch import Tensor

FEWEST_ROWS = {torch.bfloat16: 4, torch.float16: 2}
"""With fewer rows of an expert converting its weight takes longer than the product that torch has."""
FEWEST_ROWS_PER_EXPERT = {torch.bfloat16: 6, torch.float16: 0}
"""With fewer rows in the mean torch's grouped product takes no longer."""
CHUNK = 256
"""Rows that are converted at a time: they stay in the cache, and no copy of all rows is made."""


def _without_instructions() -> frozenset[torch.dtype]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    float16 = torch.cpu._is_amx_fp16_supported()
    return frozenset(dtype for dtype, has in ((torch.bfloat16, bfloat16), (torch.float16, float16)) if not has)


# Asked once: a compiler follows a look-up, but no question to the processor.
WIDENED = _without_instructions()


def widens(device_type: str, dtype: torch.dtype) -> bool:
    """Whether products of such tensors are widened here."""
    return device_type == "cpu" and dtype in WIDENED


class Widening:
    """Products of one grouped map. It keeps its float32 memory from expert to expert.

    Args:
        weight_OI: one of the weights, for its shape and layout.
        most_rows: rows of the expert that has the most.
    """

    def __init__(self, weight_OI: Tensor, most_rows: int) -> None:
        self.dtype = weight_OI.dtype
        # The weights may be a transposed view; their copy has the same layout.
        self._transposed = weight_OI.stride(-1) != 1
        out_width, in_width = weight_OI.shape
        rows = min(most_rows, CHUNK)
        # Named, since the caller may have another default dtype or device.
        wide = partial(weight_OI.new_empty, dtype=torch.float32)
        self._weight = wide(weight_OI.T.shape if self._transposed else weight_OI.shape)
        self._x_MI, self._y_MO = wide((rows, in_width)), wide((rows, out_width))

    def takes(self, num_rows: int) -> bool:
        """Whether it pays for so many rows."""
        return num_rows >= FEWEST_ROWS[self.dtype]

    def multiply(self, x_MI: Tensor, weight_OI: Tensor, y_MO: Tensor) -> None:
        """Write `x_MI @ weight_OI.T`."""
        self._weight.copy_(weight_OI.T if self._transposed else weight_OI)
        weight_IO = self._weight if self._transposed else self._weight.T
        for begin in range(0, len(x_MI), CHUNK):
            rows = slice(begin, begin + CHUNK)
            wide_x = _widened(x_MI[rows], self._x_MI)
            y_MO[rows] = torch.mm(wide_x, weight_IO, out=self._y_MO[: len(wide_x)])

    def weight_grad(self, grad_MO: Tensor, x_MI: Tensor, grad_OI: Tensor) -> None:
        """Write `grad_MO.T @ x_MI`."""
        for begin in range(0, len(x_MI), CHUNK):
            rows = slice(begin, begin + CHUNK)
            wide_grad, wide_x = _widened(grad_MO[rows], self._y_MO), _widened(x_MI[rows], self._x_MI)
            # With a beta of 0, what the memory held before does not count.
            self._weight.addmm_(wide_grad.T, wide_x, beta=min(begin, 1))
        grad_OI.copy_(self._weight)


def _widened(rows: Tensor, memory: Tensor) -> Tensor:
    return memory[: len(rows)].copy_(rows)
