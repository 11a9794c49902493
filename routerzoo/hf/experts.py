"""The experts of released models, without a copy of their weights."""
# Shape suffixes: N rows sorted by expert, E experts, D model width, H hidden width, Z width before the activation.

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers.integrations import moe as transformers_moe

from routerzoo.hf.architectures import Architecture
from routerzoo.moe.activations import ACTIVATIONS, Activation
from routerzoo.moe.experts import Experts, SwiGLUExperts
from routerzoo.moe.grouped_linear import grouped_linear
from routerzoo.routing import LayerSpec


@final
class _ReleasedExperts(Experts):
    """Experts of a released model that compute something else than `SwiGLUExperts`: clamped or interleaved ones.

    Weights have the names and the layout of transformers, and are the model's own. So is the function between the two
    products.

    Args:
        spec: sizes of the layer.
        bank: the module of transformers, left as it is.
        transposed: weights are stored `[num_experts, in, out]`.
    """

    def __init__(self, spec: LayerSpec, *, bank: nn.Module, transposed: bool) -> None:
        super().__init__(spec)
        self.transposed = transposed
        for name, parameter in bank.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        # Its function is called with what it holds beside weights: the activation, limits.
        self.function = copy.copy(bank)
        self.function._parameters = {}

    def forward(self, x_ND: Tensor, ends_E: Tensor) -> Tensor:
        """Compute each row with its expert."""
        function: Any = self.function
        z_NZ = self._product(x_ND, ends_E, "gate_up_proj")
        return self._product(_gated(function, z_NZ), ends_E, "down_proj")

    def _product(self, x_NI: Tensor, ends_E: Tensor, name: str) -> Tensor:
        weight_EOI = getattr(self, name)
        weight_EOI = weight_EOI.transpose(1, 2) if self.transposed else weight_EOI
        return grouped_linear(x_NI, weight_EOI, ends_E, getattr(self, f"{name}_bias", None), self.backend)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights as transformers does, N(0, 0.02); biases are 0."""
        for name, parameter in self.named_parameters():
            if not getattr(parameter, "_is_hf_initialized", False):
                parameter.zero_() if name.endswith("bias") else parameter.normal_(0, 0.02)


def experts_of(bank: nn.Module, spec: LayerSpec, architecture: Architecture) -> Experts:
    """Return experts that compute what a bank of transformers does, with the same parameters."""
    transposed = getattr(bank, "is_transposed", architecture.transposed)
    activation = None if transposed else _activation(bank)
    if activation is None:
        return _ReleasedExperts(spec, bank=bank, transposed=transposed)
    weights: Any = bank
    with torch.device("meta"):
        experts = SwiGLUExperts(spec, activation=activation, bias=bool(getattr(bank, "has_bias", False)))
    experts.gate_up, experts.down = weights.gate_up_proj, weights.down_proj
    if experts.gate_up_bias is not None:
        experts.gate_up_bias, experts.down_bias = weights.gate_up_proj_bias, weights.down_proj_bias
    return experts.train(bank.training)


def put_back(experts: Experts, bank: nn.Module) -> None:
    """Give a bank of transformers the weights of what `experts_of` made of one like it."""
    for name, _ in list(bank.named_parameters(recurse=False)):
        setattr(
            bank, name, getattr(experts, name if isinstance(experts, _ReleasedExperts) else name.replace("_proj", ""))
        )


def _gated(bank: Any, z_NZ: Tensor) -> Tensor:
    if hasattr(bank, "_apply_gate"):
        hidden_NH: Tensor = bank._apply_gate(z_NZ)
        return hidden_NH
    gate_NH, up_NH = z_NZ.chunk(2, dim=-1)  # Llama 4
    activated_NH: Tensor = bank.act_fn(gate_NH)
    return up_NH * activated_NH


def _activation(bank: Any) -> Activation | None:
    """Return the activation of a plain gated bank, None of any other."""
    plain = getattr(type(bank), "_apply_gate", None) is transformers_moe._default_apply_gate
    if not plain or not bank.has_gate or not bank.is_concatenated or getattr(bank, "has_post_expert_norm", False):
        return None
    return activation_of(bank.act_fn)


def activation_of(function: Callable[[Tensor], Tensor]) -> Activation | None:
    """Return what we call an activation function of transformers, None of one that we have not."""
    x = torch.linspace(-4, 4, 33, device="cpu", dtype=torch.float32)
    expected = function(x)
    return next((name for name, act in ACTIVATIONS.items() if torch.allclose(act(x), expected, atol=1e-6)), None)
