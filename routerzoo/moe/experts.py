"""`Experts`: a bank of feed-forward networks whose weights are stacked over experts."""
# Shape suffixes: T tokens, N rows sorted by expert, E experts, D model width, H hidden width.

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routerzoo.functional.initialization import Reinitializable
from routerzoo.moe.grouped_linear import Backend, grouped_linear
from routerzoo.moe.low_memory import Assigned, FeedForward, apply_low_memory
from routerzoo.routing import LayerSpec

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


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

    def upcycle_from(self, dense: nn.Module) -> None:
        """Start every expert from a dense feed-forward network's weights (sparse upcycling).

        Raises:
            NotImplementedError: this class has no counterpart of that network.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot start from the weights of a {type(dense).__name__}")


@final
class MLPExperts(Experts):
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

    def forward(self, x_ND: Tensor, ends_E: Tensor, assigned: Assigned | None = None) -> Tensor:
        """Compute each row with its expert; with `assigned`, rows are tokens, and so are the results."""
        if assigned is not None:
            return apply_low_memory(x_ND, assigned, self.network())
        hidden_NH = ACTIVATIONS[self.activation](grouped_linear(x_ND, self.up, ends_E, self.up_bias, self.backend))
        hidden_NH = F.dropout(hidden_NH, self.dropout, self.training)
        return grouped_linear(hidden_NH, self.down, ends_E, self.down_bias, self.backend)

    def upcycle_from(self, dense: nn.Module) -> None:
        """Copy `fc1` and `fc2` (timm's `Mlp`) into every expert."""
        _require_layers(self, dense, "fc1", "fc2")
        _require_same_function(self.activation, dense)
        _copy_to_all(self.up, self.up_bias, dense.fc1)
        _copy_to_all(self.down, self.down_bias, dense.fc2)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"num_experts={self.spec.num_experts}, hidden_dim={self.hidden_dim}, activation={self.activation}"


@final
class SwiGLUExperts(Experts):
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

    def forward(self, x_ND: Tensor, ends_E: Tensor, assigned: Assigned | None = None) -> Tensor:
        """Compute each row with its expert; with `assigned`, rows are tokens, and so are the results."""
        if assigned is not None:
            return apply_low_memory(x_ND, assigned, self.network())
        gate_up_NH = grouped_linear(x_ND, self.gate_up, ends_E, self.gate_up_bias, self.backend)
        hidden_NH = F.dropout(_gated(gate_up_NH, self.activation), self.dropout, self.training)
        return grouped_linear(hidden_NH, self.down, ends_E, self.down_bias, self.backend)

    def upcycle_from(self, dense: nn.Module) -> None:
        """Copy timm's `SwiGLU` or `GluMlp`, or `gate_proj`, `up_proj` and `down_proj`, into every expert."""
        gate, up, down = gate_up_down(dense)
        _require_same_function(self.activation, dense)
        half = self.hidden_dim
        bias = self.gate_up_bias
        _copy_to_all(self.gate_up[:, :half], None if bias is None else bias[:, :half], gate)
        _copy_to_all(self.gate_up[:, half:], None if bias is None else bias[:, half:], up)
        _copy_to_all(self.down, self.down_bias, down)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"num_experts={self.spec.num_experts}, hidden_dim={self.hidden_dim}, activation={self.activation}"


EXPERTS: dict[str, type[MLPExperts] | type[SwiGLUExperts]] = {"MLPExperts": MLPExperts, "SwiGLUExperts": SwiGLUExperts}
"""The built-in classes by name."""


def _gated(gate_up_NH: Tensor, activation: Activation) -> Tensor:
    if activation == "silu" and gate_up_NH.device.type == "cpu" and not torch.compiler.is_compiling():
        hidden_NH: Tensor = _SiluAndMul.apply(gate_up_NH)
        return hidden_NH
    gate_NH, up_NH = gate_up_NH.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate_NH) * up_NH


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


class _LinearLayer(NamedTuple):
    weight: Tensor
    bias: Tensor | None


def gate_up_down(dense: Any) -> tuple[_LinearLayer, _LinearLayer, _LinearLayer]:
    """Return the three linear maps of a gated feed-forward network as timm or transformers writes it.

    Raises:
        NotImplementedError: it is not one.
    """
    for names in (("fc1_g", "fc1_x", "fc2"), ("gate_proj", "up_proj", "down_proj")):
        layers = [getattr(dense, name, None) for name in names]
        if all(isinstance(layer, nn.Linear) for layer in layers):
            gate, up, down = (_LinearLayer(layer.weight, layer.bias) for layer in layers if layer is not None)
            return gate, up, down
    first, last = getattr(dense, "fc1", None), getattr(dense, "fc2", None)
    if isinstance(first, nn.Linear) and isinstance(last, nn.Linear) and first.out_features == 2 * last.in_features:
        # timm's GluMlp holds both maps in one layer, the gate in the second half unless told otherwise.
        weights, biases = first.weight.chunk(2), (None, None) if first.bias is None else first.bias.chunk(2)
        halves = [_LinearLayer(weights[0], biases[0]), _LinearLayer(weights[1], biases[1])]
        up, gate = halves if getattr(dense, "gate_last", True) else halves[::-1]
        return gate, up, _LinearLayer(last.weight, last.bias)
    children = ", ".join(name for name, _ in dense.named_children()) or "none"
    raise NotImplementedError(f"{type(dense).__name__} is no gated feed-forward network; it has the layers {children}")


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


def _require_layers(experts: Experts, dense: Any, *names: str) -> None:
    if not all(isinstance(getattr(dense, name, None), nn.Linear) for name in names):
        raise NotImplementedError(
            f"{type(experts).__name__} starts from a network with linear layers {', '.join(names)}; "
            f"{type(dense).__name__} has {', '.join(n for n, _ in dense.named_children()) or 'none'}"
        )


def _require_same_function(activation: Activation, dense: nn.Module) -> None:
    """Refuse a dense network that computes something else between its linear layers."""
    function = getattr(dense, "act", getattr(dense, "act_fn", None))
    probe = torch.linspace(-3, 3, 13)
    if callable(function) and not torch.allclose(function(probe), ACTIVATIONS[activation](probe), atol=1e-5):
        raise ValueError(f"the dense network's activation is {function}, the experts' {activation}: set activation")
    norm = getattr(dense, "norm", None)
    if norm is not None and not isinstance(norm, nn.Identity):
        raise ValueError(f"the dense network normalises its hidden units ({norm}); experts that do so are not built in")


@torch.no_grad()
def _copy_to_all(weight_EOI: Tensor, bias_EO: Tensor | None, linear: Any) -> None:
    if weight_EOI.shape[1:] != linear.weight.shape:
        raise ValueError(
            f"an expert's weights are {list(weight_EOI.shape[1:])}, the dense network's {list(linear.weight.shape)}: "
            "to start from a dense network, leave hidden_dim to it"
        )
    if bias_EO is None and linear.bias is not None:
        raise ValueError("the dense network has biases: to start from it, give the experts bias=True")
    weight_EOI.copy_(linear.weight.expand_as(weight_EOI))
    if bias_EO is not None:
        bias_EO.copy_(torch.zeros_like(bias_EO) if linear.bias is None else linear.bias.expand_as(bias_EO))
