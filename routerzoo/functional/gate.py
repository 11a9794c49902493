"""The gate's product, in one place: hidden states of any dtype in, float32 logits out."""
# Shape suffixes: T tokens, D model width, E experts.

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gate_linear(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """Return `x W^T + b` in float32, whatever the dtypes of its arguments; float64 where one of them is.

    A gate rounded to 16 bits decides near-ties at random.

    Args:
        x_TD: hidden states `[..., D]`.
        weight_ED: weights.
        bias_E: biases.

    Returns:
        `[..., E]`.
    """
    dtype = torch.float64 if torch.float64 in (x_TD.dtype, weight_ED.dtype) else torch.float32
    return F.linear(x_TD.to(dtype), weight_ED.to(dtype), None if bias_E is None else bias_E.to(dtype))


def at_least_float32(x_TD: Tensor) -> Tensor:
    """Return hidden states in float32, in float64 where they are, for routers that compute more than a product."""
    return x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
