"""RMoERouter: a recurrence over layers (Qiu et al. 2024, https://arxiv.org/abs/2408.06793)."""
# Shape suffixes: T tokens, D model width, R recurrent width, F 3 R, E experts.

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routerzoo import LayerSpec, LogitRouter, LossWeight, RoutingContext, register_router
from routerzoo.functional import gate_linear
from routerzoo.functional.recomputation import in_backward


class Carried(NamedTuple):
    """What a layer leaves for the next one.

    Args:
        state_TR: the tokens' states.
        input_weight_FR: what the GRU does to its input.
        input_bias_F: the bias of that.
        state_bias_F: the bias of what the GRU does to its state.
        state_weight_FR: what the GRU does to its state; None after layer 0, whose own state is 0.
    """

    state_TR: Tensor
    input_weight_FR: Tensor
    input_bias_F: Tensor
    state_bias_F: Tensor
    state_weight_FR: Tensor | None = None


@register_router
@final
class RMoERouter(LogitRouter):
    """Layerwise recurrent router: a GRU carries each token's routing from one MoE layer to the next.

    `r_l = GRU(A_l h_l, r_{l-1})`, `logits = O_l r_l`, r_0 = 0, softmax over the k largest (Qiu et al. 2024, equations 4
    to 6). A and O are the layer's own, the GRU is one for all layers: the first layer owns what it does to the input,
    the second what it does to the state (the first has none yet), and the others read both from the context's `carry`,
    as they read the state. The state is a token's own, so the router is causal and generation needs no other tokens.

    Loss `balance`, in the authors' release transformers' over the tokens of all layers together with coefficient 1e-3,
    which at balance is k where ours is 1: 1e-3 k, for the k at construction. All weights and biases start as N(0,
    init_std), as the release draws them all from its model's initializer. The logits then start small: at
    D = 256 with a standard deviation of 0.017, where a linear gate's is 0.32.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: experts per token.
        recurrent_dim: width R of the recurrence.
        init_std: standard deviation of all initial weights and biases.

    Raises:
        UnmetRequirementError: the model does not number its layers.
        ValueError: a width below 1; in use, a later layer whose context lacks the state of the one before, or a layer
            that has routed before in the same forward pass.
    """

    paper = "Qiu et al., 2024, arXiv:2408.06793"
    gate_name = "up"

    def __init__(self, spec: LayerSpec, *, top_k: int = 2, recurrent_dim: int = 256, init_std: float = 0.02) -> None:
        if recurrent_dim < 1:
            raise ValueError(f"recurrent_dim must be at least 1, got {recurrent_dim}")
        super().__init__(spec, top_k=top_k)
        layer = self.required_layer()
        self.default_loss_weights: Mapping[str, float | LossWeight] = {"balance": LossWeight(1e-3 * top_k, "pooled")}
        self.down = nn.Parameter(torch.empty(recurrent_dim, spec.d_model))
        self.up = nn.Parameter(torch.empty(spec.num_experts, recurrent_dim))
        self.input_cell = nn.Linear(recurrent_dim, 3 * recurrent_dim) if layer == 0 else None
        self.state_bias = nn.Parameter(torch.empty(3 * recurrent_dim)) if layer == 0 else None
        self.state_cell = nn.Linear(recurrent_dim, 3 * recurrent_dim, bias=False) if layer == 1 else None
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=init_std)

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return `O r` of the new state r, which the next layer continues from."""
        layer, step_TR = self.required_layer(), gate_linear(x_TD, self.down)
        carried: Carried | None
        if self.input_cell is not None and self.state_bias is not None:
            carried = Carried(torch.zeros_like(step_TR), self.input_cell.weight, self.input_cell.bias, self.state_bias)
        else:
            carried = context.carry.get((RMoERouter, layer - 1))
            if carried is None or len(carried.state_TR) != len(x_TD):
                raise ValueError(
                    f"the RMoERouter of MoE layer {layer} continues from layer {layer - 1}: run that one before on the "
                    "same tokens, and give both the same RoutingContext"
                )
        if self.state_cell is not None:
            carried = carried._replace(state_weight_FR=self.state_cell.weight)
        state_TR = _gru(step_TR, carried)
        if (RMoERouter, layer) not in context.carry:
            context.carry[RMoERouter, layer] = carried._replace(state_TR=state_TR)
        elif not in_backward():  # where a forward pass is recomputed, its states are there
            raise ValueError(
                f"an RMoERouter of MoE layer {layer} has routed before in this forward pass, and would overwrite its "
                "state: number the layers of the model, LayerSpec(..., layer=0), LayerSpec(..., layer=1) and so on, "
                "call each once, and give each forward pass a RoutingContext of its own"
            )
        return gate_linear(state_TR, self.up)


def _gru(step_TR: Tensor, carried: Carried) -> Tensor:
    """Return the next state of a GRU as torch defines it."""
    state_TR, hidden_TF = carried.state_TR, carried.state_bias_F
    if carried.state_weight_FR is not None:
        hidden_TF = hidden_TF + F.linear(state_TR, carried.state_weight_FR)
    reset_i, update_i, new_i = F.linear(step_TR, carried.input_weight_FR, carried.input_bias_F).chunk(3, dim=-1)
    reset_h, update_h, new_h = hidden_TF.chunk(3, dim=-1)
    update_TR = torch.sigmoid(update_i + update_h)
    new_TR = torch.tanh(new_i + torch.sigmoid(reset_i + reset_h) * new_h)
    return (1 - update_TR) * new_TR + update_TR * state_TR
