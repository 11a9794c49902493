"""RMoERouter: a recurrence over layers (Qiu et al. 2024, https://arxiv.org/abs/2408.06793)."""
# Shape suffixes: T tokens, D model width, R recurrent width, F 3 R, E experts, K choices per token.

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routerzoo import LayerSpec, Router, Routing, RoutingContext, register_router
from routerzoo.functional.losses import balance_loss, scope_of
from routerzoo.functional.topk import softmax_at, topk_indices, topk_softmax

_INPUT, _STATE = "routerzoo_context.RMoERouter.input", "routerzoo_context.RMoERouter.state"


@register_router
@final
class RMoERouter(Router):
    """Layerwise recurrent router: a GRU carries each token's routing from one MoE layer to the next.

    `r_l = GRU(A_l h_l, r_{l-1})`, `logits = O_l r_l`, r_0 = 0, softmax over the k largest (Qiu et al. 2024, equations 4
    to 6). A and O are the layer's own, the GRU is one for all layers: the first layer owns what it does to the input,
    the second what it does to the state (the first has none yet), and the others get both in the context's `carry`, as
    they get the state. The state is a token's own, so the router is causal and generation needs no other tokens.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: experts per token.
        recurrent_dim: width R of the recurrence.
        init_std: standard deviation of the initial weights of A and O.

    Raises:
        ValueError: a width below 1; in use, a later layer without an earlier one's state in its context.
    """

    paper = "Qiu et al., 2024, arXiv:2408.06793"
    default_loss_weights: ClassVar[Mapping[str, float]] = {"balance": 1e-3}
    normalized = True
    trains_at_top_1 = False

    def __init__(self, spec: LayerSpec, *, top_k: int = 2, recurrent_dim: int = 256, init_std: float = 0.02) -> None:
        if recurrent_dim < 1:
            raise ValueError(f"recurrent_dim must be at least 1, got {recurrent_dim}")
        super().__init__(spec, top_k=top_k)
        self.down = nn.Parameter(torch.randn(recurrent_dim, spec.d_model) * spec.d_model**-0.5)
        self.up = nn.Parameter(torch.randn(spec.num_experts, recurrent_dim) * init_std)
        self.input_cell = nn.Linear(recurrent_dim, 3 * recurrent_dim) if spec.layer == 0 else None
        self.input_bias = nn.Parameter(torch.zeros(3 * recurrent_dim)) if spec.layer == 0 else None
        self.state_cell = nn.Linear(recurrent_dim, 3 * recurrent_dim, bias=False) if spec.layer == 1 else None

    @torch.no_grad()
    def scale_initial_logits(self, factor: float) -> None:
        """Scale the last map."""
        self.up.mul_(factor)

    def select_experts(self, logits_TE: Tensor) -> Tensor:
        """Choose the k largest."""
        return topk_indices(logits_TE, self.top_k)

    def combine_weights(self, logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """Take the softmax over the chosen logits."""
        return softmax_at(logits_TE, experts_TK)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Take the k largest logits of the new state."""
        step_TR = F.linear(x_TD, self.down)
        if self.input_cell is not None:
            context.carry[_INPUT] = self.input_cell, self.input_bias
        if self.state_cell is not None:
            context.carry[_STATE] = self.state_cell
        layer = self.spec.layer
        # Keyed by layer: activation checkpointing runs a layer again when later ones have left their states.
        earlier_TR = context.carry.get((_STATE, layer - 1))
        if layer > 0 and (earlier_TR is None or len(earlier_TR) != len(x_TD)):
            raise ValueError(
                f"the RMoERouter of MoE layer {layer} continues from layer {layer - 1}: run that one before on the "
                "same tokens, and give both the same RoutingContext"
            )
        input_cell, bias_F = context.carry[_INPUT]
        state_TR = _gru(
            input_cell(step_TR), bias_F, earlier_TR, context.carry[_STATE] if earlier_TR is not None else None
        )
        context.carry[_STATE, layer] = state_TR
        logits_TE = F.linear(state_TR, self.up)
        weights_TK, experts_TK = topk_softmax(logits_TE, self.top_k)
        losses = {}
        if self.training and context.compute_aux_losses:
            losses["balance"] = balance_loss(logits_TE.softmax(-1), experts_TK, **scope_of("batch", context))
        return Routing(experts_TK, weights_TK, logits_TE, losses, may_drop=False)


def _gru(input_TF: Tensor, bias_F: Tensor, state_TR: Tensor | None, state_cell: nn.Module | None) -> Tensor:
    """Return the next state of a GRU as torch defines it; no state is a state of zeros."""
    reset_i, update_i, new_i = input_TF.chunk(3, dim=-1)
    hidden_TF = bias_F.expand_as(input_TF)
    if state_TR is not None and state_cell is not None:
        hidden_TF = hidden_TF + state_cell(state_TR)
    reset_h, update_h, new_h = hidden_TF.chunk(3, dim=-1)
    update_TR = torch.sigmoid(update_i + update_h)
    new_TR = torch.tanh(new_i + torch.sigmoid(reset_i + reset_h) * new_h)
    kept_TR = 0.0 if state_TR is None else update_TR * state_TR
    return (1 - update_TR) * new_TR + kept_TR
