"""CapacityRouter: a bound on the tokens of each expert, and what becomes of those beyond it."""
# Shape suffixes: T tokens, E experts, K choices per token, N assignments, G groups of tokens (sequences).

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, final, get_args

from torch import Tensor

from routerzoo import ByMode, LayerSpec, Router, RouterWrapper, Routing, RoutingContext, register_router
from routerzoo.functional.ragged import group_by_sequence
from routerzoo_policies.next_choice import next_choices
from routerzoo_policies.rectification import rectified
from routerzoo_policies.service import Groups, Order, finds_room, groups_of, service_order

Scope = Literal["sequence", "batch"]
Overflow = Literal["drop", "next", "local"]


@register_router
@final
class CapacityRouter(RouterWrapper):
    """Lets each expert take at most `ceil(capacity_factor * S * k / E)` of the S tokens of a group, around any router.

    A router without a fixed number of choices counts with k = 1.

    By default a group is a sequence and tokens are served in their order, each with all its choices before the next
    one's: then no later token and no other sequence can take a token's place. The published layers share the capacity
    over the batch, which lets one user's input drop another's tokens (Hayes et al. 2024,
    https://arxiv.org/abs/2402.05526). Orders of service:

    - `token`: token by token. The only causal one.
    - `choice`: all first choices, then all second ones (GShard, https://arxiv.org/abs/2006.16668; V-MoE).
    - `priority`: as `choice`, tokens with the largest weight first (batch prioritized routing, V-MoE,
      https://arxiv.org/abs/2106.05974, algorithm 2).
    - `weight`: each expert keeps its largest weights (Megatron-core's `probs`).

    What becomes of a choice that finds its expert full:

    - `drop`: the expert is left out, the other weights stay (Switch, https://arxiv.org/abs/2101.03961).
    - `next`: the token takes its next best expert with room (Switch's "no token left behind", appendix B). In the order
      `token`, each token selects among the experts that have room left, so that it stays causal; that is a loop over
      the tokens of a sequence. Otherwise the overflow is served in rounds.
    - `local`: the token goes to the best expert of its own device, beyond that one's capacity (Rectify-Router,
      https://arxiv.org/abs/2402.12399).

    `fill` gives the slots that stay free to tokens whose next choice that expert is, the largest logits first (same
    paper). See `routerzoo_policies.rectification` for both.

    The limit holds in training; in evaluation only where `in_evaluation` says so, and is then counted over the tokens
    of the call. Losses and statistics are of what the inner router selected. Padding takes no place.

    Args:
        spec: sizes of the layer the router sits in.
        router: the inner router.
        capacity_factor: room for the load of perfect balance, times this.
        scope: share the capacity in each sequence, or over the batch.
        order: who is served first.
        overflow: what becomes of the rest.
        fill: give away what stays free.
        devices: devices that experts and tokens are spread over, for `local`.
        in_evaluation: limit in evaluation too.

    Raises:
        ValueError: an option out of range; in use, a router that mixes tokens instead of assigning them.
        NotImplementedError: in use, `next`, `local` or `fill` around a router that does not select by logits.
    """

    paper = "Lepikhin et al. 2020, arXiv:2006.16668; Fedus et al. 2021, arXiv:2101.03961; arXiv:2402.12399"

    def __init__(
        self,
        spec: LayerSpec,
        *,
        router: str | Callable[[LayerSpec], Router] = "LinearRouter",
        capacity_factor: float = 1.25,
        scope: Scope = "sequence",
        order: Order = "token",
        overflow: Overflow = "drop",
        fill: bool = False,
        devices: int = 1,
        in_evaluation: bool = False,
    ) -> None:
        for name, value, known in (
            ("scope", scope, get_args(Scope)),
            ("order", order, get_args(Order)),
            ("overflow", overflow, get_args(Overflow)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if not capacity_factor > 0:
            raise ValueError(f"capacity_factor must be above 0, got {capacity_factor}")
        if devices < 1 or spec.num_experts % devices:
            raise ValueError(f"devices must divide num_experts = {spec.num_experts}, got {devices}")
        super().__init__(spec, router=router)
        if scope == "sequence":
            self.require("sequence_ids")
        self.capacity_factor, self.devices, self.fill = capacity_factor, devices, fill
        self.scope, self.order, self.overflow, self.in_evaluation = scope, order, overflow, in_evaluation
        self.rectifies = overflow == "local" or fill
        unlimited = ByMode(training=False, evaluation=not in_evaluation)
        if self.router.properties.causal:
            self.causal_form = "CapacityRouter with its default order"
        if order != "token" or fill:
            self.causal &= unlimited
        if scope == "batch":
            self.batch_independent &= unlimited
        self.tokenwise &= not in_evaluation
        self.normalized &= unlimited
        if self.rectifies:  # its weights learn where the denominator counts as a constant
            self.trains_at_top_1 = fill
        self.compiles = False  # the number of sequences is read from the device

    def select_experts(self, logits_TE: Tensor) -> Tensor:
        """Select as the inner router does, unless evaluation is limited too."""
        self._refuse_if_limited()
        return super().select_experts(logits_TE)

    def combine_weights(self, logits_TE: Tensor, experts_TK: Tensor, *, may_drop: bool = True) -> Tensor:
        """Weight as the inner router does, unless evaluation is limited too."""
        self._refuse_if_limited()
        return super().combine_weights(logits_TE, experts_TK, may_drop=may_drop)

    def _refuse_if_limited(self) -> None:
        if self.in_evaluation:
            raise NotImplementedError("a capacity in evaluation depends on other tokens, not on logits alone")

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Keep what there is room for."""
        routing = self.router.route(x_TD, context)
        if not (self.training or self.in_evaluation):
            return routing
        if routing.dense:
            raise ValueError(f"a capacity bounds assignments; {type(self.router).__name__} mixes tokens or experts")
        ids_T = context.sequence_ids if self.scope == "sequence" else None
        groups = groups_of(
            group_by_sequence(len(x_TD), ids_T, context.padding_mask, x_TD.device),
            len(x_TD),
            capacity_factor=self.capacity_factor,
            choices=self.top_k if routing.experts_TK is not None else 1,
            num_experts=self.spec.num_experts,
        )
        return replace(self._limited(routing, groups), may_drop=True, selected=routing.for_losses)

    def _limited(self, routing: Routing, groups: Groups) -> Routing:
        if self.overflow == "next":
            experts_TK, weights_TK = next_choices(self.router, routing, groups, self.order)
            return replace(routing, experts_TK=experts_TK, weights_TK=weights_TK)
        pairs = routing.assignments()
        bin_N = groups.bins(pairs.expert_N, pairs.token_N, self.spec.num_experts)
        kept_N = finds_room(bin_N, service_order(routing, self.order), groups.room(self.spec.num_experts))
        expert_N, weight_N = pairs.expert_N.masked_fill(~kept_N, -1), pairs.weight_N.masked_fill(~kept_N, 0.0)
        if self.rectifies and (routing.experts_TK is None or routing.logits_TE is None):
            raise NotImplementedError(
                f"{type(self.router).__name__} has no logits, or no fixed number of choices, to rectify"
            )
        if routing.experts_TK is None:
            return replace(routing, expert_N=expert_N, weight_N=weight_N)
        experts_TK, weights_TK = expert_N.view_as(routing.experts_TK), weight_N.view_as(routing.experts_TK)
        if self.rectifies:
            local = self.overflow == "local"
            experts_TK, weights_TK = rectified(
                routing, experts_TK, groups, local=local, fill=self.fill, devices=self.devices
            )
        return replace(routing, experts_TK=experts_TK, weights_TK=weights_TK)
