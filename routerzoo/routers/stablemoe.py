"""StableMoERouter: learn to route, distill it into a token table, freeze it (Dai et al., ACL 2022, https://arxiv.org/abs/2204.08396)."""
# Shape suffixes: T tokens, D model width, E experts, K choices per token, V token ids, R routing dimension.

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routerzoo.functional.gate import gate_linear
from routerzoo.functional.initialization import orthogonal
from routerzoo.functional.losses import distillation_loss, scope_of, stablemoe_balance_loss
from routerzoo.functional.topk import topk_indices
from routerzoo.registry import register_router
from routerzoo.router import LogitRouter, LossWeight, UnmetRequirementError
from routerzoo.routing import LayerSpec, Routing, RoutingContext


@register_router
@final
class StableMoERouter(LogitRouter):
    """Two-stage router: a learned gate teaches a router of token ids, which is then frozen.

    Stage 1 (equations 5 to 11): `s = E_c h`, the expert is the largest, its weight `sigmoid(s_a)`. Losses: `balance`
    (equation 8) and `distillation` (equation 11), the cross-entropy of `E_hat D(token)` with the chosen expert, where D
    is an embedding of its own, independent of the backbone. Stage 2 (equations 12 to 15): the expert is the largest of
    `E_hat D(token)`, which is frozen; **the gate goes on learning**, weight `sigmoid(E_c,a h)`; no auxiliary loss.

    At the switch the choice of every token id is written into a table, a buffer: no momentum and no weight decay can
    move it afterwards. (The authors stop computing gradients only, so that an optimizer with momentum still drifts.)
    The stage is part of the `state_dict`; in the authors' code it is a plain attribute, and a resumed run falls back
    into stage 1. `begin_step` switches it.

    Evaluation routes by the distilled router, in stage 1 too, as in the authors' code. Validation in stage 1 thus
    measures another policy than training; `evaluate="stage"` measures the current one.

    Coefficients 0.3 for both losses (their script; equation 11 shows none). Both are means over tokens here, as the
    language-modeling loss is; the authors take sums of all three. Centroids start orthogonal with gain 0.1, as
    published; the paper is silent on D and E_hat: N(0, 1 / R) here.

    Extensions of the paper, which is top-1 and about text: k > 1 takes the k largest of the same scores, each with its
    sigmoid; balance and distillation look at the first choice. In vision the ids come from
    `routerzoo.models.patch_ids`.

    Args:
        spec: sizes of the layer the router sits in, with `vocab_size`.
        top_k: experts per token.
        routing_dim: width R of the distilled router's token embedding.
        stage1_fraction: share of training spent in stage 1; the published runs take 6,000 of 60,000 steps.
        stage1_steps: length of stage 1 in optimizer steps, instead of `stage1_fraction`.
        evaluate: the router that evaluation in stage 1 uses.
    """

    paper = "Dai et al., ACL 2022, arXiv:2204.08396"
    requires = frozenset({"token_ids"})
    trained_buffers = frozenset({"frozen_choices"})
    default_loss_weights: Mapping[str, float | LossWeight] = {"balance": 0.3, "distillation": 0.3}
    needs_updates = True
    score_fn = "sigmoid"
    renormalize = False
    gate_name = "expert_centroids"
    frozen_choices: Tensor

    def __init__(
        self,
        spec: LayerSpec,
        *,
        top_k: int = 1,
        routing_dim: int = 50,
        stage1_fraction: float = 0.1,
        stage1_steps: int | None = None,
        evaluate: Literal["distilled", "stage"] = "distilled",
    ) -> None:
        super().__init__(spec, top_k=top_k)
        if spec.vocab_size is None:
            raise UnmetRequirementError(type(self).__name__, frozenset({"vocab_size"}))
        if not 0 <= stage1_fraction <= 1:
            raise ValueError(f"stage1_fraction must be between 0 and 1, got {stage1_fraction}")
        if evaluate not in ("distilled", "stage"):
            raise ValueError(f"evaluate must be distilled or stage, got {evaluate!r}")
        self.stage1_fraction, self.stage1_steps, self.evaluate = stage1_fraction, stage1_steps, evaluate
        self.expert_centroids = nn.Parameter(orthogonal(spec.num_experts, spec.d_model, gain=0.1))
        self.routing_embedding = nn.Parameter(torch.randn(spec.vocab_size, routing_dim) * routing_dim**-0.5)
        self.distilled_centroids = nn.Parameter(torch.randn(spec.num_experts, routing_dim) * routing_dim**-0.5)
        self.register_buffer("frozen_choices", torch.zeros(spec.vocab_size, spec.num_experts, dtype=torch.int64))
        self.store_int("current_stage", 1)
        self._frozen: list[Tensor] = []

    @property
    def stage(self) -> int:
        """1 while the gate routes and teaches, 2 once the distilled router routes."""
        return self.stored_int("current_stage")

    @torch.no_grad()
    def freeze_choices(self) -> None:
        """Enter stage 2: write down the choice of every token id.

        Parameters that FSDP2 shards are gathered: all of its processes call this together.

        Raises:
            ValueError: parameters that something else has flattened or split.
        """
        embedding_VR, centroids_ER = _whole(self.routing_embedding), _whole(self.distilled_centroids)
        if embedding_VR.ndim != 2 or len(embedding_VR) != len(self.frozen_choices):
            raise ValueError(
                f"StableMoERouter enters stage 2 with a routing_embedding of shape {list(embedding_VR.shape)}, of "
                f"{len(self.frozen_choices)} token ids: shard the model with FSDP2 (fully_shard), which can gather it"
            )
        for start in range(0, len(self.frozen_choices), 4096):  # bounds memory at a large vocabulary
            scores_VE = gate_linear(embedding_VR[start : start + 4096], centroids_ER)
            # Not a sort: the first k must be what `topk` gives on ties.
            first_V1 = scores_VE.argmax(-1, keepdim=True)
            order_VE = scores_VE.scatter(1, first_V1, torch.inf).argsort(dim=-1, descending=True, stable=True)
            self.frozen_choices[start : start + 4096] = order_VE
        self.store_int("current_stage", 2)

    def begin_step(self, step: int, total_steps: int | None) -> None:
        """Enter stage 2 once stage 1 has lasted its steps.

        Raises:
            ValueError: a stage 1 that is a share of a number of steps that is not known.
        """
        if self.stage == 1:
            last = self.stage1_steps
            if last is None and total_steps is None:
                raise ValueError(
                    "StableMoERouter's stage1_fraction needs the number of steps: give stage1_steps, or it"
                )
            last = round(self.stage1_fraction * (total_steps or 0)) if last is None else last
            if step >= last:
                self.freeze_choices()
        if self.stage == 2 and not self._frozen:
            self._frozen = [value.detach().clone() for value in (self.routing_embedding, self.distilled_centroids)]

    @torch.no_grad()
    def update(self, statistics: Mapping[str, Tensor]) -> None:
        """Undo what momentum and weight decay did to the frozen parameters."""
        for value, frozen in zip((self.routing_embedding, self.distilled_centroids), self._frozen, strict=False):
            value.copy_(frozen)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._frozen = []  # of the weights that were there before

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return the gate's `E_c h`."""
        return gate_linear(x_TD, self.expert_centroids)

    def select_experts(self, logits_TE: Tensor) -> Tensor:
        """Refuse: what it weights is selected by token ids.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("StableMoERouter selects experts by token ids, not by logits alone")

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Route by the gate in stage 1, by the frozen choices in stage 2."""
        token_ids = context.token_ids
        assert token_ids is not None  # `forward` checked what `requires` names.
        logits_TE = self.logits(x_TD, context)
        distill = self.stage == 1 and self.training
        if self.stage == 2:
            experts_TK = self.frozen_choices[token_ids, : self.top_k]
        elif self.training or self.evaluate == "stage":
            experts_TK = topk_indices(logits_TE, self.top_k)
        else:
            experts_TK = topk_indices(self._distilled_logits(token_ids), self.top_k)
        gates_TK = self.combine_weights(logits_TE, experts_TK, may_drop=False)
        losses = {}
        if distill:
            # What the frozen router is taught is the policy alone: neither the gate nor the model gets its gradient.
            first_T = experts_TK[:, 0]
            losses["balance"] = stablemoe_balance_loss(
                gates_TK[:, 0], first_T, self.spec.num_experts, **scope_of("batch", context)
            )
            losses["distillation"] = distillation_loss(
                self._distilled_logits(token_ids), first_T, padding_mask=context.padding_mask
            )
        elif self.training:
            # Zeros that keep every parameter in the graph: DistributedDataParallel waits for all gradients.
            zero = 0.0 * (self.routing_embedding.sum() + self.distilled_centroids.sum())
            losses = {"balance": logits_TE.new_zeros(()), "distillation": zero}
        return Routing(experts_TK, gates_TK, logits_TE, losses, score_fn=self.score_fn, may_drop=False)

    def _distilled_logits(self, token_ids: Tensor) -> Tensor:
        return gate_linear(F.embedding(token_ids, self.routing_embedding), self.distilled_centroids)


def _whole(value: Tensor) -> Tensor:
    # Of a DTensor, whose import takes a second.
    return value.full_tensor() if hasattr(value, "full_tensor") else value
