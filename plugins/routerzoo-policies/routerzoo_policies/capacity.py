"""CapacityRouter: a bound on the tokens of each expert, and what becomes of those beyond it."""
# Shape suffixes: T tokens, E experts, K choices per token, N assignments, G groups of tokens (sequences),
# S tokens of a group.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple, final, get_args

import torch
from torch import Tensor

from routerzoo import LayerSpec, Router, RouterWrapper, Routing, RoutingContext, register_router
from routerzoo.functional.ragged import Sequences, group_by_sequence

Scope = Literal["sequence", "batch"]
Order = Literal["token", "choice", "priority", "weight"]
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
    - `next`: the token takes its next best expert with room (Switch's "no token left behind", appendix B), and the
      router weighs anew. In the order `token`, each token chooses among the experts that have room left, so that it
      stays causal; that is a loop over the tokens of a sequence. Otherwise the overflow is served in rounds.
    - `local`: the token goes to the best expert of its own device, beyond that one's capacity ("intra-GPU
      rectification", Rectify-Router, https://arxiv.org/abs/2402.12399), whose weight counts as often as choices were
      lost: the softmax over the kept choices a_j and m times the local one. Experts, and tokens by their place in the
      batch, are split evenly over `devices`.

    `fill` gives the slots that stay free to tokens whose next choice that expert is, the largest logits first
    ("fill-in rectification", same paper); the denominator of the softmax then counts as a constant in the gradient.
    The rectifications are inspired by that paper, of which we know equations and prose second-hand.

    The limit holds in training; in evaluation only where `in_evaluation` says so, and is then counted over the tokens
    of the call. Losses are those of the inner router, on what it chose. Padding takes no place.

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
        NotImplementedError: in use, `next`, `local` or `fill` around a router that does not choose by logits.
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
        self.scope: Scope = scope
        self.order: Order = order
        self.overflow: Overflow = overflow
        self.in_evaluation = in_evaluation

    @property
    def is_limited(self) -> bool:
        """Whether the capacity holds in this mode."""
        return self.training or self.in_evaluation

    @property
    def causal(self) -> bool:  # type: ignore[override]
        """Where tokens are served in their order, and nothing is given away at the end."""
        safe = self.order == "token" and not self.fill
        return super().causal and (safe or not self.is_limited)

    @property
    def causal_form(self) -> str:  # type: ignore[override]
        """The causal order, unless the inner router is what is not causal."""
        return super().causal_form if not super().causal else "CapacityRouter with its default order"

    @property
    def batch_independent(self) -> bool:  # type: ignore[override]
        """Where sequences share no capacity."""
        return super().batch_independent and (self.scope == "sequence" or not self.is_limited)

    @property
    def tokenwise(self) -> bool:  # type: ignore[override]
        """Not where the limit holds in evaluation."""
        return super().tokenwise and not self.in_evaluation

    @property
    def _rectifies(self) -> bool:
        return self.overflow == "local" or self.fill

    @property
    def normalized(self) -> bool:  # type: ignore[override]
        """Not where choices are lost."""
        return super().normalized and not self.is_limited

    @property
    def nonnegative(self) -> bool:  # type: ignore[override]
        """As the inner router, or a softmax."""
        return super().nonnegative

    @property
    def trains_at_top_1(self) -> bool:  # type: ignore[override]
        """As the inner router; rectified weights have a gradient where the denominator counts as a constant."""
        return self.fill if self._rectifies else super().trains_at_top_1

    @property
    def compiles(self) -> bool:  # type: ignore[override]
        """Counting within sequences reads their number from the device."""
        return False

    def select_experts(self, logits_TE: Tensor) -> Tensor:
        """Choose as the inner router does, unless evaluation is limited too."""
        self._refuse_if_limited()
        return super().select_experts(logits_TE)

    def combine_weights(self, logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """Weigh as the inner router does, unless evaluation is limited too."""
        self._refuse_if_limited()
        return super().combine_weights(logits_TE, experts_TK)

    def _refuse_if_limited(self) -> None:
        if self.in_evaluation:
            raise NotImplementedError("a capacity in evaluation depends on other tokens, not on logits alone")

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Keep what there is room for."""
        routing = self.router.route(x_TD, context)
        if not self.is_limited:
            return routing
        if routing.dense:
            raise ValueError(f"a capacity bounds assignments; {type(self.router).__name__} mixes tokens or experts")
        ids_T = context.sequence_ids if self.scope == "sequence" else None
        groups = _Groups.of(len(x_TD), ids_T, context.padding_mask, x_TD.device)
        capacity_G = self._capacities(groups, routing)
        if self.overflow == "next":
            return self._next_choices(routing, groups, capacity_G)
        kept_N = self._kept(routing, groups, capacity_G)
        pairs = routing.assignments()
        if routing.experts_TK is None or routing.weights_TK is None:
            expert_N, weight_N = pairs.expert_N.masked_fill(~kept_N, -1), pairs.weight_N.masked_fill(~kept_N, 0.0)
            if self._rectifies:
                raise NotImplementedError(f"{type(self.router).__name__} has no fixed number of choices to make up for")
            return replace(routing, expert_N=expert_N, weight_N=weight_N, may_drop=True)
        kept_TK = kept_N.view_as(routing.experts_TK)
        experts_TK = routing.experts_TK.masked_fill(~kept_TK, -1)
        if not self._rectifies:
            weights_TK = routing.weights_TK.masked_fill(~kept_TK, 0.0)
            return replace(routing, experts_TK=experts_TK, weights_TK=weights_TK, may_drop=True)
        return self._rectified(routing, experts_TK, groups, capacity_G)

    def _capacities(self, groups: _Groups, routing: Routing) -> Tensor:
        """Return the room of each expert in each group, int64 `[G]`."""
        load_G = groups.sequences.lengths_G * (self.top_k if routing.experts_TK is not None else 1)
        return (self.capacity_factor * load_G / self.spec.num_experts).ceil().long()

    def _kept(self, routing: Routing, groups: _Groups, capacity_G: Tensor) -> Tensor:
        """Return which assignments find room, bool `[N]`."""
        pairs = routing.assignments()
        group_N = groups.group_T.index_select(0, pairs.token_N)
        wants_N = (pairs.expert_N >= 0) & (group_N >= 0)
        order_N = self._service(routing)
        bin_N = torch.where(wants_N, group_N * self.spec.num_experts + pairs.expert_N, -1)
        rank_N = _rank_in_bin(bin_N, order_N)
        room_N = capacity_G.index_select(0, group_N.clamp_min(0)) if len(capacity_G) else rank_N * 0
        return wants_N & (rank_N < room_N)

    def _service(self, routing: Routing) -> Tensor:
        """Return the assignments in the order in which they are served."""
        pairs = routing.assignments()
        in_order_N = torch.arange(len(pairs.token_N), device=pairs.token_N.device)
        if self.order == "token":
            return in_order_N
        weight_N = pairs.weight_N.detach()
        if self.order == "weight":
            return weight_N.sort(descending=True, stable=True).indices
        if routing.experts_TK is None or routing.weights_TK is None:
            raise ValueError(f"the order {self.order} needs choices in columns; take token or weight")
        num_tokens, top_k = routing.experts_TK.shape
        tokens_T = in_order_N[:num_tokens]
        if self.order == "priority" and top_k:
            tokens_T = routing.weights_TK.detach().amax(1).sort(descending=True, stable=True).indices
        return (tokens_T.unsqueeze(0) * top_k + in_order_N[:top_k].unsqueeze(1)).flatten()

    def _next_choices(self, routing: Routing, groups: _Groups, capacity_G: Tensor) -> Routing:
        """Let choices that find no room fall on the next best experts that have any."""
        if routing.logits_TE is None or routing.experts_TK is None:
            raise NotImplementedError(f"{type(self.router).__name__} has no next choice: it does not choose by logits")
        logits_TE = routing.logits_TE
        with torch.no_grad():
            in_turn = self._served_in_turn if self.order == "token" else self._served_in_rounds
            experts_TK = in_turn(routing, groups, capacity_G)
        weights_TK = self.router.combine_weights(logits_TE, experts_TK)
        return replace(routing, experts_TK=experts_TK, weights_TK=weights_TK, may_drop=True)

    def _served_in_turn(self, routing: Routing, groups: _Groups, capacity_G: Tensor) -> Tensor:
        """Serve one token of every group at a time."""
        assert routing.logits_TE is not None
        sequences, num_experts = groups.sequences, self.spec.num_experts
        logits_GSE = sequences.to_padded(routing.logits_TE)
        length = sequences.real_GS.shape[1]
        room_GE = capacity_G.unsqueeze(1).expand(-1, num_experts).clone()
        chosen = []
        for place in range(length):
            open_GE = logits_GSE[:, place].masked_fill(room_GE <= 0, -torch.inf)
            experts_GK = self.router.select_experts(open_GE)
            none_GK = (experts_GK < 0) | (open_GE.gather(1, experts_GK.clamp_min(0)) == -torch.inf)
            experts_GK = experts_GK.masked_fill(none_GK | ~sequences.real_GS[:, place].unsqueeze(1), -1)
            room_GE.scatter_add_(1, experts_GK.clamp_min(0), -(experts_GK >= 0).long())
            chosen.append(experts_GK)
        num_tokens = len(routing.logits_TE)
        if not chosen:
            return sequences.token_R.new_full((num_tokens, self.top_k), -1)
        return sequences.to_flat(torch.stack(chosen, dim=1), num_tokens, fill=-1)

    def _served_in_rounds(self, routing: Routing, groups: _Groups, capacity_G: Tensor) -> Tensor:
        """Serve all choices; then all next choices of those that found no room, until there are none."""
        logits_TE, experts_TK = routing.logits_TE, routing.experts_TK
        assert logits_TE is not None
        assert experts_TK is not None
        assert routing.weights_TK is not None
        num_tokens, num_experts, top_k = len(logits_TE), self.spec.num_experts, experts_TK.shape[1]
        real_T1 = (groups.group_T >= 0).unsqueeze(1)
        bins_T1 = groups.group_T.clamp_min(0).unsqueeze(1) * num_experts
        room = capacity_G.repeat_interleave(num_experts)
        settled_TK = torch.full_like(experts_TK, -1)
        proposed_TK = experts_TK.masked_fill(~real_T1, -1)
        tried_TE = torch.zeros_like(logits_TE, dtype=torch.bool)
        order_N = self._service(routing)
        for _ in range(num_experts):
            wants_TK = proposed_TK >= 0
            if not wants_TK.any():
                break
            bin_TK = torch.where(wants_TK, bins_T1 + proposed_TK, -1)
            rank_TK = _rank_in_bin(bin_TK.flatten(), order_N).view_as(bin_TK)
            found_TK = wants_TK & (rank_TK < room[bin_TK.clamp_min(0)])
            settled_TK = torch.where(found_TK, proposed_TK, settled_TK)
            room = room - torch.bincount(bin_TK[found_TK], minlength=len(room))
            tried_TE = tried_TE.scatter_add(1, proposed_TK.clamp_min(0), wants_TK) if num_tokens else tried_TE
            open_TE = logits_TE.masked_fill(tried_TE, -torch.inf)
            best_TK = self.router.select_experts(open_TE)
            best_TK = best_TK.masked_fill(open_TE.gather(1, best_TK.clamp_min(0)) == -torch.inf, -1)
            # The n-th lost choice of a token proposes to its n-th best expert.
            lost_TK = (settled_TK < 0) & real_T1 & (experts_TK >= 0)
            nth_TK = (lost_TK.cumsum(1) - 1).clamp(0, top_k - 1)
            proposed_TK = torch.where(lost_TK, best_TK.gather(1, nth_TK), -1)
        return settled_TK

    def _rectified(self, routing: Routing, experts_TK: Tensor, groups: _Groups, capacity_G: Tensor) -> Routing:
        """Send lost choices to the local expert, and give free slots to next choices."""
        logits_TE = routing.logits_TE
        if logits_TE is None or routing.experts_TK is None:
            raise NotImplementedError(f"{type(self.router).__name__} has no logits to rectify by")
        num_tokens, num_experts = logits_TE.shape
        columns = [experts_TK]
        counts = [torch.ones_like(experts_TK)]
        lost_T = ((experts_TK < 0) & (routing.experts_TK >= 0)).sum(1).masked_fill(groups.group_T < 0, 0)
        if self.overflow == "local":
            tokens_T = torch.arange(num_tokens, device=logits_TE.device)
            size = num_experts // self.devices
            device_T = tokens_T * self.devices // max(num_tokens, 1)
            experts_E = torch.arange(num_experts, device=logits_TE.device)
            local_TE = experts_E // size == device_T.unsqueeze(1)
            local_T = logits_TE.detach().masked_fill(~local_TE, -torch.inf).argmax(1)
            columns.append(local_T.masked_fill(lost_T == 0, -1).unsqueeze(1))
            counts.append(lost_T.unsqueeze(1))
        if self.fill:
            columns.append(self._fill_ins(routing, experts_TK, groups, capacity_G).unsqueeze(1))
            counts.append(torch.ones_like(columns[-1]))
        chosen_TK, count_TK = torch.cat(columns, 1), torch.cat(counts, 1)
        # A local expert may be one of the kept: its count goes there.
        count_TE = torch.zeros_like(logits_TE).scatter_add(
            1, chosen_TK.clamp_min(0), count_TK.to(logits_TE.dtype).masked_fill(chosen_TK < 0, 0.0)
        )
        twice_TK = (chosen_TK.unsqueeze(2) == chosen_TK.unsqueeze(1)).tril(-1).any(2)
        chosen_TK = chosen_TK.masked_fill(twice_TK, -1)
        none_TK = chosen_TK < 0
        lowest = torch.finfo(logits_TE.dtype).min
        share_TK = logits_TE.gather(1, chosen_TK.clamp_min(0)).masked_fill(none_TK, lowest)
        top_T1 = share_TK.amax(1, keepdim=True).detach()
        share_TK = (share_TK - top_T1).exp() * count_TE.gather(1, chosen_TK.clamp_min(0)).masked_fill(none_TK, 0.0)
        total_T1 = share_TK.sum(1, keepdim=True)
        total_T1 = total_T1.detach() if self.fill else total_T1
        weights_TK = torch.where(none_TK, 0.0, share_TK / total_T1.masked_fill(total_T1 == 0, 1.0))
        return replace(routing, experts_TK=chosen_TK, weights_TK=weights_TK, may_drop=True)

    @torch.no_grad()
    def _fill_ins(self, routing: Routing, experts_TK: Tensor, groups: _Groups, capacity_G: Tensor) -> Tensor:
        """Return the expert whose free slot each token gets, -1 for none: `[T]`."""
        logits_TE, first_TK = routing.logits_TE, routing.experts_TK
        assert logits_TE is not None
        assert first_TK is not None
        chosen_TE = torch.zeros_like(logits_TE).scatter_add(
            1, first_TK.clamp_min(0), (first_TK >= 0).to(logits_TE.dtype)
        )
        score_T, next_T = logits_TE.masked_fill(chosen_TE > 0, -torch.inf).max(1)
        wants_T = (score_T > -torch.inf) & (groups.group_T >= 0)
        group_T = groups.group_T.clamp_min(0)
        taken_TK = torch.where(experts_TK >= 0, group_T.unsqueeze(1) * self.spec.num_experts + experts_TK, -1)
        taken = torch.bincount(taken_TK[taken_TK >= 0], minlength=len(capacity_G) * self.spec.num_experts)
        free = capacity_G.repeat_interleave(self.spec.num_experts) - taken
        bin_T = torch.where(wants_T, group_T * self.spec.num_experts + next_T, -1)
        rank_T = _rank_in_bin(bin_T, score_T.sort(descending=True, stable=True).indices)
        fits_T = wants_T & (rank_T < free[bin_T.clamp_min(0)]) if len(free) else wants_T & False
        return torch.where(fits_T, next_T, -1)


class _Groups(NamedTuple):
    """Tokens that share a capacity: the group of each (-1 for padding), and the same laid out in rows."""

    group_T: Tensor
    sequences: Sequences

    @classmethod
    def of(cls, num_tokens: int, ids_T: Tensor | None, padding_mask: Tensor | None, device: torch.device) -> _Groups:
        sequences = group_by_sequence(num_tokens, ids_T, padding_mask, device)
        length = sequences.real_GS.shape[1]
        group_T = sequences.token_R.new_full((num_tokens,), -1)
        if length:
            group_T = group_T.index_copy(0, sequences.token_R, sequences.place_R // length)
        return cls(group_T, sequences)


def _rank_in_bin(bin_N: Tensor, order_N: Tensor) -> Tensor:
    """Return how many assignments of the same bin are served before each one."""
    served_N = bin_N.index_select(0, order_N)
    sorted_N, by_bin_N = served_N.sort(stable=True)
    within_N = torch.arange(len(bin_N), device=bin_N.device) - torch.searchsorted(sorted_N, sorted_N)
    return torch.empty_like(bin_N).index_copy(0, order_N.index_select(0, by_bin_N), within_N)
