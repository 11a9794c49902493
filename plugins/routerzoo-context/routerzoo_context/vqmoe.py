"""VQMoERouter: a learned gate beside a codebook of experts (Do et al. 2024, https://arxiv.org/abs/2411.19402)."""
# Shape suffixes: T tokens, D model width, E experts, K choices of the gate, C codes.

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from routerzoo import LayerSpec, LossWeight, Router, Routing, RoutingContext, register_router
from routerzoo.functional import gate_linear, topk_softmax
from routerzoo.functional.losses import masked_mean


@register_router
@final
class VQMoERouter(Router):
    """Two branches: a gate chooses k experts, and the nearest code of a learned codebook names one more.

    The expert of code c is `c mod E`. Weights are `softmax(W_c x + b)` over the branches, times the softmax over the
    gate's k largest in the first one; where both choose an expert, its weights add up. Losses: `balance` of the gate
    (0.01), `codebook`, the squared distance of the code to the hidden state that chose it (0.08), and `commitment`,
    that of the hidden state to its code (0.25 * 0.08); means over tokens and channels, with the authors' coefficients.

    The C codes start as U(-1 / C, 1 / C), as in the authors' `vqmoe.py`, so near each other that their loads are even:
    at D = 256 the most loaded of 64 experts starts with 1.2 times its share; with N(0, 1) it would be 8 times. (Their
    language-modeling script takes the codebook for an embedding and draws it again, as N(0, 0.02): 1.5 times.) b
    starts at 0.

    Inspired by: in the paper the second branch computes its expert on `LN(x (1 - r) + code r)`, r = 0.05, and
    normalizes what comes out. Here all experts compute on x, since what experts read is not a router's to change.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: experts per token that the gate chooses.
        codes_per_expert: the codebook has so many codes for each expert.
        init_std: standard deviation of the initial weights of gate and branches.

    Raises:
        ValueError: no codes.
    """

    paper = "Do et al. 2024, arXiv:2411.19402"
    inspired_by = True
    normalized = True
    default_loss_weights: Mapping[str, float | LossWeight] = {"balance": 1e-2, "codebook": 0.08, "commitment": 0.02}

    def __init__(self, spec: LayerSpec, *, top_k: int = 2, codes_per_expert: int = 1, init_std: float = 0.02) -> None:
        if codes_per_expert < 1:
            raise ValueError(f"codes_per_expert must be at least 1, got {codes_per_expert}")
        super().__init__(spec, top_k=top_k)
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * init_std)
        self.branches = nn.Parameter(torch.randn(2, spec.d_model) * init_std)
        self.branch_bias = nn.Parameter(torch.zeros(2))
        codes = codes_per_expert * spec.num_experts
        self.codebook = nn.Parameter(torch.empty(codes, spec.d_model).uniform_(-1 / codes, 1 / codes))

    @torch.no_grad()
    def scale_initial_logits(self, factor: float) -> None:
        """Multiply the gate."""
        self.weight.mul_(factor)

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Select the gate's k experts, and the nearest code's."""
        logits_TE = gate_linear(x_TD, self.weight)
        weights_TK, experts_TK = topk_softmax(logits_TE, self.top_k)
        gate = Routing(experts_TK, weights_TK, logits_TE, may_drop=False)
        # The nearest code has the largest x q - |q|^2 / 2.
        codebook_CD = self.codebook.detach()
        code_T = gate_linear(x_TD.detach(), codebook_CD, -0.5 * codebook_CD.square().sum(-1)).argmax(-1)
        coded_T1 = (code_T % self.spec.num_experts).unsqueeze(1)
        branch_T2 = gate_linear(x_TD, self.branches, self.branch_bias).softmax(-1)
        again_TK = experts_TK == coded_T1
        new_T1 = ~again_TK.any(1, keepdim=True)
        weights_TK = weights_TK * branch_T2[:, :1] + again_TK * branch_T2[:, 1:]
        losses = {}
        if self.training and context.compute_aux_losses:
            mask, code_TD = context.padding_mask, self.codebook.index_select(0, code_T)
            losses["codebook"] = masked_mean((code_TD - x_TD.detach()).square().mean(-1), mask)
            losses["commitment"] = masked_mean((code_TD.detach() - x_TD).square().mean(-1), mask)
        return Routing(
            torch.cat([experts_TK, coded_T1.masked_fill(~new_T1, -1)], dim=1),
            torch.cat([weights_TK, branch_T2[:, 1:] * new_T1], dim=1),
            logits_TE,
            losses,
            selected=gate,  # balance is the gate's
        )
