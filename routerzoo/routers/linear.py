"""LinearRouter: the learned linear gate of sparse MoE (Shazeer et al., ICLR 2017, https://arxiv.org/abs/1701.06538)."""
# Shape suffixes: T tokens, D model width, E experts.

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routerzoo.functional.gate import gate_linear
from routerzoo.functional.topk import ScoreFunction
from routerzoo.registry import register_router
from routerzoo.router import LogitRouter, LossWeight
from routerzoo.routing import LayerSpec, RoutingContext


@register_router
@final
class LinearRouter(LogitRouter):
    r"""Learned linear gate with top-k selection: the baseline that every other router is compared with.

    `z = x W^T (+ b)`, and the experts are the k largest of z. The weights are

    - softmax over all experts, renormalized over the selected ones (GShard, Mixtral). This is the same as Shazeer's
      softmax over the selected logits (equation 3).
    - with `renormalize=False`, the softmax over all experts as it is (Switch, equations 1 and 2; V-MoE, OLMoE). At
      k = 1 only this form gives the gate a gradient from the task.
    - with `score="sigmoid"`, the sigmoid of each logit (DeepSeek-V3), renormalized or not.

    Losses by default: `balance` (Switch, equation 4; at its minimum 1 for any k) and `z` (ST-MoE, equation 5).
    `noisy=True` adds Shazeer's learned noise in training (equation 4), `N(0, 1) * (softplus(x W_n^T) + 0.01)`; the
    offset 0.01 is FastMoE's. Its losses are `importance` and `load` (equations 6 to 11), 0.1 each.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: experts per token.
        score: how logits become weights.
        renormalize: divide the selected weights by their sum. By default so where `top_k` at construction is above 1.
        bias: give the gate a bias.
        noisy: choose with learned noise in training.
        init_std: standard deviation of the gate's initial weights.
    """

    paper = "Shazeer et al., ICLR 2017, arXiv:1701.06538; Fedus et al., JMLR 2022, arXiv:2101.03961"
    default_loss_weights: Mapping[str, float | LossWeight] = {"balance": 1e-2, "z": 1e-3}

    def __init__(
        self,
        spec: LayerSpec,
        *,
        top_k: int = 2,
        score: ScoreFunction = "softmax",
        renormalize: bool | None = None,
        bias: bool = False,
        noisy: bool = False,
        init_std: float = 0.02,
    ) -> None:
        super().__init__(
            spec, top_k=top_k, score_fn=score, renormalize=top_k > 1 if renormalize is None else renormalize
        )
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model) * init_std)
        self.bias = nn.Parameter(torch.zeros(spec.num_experts)) if bias else None
        self.noise_weight = nn.Parameter(torch.zeros(spec.num_experts, spec.d_model)) if noisy else None

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return `x W^T (+ b)`."""
        return gate_linear(x_TD, self.weight, self.bias)

    def noise_std(self, x_TD: Tensor) -> Tensor | None:
        """Return the learned noise's scale, `softplus(x W_n^T) + 0.01`."""
        return None if self.noise_weight is None else F.softplus(gate_linear(x_TD, self.noise_weight)) + 0.01
