"""XMoERouter: cosine routing on a low-dimensional hypersphere (Chi et al., NeurIPS 2022, https://arxiv.org/abs/2204.09179)."""
# Shape suffixes: T tokens, D model width, E experts, R routing dimension.

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routerzoo.functional.gate import gate_linear
from routerzoo.functional.initialization import orthogonal
from routerzoo.functional.topk import ScoreFunction
from routerzoo.registry import register_router
from routerzoo.router import LogitRouter, LossWeight
from routerzoo.routing import LayerSpec, RoutingContext

BALANCE_TEMPERATURE: dict[ScoreFunction, float] = {"softmax": 0.3, "sigmoid": 0.07}
MIN_TEMPERATURE = 0.01


@register_router
@final
class XMoERouter(LogitRouter):
    """Gate that compares a low-dimensional projection of the token with expert embeddings by their cosine.

    `s_i = cos(P h, c_i)` with P of `[R, D]`; the logits are `s / tau`, tau learned. The weight is the softmax over all
    experts, or the sigmoid, at the chosen expert; it is not renormalized. Loss `balance`: Switch's, on
    `softmax(s / tau0)` with a *fixed* temperature tau0 (0.3 with softmax, 0.07 with sigmoid weights), so that the
    learned temperature cannot lower it. Coefficient 0.01 (the authors' README).

    Most public versions differ from the paper: they normalize one side only, fix tau, or take the softmax twice. The
    bound tau >= 0.01 is Tutel's. The paper is silent on initial values: here tau starts at tau0, the expert embeddings
    are orthogonal (torchscale) and P is drawn as in `torch.nn.Linear`.

    The paper freezes router and experts when it fine-tunes; see `routerzoo.callbacks.FineTune`.

    Extension of the paper, which is top-1: k > 1 keeps the k largest weights as they are.

    Args:
        spec: sizes of the layer the router sits in.
        top_k: experts per token.
        routing_dim: dimension R of the hypersphere; by default half the number of experts, as published.
        score: how logits become weights.
        temperature: initial value of tau; by default tau0.
    """

    paper = "Chi et al., NeurIPS 2022, arXiv:2204.09179"
    renormalize = False
    default_loss_weights: Mapping[str, float | LossWeight] = {"balance": 1e-2}

    def __init__(
        self,
        spec: LayerSpec,
        *,
        top_k: int = 1,
        routing_dim: int | None = None,
        score: ScoreFunction = "softmax",
        temperature: float | None = None,
    ) -> None:
        if score not in BALANCE_TEMPERATURE:
            raise ValueError(f"score must be softmax or sigmoid, got {score!r}")
        super().__init__(spec, top_k=top_k, score_fn=score)
        if routing_dim is None:
            routing_dim = max(spec.num_experts // 2, 1)
        if routing_dim < 1:
            raise ValueError(f"routing_dim must be at least 1, got {routing_dim}")
        self.balance_temperature = BALANCE_TEMPERATURE[score]
        temperature = self.balance_temperature if temperature is None else temperature
        if temperature < MIN_TEMPERATURE:
            raise ValueError(f"temperature must be at least {MIN_TEMPERATURE}, got {temperature}")
        bound = spec.d_model**-0.5
        self.projection = nn.Parameter(torch.empty(routing_dim, spec.d_model).uniform_(-bound, bound))
        self.expert_embedding = nn.Parameter(orthogonal(spec.num_experts, routing_dim))
        self.temperature = nn.Parameter(torch.tensor(float(temperature)))

    @torch.no_grad()
    def scale_initial_logits(self, factor: float) -> None:
        """Scale the learned temperature; the one of the balance loss stays."""
        temperature = float(self.temperature) / factor
        if temperature < MIN_TEMPERATURE:
            raise ValueError(f"the temperature would have to be {temperature:.3g}; it is at least {MIN_TEMPERATURE}")
        self.temperature.fill_(temperature)

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return the cosine over the learned temperature."""
        token_TR = F.normalize(gate_linear(x_TD, self.projection), dim=-1)
        cosine_TE = F.linear(token_TR, F.normalize(self.expert_embedding, dim=-1))
        return cosine_TE * self._inverse_temperature()

    def balance_probs(self, logits_TE: Tensor) -> Tensor:
        """Return the softmax at the fixed temperature."""
        return (logits_TE / (self._inverse_temperature() * self.balance_temperature)).softmax(-1)

    def _inverse_temperature(self) -> Tensor:
        return self.temperature.clamp_min(MIN_TEMPERATURE).reciprocal()
