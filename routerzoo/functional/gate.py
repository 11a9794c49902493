"""The gate's product, in one place: hidden states of any dtype in, float32 logits out."""
# Shape suffixes: T tokens, D model width, E experts, M rows, N columns, I inner width.

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def gate_linear(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """Return `x W^T + b` in float32, whatever the dtypes of its arguments; float64 where one of them is.

    A gate rounded to 16 bits decides near-ties at random. Hidden states of 16 bits are kept for the backward pass as
    they are. On a GPU, bfloat16 ones are multiplied on tensor cores; see `three_part_product`.

    Args:
        x_TD: hidden states `[..., D]`.
        weight_ED: weights.
        bias_E: biases.

    Returns:
        `[..., E]`.
    """
    dtype = torch.float64 if torch.float64 in (x_TD.dtype, weight_ED.dtype) else torch.float32
    bias_E = None if bias_E is None else bias_E.to(dtype)
    if dtype == torch.float64 or x_TD.element_size() >= 4 or torch.compiler.is_exporting():
        return F.linear(x_TD.to(dtype), weight_ED.to(dtype), bias_E)
    logits_TE: Tensor = _NarrowProduct.apply(x_TD.reshape(-1, x_TD.shape[-1]), weight_ED.to(dtype))
    logits_TE = logits_TE.view(*x_TD.shape[:-1], len(weight_ED))
    return logits_TE if bias_E is None else logits_TE + bias_E


def at_least_float32(x_TD: Tensor) -> Tensor:
    """Return hidden states in float32, in float64 where they are, for routers that compute more than a product."""
    return x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))


class _NarrowProduct(torch.autograd.Function):
    """`x W^T` of 16-bit hidden states and float32 weights; no float32 copy of the hidden states is kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        if _on_tensor_cores(x_TD, weight_ED):
            return three_part_product(x_TD, weight_ED.T)
        return F.linear(x_TD.float(), weight_ED)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TD, weight_ED = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        if _on_tensor_cores(x_TD, weight_ED) and not torch.is_grad_enabled():
            grad_x = torch.mm(*_two_parts(grad_TE, weight_ED)) if needs_x else None
            return grad_x, three_part_product(x_TD.T, grad_TE).T if needs_weight else None
        grad_x = (grad_TE @ weight_ED).to(x_TD.dtype) if needs_x else None
        return grad_x, grad_TE.T @ x_TD.float() if needs_weight else None


FEWEST_PRODUCTS = 2**28
"""Fewer multiplications take no longer in float32 than what splitting launches (by count, not measured)."""


def _on_tensor_cores(x_TD: Tensor, weight_ED: Tensor) -> bool:
    narrow = x_TD.dtype == torch.bfloat16 and x_TD.device.type == "cuda"
    return narrow and x_TD.numel() * weight_ED.shape[0] >= FEWEST_PRODUCTS


def three_part_product(narrow_MI: Tensor, wide_IN: Tensor) -> Tensor:
    """Return the product of a bfloat16 and a float32 matrix in float32, nearly as exact as float32's, on tensor cores.

    A float32 number is the sum of three of bfloat16, whose 8 bits each make up its 24: three products, summed in
    float32, in one call.
    """
    parts_I3N = torch.stack(_parts(wide_IN, 3), dim=1)
    product_M3N = _wide_product(narrow_MI, parts_I3N.flatten(1)).view(len(narrow_MI), 3, -1)
    return product_M3N.sum(1)


def _two_parts(grad_TE: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    """Return two matrices whose product is that of these to bfloat16's precision: what is left out is below 2^-16."""
    (grad, grad_rest), (weight, weight_rest) = _parts(grad_TE, 2), _parts(weight_ED, 2)
    return torch.cat([grad, grad, grad_rest], dim=1), torch.cat([weight, weight_rest, weight])


def _parts(wide: Tensor, count: int) -> list[Tensor]:
    parts: list[Tensor] = []
    for _ in range(count):
        parts.append(wide.bfloat16())
        wide = wide - parts[-1]
    return parts


def _wide_product(a_MI: Tensor, b_IN: Tensor) -> Tensor:
    if a_MI.device.type == "cuda":
        return torch.mm(a_MI, b_IN, out_dtype=torch.float32)
    return a_MI.float() @ b_IN.float()  # the same sums, elsewhere
