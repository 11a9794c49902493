"""Activations of experts, and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "sigmoid", "silu"]

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # CLIP's
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # Primer's (So et al. 2021)
    "sigmoid": torch.sigmoid,  # the gate of a plain GLU
    "silu": F.silu,
}

GRADIENTS: dict[Activation, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    "quick_gelu": lambda grad, x: torch.ops.aten.silu_backward(grad, 1.702 * x),
    "relu": lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0),
    "relu2": lambda grad, x: 2 * grad * F.relu(x),
    "sigmoid": lambda grad, x: torch.ops.aten.sigmoid_backward(grad, torch.sigmoid(x)),
    "silu": torch.ops.aten.silu_backward,
}
"""Of the value's gradient and the argument."""


def activated(z: Tensor, hidden_dim: int, activation: Activation) -> Tensor:
    """Return the hidden units of pre-activations `[..., hidden_dim]`, or gated `[..., 2 * hidden_dim]`, gate first."""
    if z.shape[-1] == hidden_dim:
        return ACTIVATIONS[activation](z)
    gate, up = z.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up
