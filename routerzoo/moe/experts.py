"""`Experts`: a bank of feed-forward networks whose weights are stacked over experts."""
# Shape suffixes: T tokens, N rows sorted by expert, E experts, D model width, H hidden width.

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routerzoo.functional.initialization import Reinitializable
from routerzoo.functional.transforms import in_transform
from routerzoo.moe.activations import ACTIVATIONS, Activation, activated
from routerzoo.moe.cpu_upcast import widens
from routerzoo.moe.grouped_linear import Backend, grouped_linear
from routerzoo.moe.low_memory import Assigned, FeedForward, apply_low_memory
from routerzoo.routing import LayerSpec


class LinearWeights(NamedTuple):
    """Weights of a linear map: `weight_OI`, and `bias_O` or None."""

    weight_OI: Tensor
    bias_O: Tensor | None


class FeedForwardWeights(NamedTuple):
    """A dense feed-forward network, for experts to start from.

    Args:
        up: the map into the hidden units.
        down: the map out of them.
        gate: of a gated network, the map that the activation follows; `up` is the other one.
        activation: the function between the maps.
    """

    up: LinearWeights
    down: LinearWeights
    gate: LinearWeights | None
    activation: Activation


class Experts(Reinitializable, ABC):
    """E feed-forward networks of the same shape.

    Weights are stacked, `[num_experts, ...]`: a step with a dead expert still gives every parameter a gradient, the
    optimizer sees a handful of tensors, and sharding over experts is sharding over dimension 0. A class of your own
    implements `forward` with `routerzoo.grouped_linear` and takes `(spec, *, its own keyword arguments)`. It reads the
    number of experts off its weights, not the spec: a router that merges experts calls it with as many as it merged.

    Args:
        spec: sizes of the layer.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.backend: Backend = "auto"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # As for routers: checkpoints made in Python name the class, and are read with weights_only=True.
        torch.serialization.add_safe_globals([cls])

    @abstractmethod
    def forward(self, x_ND: Tensor, ends_E: Tensor) -> Tensor:
        """Compute each row with its expert.

        Args:
            x_ND: hidden states, sorted by expert.
            ends_E: int32, where each expert's rows end. Rows after the last end belong to no expert.

        Returns:
            `[N, D]`, in the same order.
        """

    def upcycle_from(self, dense: FeedForwardWeights) -> None:
        """Start every expert from a dense feed-forward network's weights (sparse upcycling).

        Raises:
            NotImplementedError: this class has no counterpart of that network.
            ValueError: experts of another shape or function.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement upcycle_from")


class TwoLayerExperts(Experts):
    """Base class of the built-in experts: two linear maps, gated or not."""

    hidden_dim: int
    activation: Activation

    @abstractmethod
    def network(self) -> FeedForward:
        """Return the weights, and the dropout of now."""

    def forward(self, x_ND: Tensor, ends_E: Tensor | Assigned) -> Tensor:
        """Compute each row with its expert; where `Assigned` is in place of the ends, rows and results are tokens."""
        network = self.network()
        if isinstance(ends_E, Assigned):
            return apply_low_memory(x_ND, ends_E, network)
        z_NZ = grouped_linear(x_ND, network.up, ends_E, network.up_bias, self.backend)
        hidden_NH = F.dropout(_hidden_units(z_NZ, self.hidden_dim, self.activation), network.dropout)
        return grouped_linear(hidden_NH, network.down, ends_E, network.down_bias, self.backend)

    def one(self, expert: int, x_TD: Tensor) -> Tensor:
        """Return the output of one expert for every token."""
        up, up_bias, down, down_bias, activation, dropout = self.network()
        z_TZ = F.linear(x_TD, up[expert], None if up_bias is None else up_bias[expert])
        hidden_TH = F.dropout(_hidden_units(z_TZ, self.hidden_dim, activation), dropout)
        return F.linear(hidden_TH, down[expert], None if down_bias is None else down_bias[expert])

    def as_one(self, x_TD: Tensor) -> Tensor:
        """Return the sum of all experts' outputs: a dense network of their joint width."""
        network = self.network()
        num_experts, _, hidden_dim = network.down.shape
        halves = network.up.shape[1] // hidden_dim
        # Gates first, then the rest, as in one wide expert.
        up_ZD = network.up.view(num_experts, halves, hidden_dim, -1).transpose(0, 1).flatten(0, 2)
        up_bias_Z = network.up_bias
        if up_bias_Z is not None:
            up_bias_Z = up_bias_Z.view(num_experts, halves, hidden_dim).transpose(0, 1).flatten()
        hidden_TH = _hidden_units(_linear(x_TD, up_ZD, up_bias_Z), num_experts * hidden_dim, self.activation)
        hidden_TH = F.dropout(hidden_TH, network.dropout)
        down_DH = network.down.transpose(0, 1).flatten(1)
        return _linear(hidden_TH, down_DH, None if network.down_bias is None else network.down_bias.sum(0))

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"num_experts={self.spec.num_experts}, hidden_dim={self.hidden_dim}, activation={self.activation}"


@final
class MLPExperts(TwoLayerExperts):
    """Two linear maps with an activation between: `W_2 act(W_1 x + b_1) + b_2`.

    Args:
        spec: sizes of the layer.
        hidden_dim: width of each expert; by default the spec's, or else four times the model's.
        activation: the function between the maps.
        dropout: probability of dropping a hidden unit in training.
        bias: add b_1 and b_2.
    """

    def __init__(
        self,
        spec: LayerSpec,
        *,
        hidden_dim: int | None = None,
        activation: Activation = "gelu",
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__(spec)
        self.hidden_dim = _checked_width(hidden_dim, spec.hidden_dim or 4 * spec.d_model)
        self.activation = _checked_activation(activation)
        self.dropout = _checked_dropout(dropout)
        self.up = _stacked_weight(spec.num_experts, self.hidden_dim, spec.d_model)
        self.down = _stacked_weight(spec.num_experts, spec.d_model, self.hidden_dim)
        self.up_bias = nn.Parameter(torch.zeros(spec.num_experts, self.hidden_dim)) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(spec.num_experts, spec.d_model)) if bias else None

    def network(self) -> FeedForward:
        """Return the weights, and the dropout of now."""
        dropout = self.dropout if self.training else 0.0
        return FeedForward(self.up, self.up_bias, self.down, self.down_bias, self.activation, dropout)

    def upcycle_from(self, dense: FeedForwardWeights) -> None:
        """Copy the maps of a network without a gate into every expert."""
        if dense.gate is not None:
            raise NotImplementedError("MLPExperts have no gate, the dense network has one: take SwiGLUExperts")
        _require_activation(self.activation, dense.activation)
        _copy_to_all(self.up, self.up_bias, dense.up)
        _copy_to_all(self.down, self.down_bias, dense.down)


@final
class SwiGLUExperts(TwoLayerExperts):
    """Gated networks: `W_down (act(W_gate x) * W_up x)` (Shazeer 2020, https://arxiv.org/abs/2002.05202).

    Gate and up are one parameter, gate first, as in Mixtral's public weights.

    Args:
        spec: sizes of the layer.
        hidden_dim: width of each expert; by default the spec's, or else 8/3 of the model's, rounded up to a multiple
            of 8, so that the number of weights is that of an MLP four times as wide as the model.
        activation: the gate's function; silu makes it SwiGLU.
        dropout: probability of dropping a hidden unit in training.
        bias: give the three maps a bias.
    """

    def __init__(
        self,
        spec: LayerSpec,
        *,
        hidden_dim: int | None = None,
        activation: Activation = "silu",
        dropout: float = 0.0,
        bias: bool = False,
    ) -> None:
        super().__init__(spec)
        self.hidden_dim = _checked_width(hidden_dim, spec.hidden_dim or -(-8 * spec.d_model // 24) * 8)
        self.activation = _checked_activation(activation)
        self.dropout = _checked_dropout(dropout)
        self.gate_up = _stacked_weight(spec.num_experts, 2 * self.hidden_dim, spec.d_model)
        self.down = _stacked_weight(spec.num_experts, spec.d_model, self.hidden_dim)
        self.gate_up_bias = nn.Parameter(torch.zeros(spec.num_experts, 2 * self.hidden_dim)) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(spec.num_experts, spec.d_model)) if bias else None

    def network(self) -> FeedForward:
        """Return the weights, and the dropout of now."""
        dropout = self.dropout if self.training else 0.0
        return FeedForward(self.gate_up, self.gate_up_bias, self.down, self.down_bias, self.activation, dropout)

    def upcycle_from(self, dense: FeedForwardWeights) -> None:
        """Copy the maps of a gated network into every expert."""
        if dense.gate is None:
            raise NotImplementedError("SwiGLUExperts have a gate, the dense network has none: take MLPExperts")
        _require_activation(self.activation, dense.activation)
        half = self.hidden_dim
        bias = self.gate_up_bias
        _copy_to_all(self.gate_up[:, :half], None if bias is None else bias[:, :half], dense.gate)
        _copy_to_all(self.gate_up[:, half:], None if bias is None else bias[:, half:], dense.up)
        _copy_to_all(self.down, self.down_bias, dense.down)


EXPERTS: dict[str, type[MLPExperts] | type[SwiGLUExperts]] = {"MLPExperts": MLPExperts, "SwiGLUExperts": SwiGLUExperts}
"""The built-in classes by name."""


def _hidden_units(z_NZ: Tensor, hidden_dim: int, activation: Activation) -> Tensor:
    gated = z_NZ.shape[1] > hidden_dim
    eager = not torch.compiler.is_compiling() and not in_transform()
    if gated and activation == "silu" and z_NZ.device.type == "cpu" and eager:
        hidden_NH: Tensor = _SiluAndMul.apply(z_NZ)
        return hidden_NH
    return activated(z_NZ, hidden_dim, activation)


def _linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    if not widens(x_TI.device.type, x_TI.dtype):
        return F.linear(x_TI, weight_OI, bias_O)
    ends_E = torch.full((1,), len(x_TI), dtype=torch.int32)  # one expert, which the CPU computes in float32
    return grouped_linear(x_TI, weight_OI.unsqueeze(0), ends_E, None if bias_O is None else bias_O.unsqueeze(0))


class _SiluAndMul(torch.autograd.Function):
    """`silu(gate) * up`, whose gradient is written in place of a concatenation of two halves."""

    @staticmethod
    def forward(ctx: Any, gate_up_NH: Tensor) -> Tensor:
        gate_NH, up_NH = gate_up_NH.chunk(2, dim=-1)
        activated_NH = F.silu(gate_NH)
        ctx.save_for_backward(gate_up_NH, activated_NH)
        return activated_NH * up_NH

    @staticmethod
    def backward(ctx: Any, grad_NH: Tensor) -> Tensor:
        gate_up_NH, activated_NH = ctx.saved_tensors
        gate_NH, up_NH = gate_up_NH.chunk(2, dim=-1)
        if torch.is_grad_enabled():  # somebody differentiates the gradient
            sigmoid_NH = gate_NH.sigmoid()
            slope_NH = sigmoid_NH * (1 + gate_NH * (1 - sigmoid_NH))
            return torch.cat([grad_NH * up_NH * slope_NH, grad_NH * gate_NH * sigmoid_NH], dim=-1)
        grad_gate_up_NH = torch.empty_like(gate_up_NH)
        grad_gate_NH, grad_up_NH = grad_gate_up_NH.chunk(2, dim=-1)
        torch.mul(grad_NH, activated_NH, out=grad_up_NH)
        torch.mul(grad_NH, up_NH, out=grad_gate_NH)
        torch.ops.aten.silu_backward.grad_input(grad_gate_NH, gate_NH, grad_input=grad_gate_NH)
        return grad_gate_up_NH


def _stacked_weight(num_experts: int, out_features: int, in_features: int) -> nn.Parameter:
    # Each expert starts as a `torch.nn.Linear` would.
    bound = in_features**-0.5
    return nn.Parameter(torch.empty(num_experts, out_features, in_features).uniform_(-bound, bound))


def _checked_width(hidden_dim: int | None, default: int) -> int:
    hidden_dim = default if hidden_dim is None else hidden_dim
    if hidden_dim < 1:
        raise ValueError(f"hidden_dim must be at least 1, got {hidden_dim}")
    return hidden_dim


def _checked_activation(activation: Activation) -> Activation:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return activation


def _checked_dropout(dropout: float) -> float:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    return dropout


def _require_activation(own: Activation, dense: Activation) -> None:
    if own != dense:
        raise ValueError(f"the dense network's activation is {dense}, the experts' {own}: set activation={dense!r}")


@torch.no_grad()
def _copy_to_all(weight_EOI: Tensor, bias_EO: Tensor | None, dense: LinearWeights) -> None:
    weight_OI, bias_O = dense
    if weight_EOI.shape[1:] != weight_OI.shape:
        raise ValueError(
            f"an expert's weights are {list(weight_EOI.shape[1:])}, the dense network's {list(weight_OI.shape)}: "
            "to start from a dense network, leave hidden_dim to it"
        )
    if bias_EO is None and bias_O is not None:
        raise ValueError("the dense network has biases: to start from it, give the experts bias=True")
    weight_EOI.copy_(weight_OI.expand_as(weight_EOI))
    if bias_EO is not None:
        bias_EO.copy_(torch.zeros_like(bias_EO) if bias_O is None else bias_O.expand_as(bias_EO))
