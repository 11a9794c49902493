"""What a router takes (`LayerSpec`, `RoutingContext`) and what it returns (`Routing`)."""
# Shape suffixes: T tokens, K choices per token, E experts, N assignments (token-expert pairs),
# G groups of tokens (sequences), S tokens of one group, P slots of one expert.

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils._pytree import GetAttrKey, register_pytree_node

from routerzoo.functional.topk import ScoreFunction, apply_score_fn

TOKEN_FIELDS = ("token_ids", "positions", "sequence_ids", "padding_mask", "task_ids", "attention")
CONTEXT_FIELDS = frozenset({*TOKEN_FIELDS, "step", "total_steps"})
"""The fields of a `RoutingContext` that a router can require."""


@dataclass(frozen=True)
class LayerSpec:
    """What a MoE layer knows when it builds its router and its experts.

    Args:
        d_model: width of the hidden states.
        num_experts: experts in the layer.
        layer: index of the layer among the MoE layers of its model, from 0; None where the model does not number them.
            A router that differs from layer to layer requires it.
        num_layers: number of MoE layers in the model.
        vocab_size: number of distinct token ids, where the model has any.
        num_positions: longest sequence that the model takes, where it has a limit.
        hidden_dim: width of the feed-forward network that the experts stand in for, where there is one.
        num_tasks: number of tasks (corpora, say) that tokens come from, where the model distinguishes them.
        provides: the `RoutingContext` fields that the model fills in on every call. A router that requires another
            one is refused when it is built.
        decoder: True where a token must not see later ones; a router that is not `causal` is then refused.

    Raises:
        ValueError: a size below 1, or no whole number; a negative layer; or a provided field that no context has.
    """

    d_model: int
    num_experts: int
    layer: int | None = None
    num_layers: int = 1
    vocab_size: int | None = None
    num_positions: int | None = None
    hidden_dim: int | None = None
    num_tasks: int | None = None
    provides: frozenset[str] = CONTEXT_FIELDS
    decoder: bool = False

    def __post_init__(self) -> None:
        for name in ("d_model", "num_experts", "num_layers", "vocab_size", "num_positions", "hidden_dim", "num_tasks"):
            size = getattr(self, name)
            if size is not None and checked_whole(name, size) < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if self.layer is not None and checked_whole("layer", self.layer) < 0:
            raise ValueError(f"layer must be at least 0, got {self.layer}")
        if unknown := self.provides - CONTEXT_FIELDS:
            raise ValueError(f"no context field is called {', '.join(sorted(unknown))}; there are {_known_fields()}")


def checked_whole(name: str, value: Any) -> int:
    """Return an integer of any type as Python's.

    Raises:
        ValueError: it is none, such as 1.5, which a tensor of integers would cut to 1 in silence.
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{name} must be a whole number, got {value!r}")


def _known_fields() -> str:
    return ", ".join(sorted(CONTEXT_FIELDS))


class RoutingContext:
    """Everything that a router may look at beside the hidden states, and where its layers leave their routings.

    A model makes one for each forward pass and hands the same one to all its MoE layers. Every field is optional. It is
    a plain class: FSDP2 rebuilds dataclasses among a module's arguments, and what layers wrote would be lost.

    Args:
        token_ids: int64 `[tokens]`, which token each is. Fields of tokens may also come as `[batch, sequence]`; they
            are flattened.
        positions: int64 `[tokens]`, place of each token in its sequence, from 0.
        sequence_ids: int64 `[tokens]`, the sequence that each token belongs to.
        padding_mask: bool `[tokens]`, True where a token is padding. The MoE layer sends padding to no expert.
        task_ids: int64 `[tokens]`, the task that each token belongs to.
        attention: `[tokens, heads, keys]`, what each token pays to the places of its sequence in the attention layer
            before the MoE layer, after the softmax. Models compute it for the layers whose routers require it.
        step: optimizer steps taken so far.
        total_steps: optimizer steps that the run will take.
        process_group: processes that train on parts of one batch. What is defined over the batch, such as balance
            losses, is then taken over the tokens of all of them, and all of them must route at the same time.
        compute_aux_losses: False where nobody will read auxiliary losses, so that a router need not compute any.
        cache: what routers may keep as long as no weight changes, for the passes of one generation; None keeps nothing.

    Attributes:
        routings: what each call of each layer published, in the order of the calls.
        carry: what routers leave for later layers of the same pass (recurrent and shared ones live on it).
    """

    def __init__(
        self,
        token_ids: Tensor | None = None,
        positions: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        task_ids: Tensor | None = None,
        attention: Tensor | None = None,
        step: int | None = None,
        total_steps: int | None = None,
        process_group: ProcessGroup | None = None,
        compute_aux_losses: bool = True,
        cache: dict[Any, Any] | None = None,
    ) -> None:
        self.token_ids = _flat(token_ids)
        self.positions = _flat(positions)
        self.sequence_ids = _flat(sequence_ids)
        self.padding_mask = _flat(padding_mask)
        self.task_ids = _flat(task_ids)
        self.attention = _flat(attention, 3)
        self.step, self.total_steps = step, total_steps
        self.process_group = process_group
        self.compute_aux_losses = compute_aux_losses
        self.cache = cache
        self._pass = _Pass()

    @property
    def routings(self) -> list[LayerRouting]:
        """What each call of each layer published, in the order of the calls."""
        return self._pass.routings

    @property
    def carry(self) -> dict[Any, Any]:
        """What routers leave for later layers of the same pass."""
        return self._pass.carry

    @property
    def is_finished(self) -> bool:
        """Whether the forward pass is over: the context serves its recomputation only."""
        return self._pass.is_finished

    def finish(self) -> None:
        """Say that the forward pass is over."""
        self._pass.is_finished = True

    def routings_of(self, layer: nn.Module) -> list[Routing]:
        """Return the routings of a MoE layer, one for each call; none where it was not called with this context."""
        return [published.routing for published in self.routings if published.layer is layer]

    def replace(self, **changes: Any) -> RoutingContext:
        """Return a context with other fields, of the same pass: routings and carry are shared."""
        changed = self.new_pass(**changes)
        changed._pass = self._pass
        return changed

    def new_pass(self, **changes: Any) -> RoutingContext:
        """Return a context with these fields, changed where given, for a pass of its own."""
        fields = {name: value for name, value in vars(self).items() if name != "_pass"}
        return RoutingContext(**{**fields, **changes})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RoutingContext:
        """Return it with its tensors on a device; what was published stays where it is."""
        tensors = {name: getattr(self, name) for name in TOKEN_FIELDS}
        moved = {n: t.to(device, non_blocking=non_blocking) for n, t in tensors.items() if t is not None}
        return self.replace(**moved)


class _Pass:
    """What is shared by all contexts of one forward pass. Equal to any other: pytree specifications compare them."""

    def __init__(self) -> None:
        self.routings: list[LayerRouting] = []
        self.carry: dict[Any, Any] = {}
        self.is_finished = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Pass)

    def __hash__(self) -> int:
        return hash(_Pass)


def _flat(values: Tensor | None, ndim: int = 1) -> Tensor | None:
    return values.flatten(0, 1) if isinstance(values, Tensor) and values.ndim == ndim + 1 else values


def _flatten_context(context: RoutingContext) -> tuple[list[Any], tuple[Any, ...]]:
    # Routings of an exported model are no part of its interface.
    shared = _Pass() if torch.compiler.is_exporting() else context._pass
    rest = (context.step, context.total_steps, context.process_group, context.compute_aux_losses, context.cache)
    return [getattr(context, name) for name in TOKEN_FIELDS], (*rest, shared)


def _unflatten_context(tensors: Any, rest: tuple[Any, ...]) -> RoutingContext:
    context = RoutingContext()
    for name, tensor in zip(TOKEN_FIELDS, tensors, strict=True):
        setattr(context, name, tensor)
    names = ("step", "total_steps", "process_group", "compute_aux_losses", "cache", "_pass")
    for name, value in zip(names, rest, strict=True):
        setattr(context, name, value)
    return context


def _flatten_context_with_keys(context: RoutingContext) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
    tensors, rest = _flatten_context(context)
    return [(GetAttrKey(name), tensor) for name, tensor in zip(TOKEN_FIELDS, tensors, strict=True)], rest


def _dump_rest(rest: tuple[Any, ...]) -> str:
    step, total_steps, process_group, compute_aux_losses, cache, _ = rest
    if process_group is not None or cache:
        what = "process_group" if process_group is not None else "cache"
        raise ValueError(f"a RoutingContext with a {what} cannot be saved: export the model with {what} None")
    return json.dumps([step, total_steps, compute_aux_losses, cache])


def _load_rest(dumped: str) -> tuple[Any, ...]:
    step, total_steps, compute_aux_losses, cache = json.loads(dumped)
    return step, total_steps, None, compute_aux_losses, cache, _Pass()


register_pytree_node(
    RoutingContext,
    _flatten_context,
    _unflatten_context,
    # `torch.export.save` writes what an exported model is called with.
    serialized_type_name="routerzoo.RoutingContext",
    to_dumpable_context=_dump_rest,
    from_dumpable_context=_load_rest,
    flatten_with_keys_fn=_flatten_context_with_keys,
)


class LayerRouting:
    """The routing of one call of a MoE layer, after padding was removed.

    Args:
        layer: the MoE layer.
        call: which of its calls with this context, from 0.
        routing: what its router returned.
    """

    def __init__(self, layer: nn.Module, call: int, routing: Routing) -> None:
        self.layer, self.call, self.routing = layer, call, routing

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return it with the routing's tensors on a device; the layer stays where it is."""
        return type(self)(self.layer, self.call, self.routing.to(device, non_blocking))

    def __repr__(self) -> str:
        return f"LayerRouting(call={self.call}, routing={self.routing})"


class Assignments(NamedTuple):
    """Token-expert pairs, the form that dispatch works on.

    Pairs with expert -1 name no expert. Where `top_k` is set, pair `n` belongs to token `n // top_k`.
    """

    token_N: Tensor
    expert_N: Tensor
    weight_N: Tensor
    top_k: int | None
    may_drop: bool


@dataclass(eq=False)
class Routing:
    """A router's decision for T tokens, in one of four forms.

    *Sparse*: `experts_TK` and `weights_TK`; most routers. A token with fewer than K experts is padded with -1.
    *Flat*: `token_N`, `expert_N`, `weight_N`; where experts choose tokens, or k varies widely.
    *Soft*: `dispatch_GSEP` and `combine_GSEP`; where every expert computes P slots that mix the tokens of a group.
    *Merged*: `merge_GE` and `group_T`; where each group of tokens is computed by one mixture of all experts.

    Args:
        experts_TK: int64, chosen experts; -1 for none.
        weights_TK: what each chosen expert's output is multiplied with, in the hidden dtype; 0 for none.
        logits_TE: float32, the scores that experts were chosen by, before any normalization; None for a router that has
            none.
        losses: raw scalar losses of the router's own, by name: those that are no function of a routing. All others are
            computed from these fields; see `routerzoo.auxiliary_loss`.
        score_fn: turns logits into the scores that balance losses are taken on.
        balance_probs_TE: float32, these scores where they do not follow from `score_fn`.
        balances_by_score: balance losses count the experts of each token's largest scores, whatever was selected: under
            a selection bias or groups, DeepSeek-V3 (equation 18) and Megatron-core do so.
        clean_logits_TE: float32, the logits without noise, where noise was drawn.
        noise_std: standard deviation of that noise: a number, or `[T, E]` where it is learned.
        may_drop: False promises that no expert is -1, which saves a pass over the hidden states.
        selected: what a wrapper's router selected, where the wrapper changed it: losses and statistics are of this.
        token_N: int64, the token of each assignment.
        expert_N: int64, the expert of each assignment; -1 for none.
        weight_N: weight of each assignment.
        dispatch_GSEP: share of each token in each slot.
        combine_GSEP: share of each slot in each token's output.
        merge_GE: weight of each expert's parameters in the one that computes a group.
        group_T: int64, the group of each token; -1 for none.

    Raises:
        ValueError: not exactly one form.
    """

    experts_TK: Tensor | None = None
    weights_TK: Tensor | None = None
    logits_TE: Tensor | None = None
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    score_fn: ScoreFunction = "softmax"
    balance_probs_TE: Tensor | None = None
    balances_by_score: bool = False
    clean_logits_TE: Tensor | None = None
    noise_std: float | Tensor | None = None
    may_drop: bool = True
    selected: Routing | None = None
    token_N: Tensor | None = None
    expert_N: Tensor | None = None
    weight_N: Tensor | None = None
    dispatch_GSEP: Tensor | None = None
    combine_GSEP: Tensor | None = None
    merge_GE: Tensor | None = None
    group_T: Tensor | None = None

    def __post_init__(self) -> None:
        forms = [
            ("experts_TK", "weights_TK"),
            ("token_N", "expert_N", "weight_N"),
            ("dispatch_GSEP", "combine_GSEP"),
            ("merge_GE", "group_T"),
        ]
        given = [form for form in forms if any(getattr(self, name) is not None for name in form)]
        if len(given) != 1 or any(getattr(self, name) is None for name in given[0]):
            raise ValueError(
                "a Routing has exactly one form: experts_TK and weights_TK; or token_N, expert_N and weight_N; "
                "or dispatch_GSEP and combine_GSEP; or merge_GE and group_T"
            )

    @property
    def dense(self) -> bool:
        """Whether the routing mixes, tokens into slots or experts into one, instead of assigning tokens to experts."""
        return self.dispatch_GSEP is not None or self.merge_GE is not None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return it with its tensors on a device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {n: t.to(device, non_blocking=non_blocking) for n, t in tensors.items()}
        losses = {name: loss.to(device, non_blocking=non_blocking) for name, loss in self.losses.items()}
        selected = None if self.selected is None else self.selected.to(device, non_blocking)
        return replace(self, **moved, losses=losses, selected=selected)

    def detach(self) -> Self:
        """Return it without gradients, and without its losses."""
        detached: dict[str, Any] = {
            name: value.detach() for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **detached, losses={}, selected=None)

    @property
    def for_losses(self) -> Routing:
        """The routing that losses and statistics are taken on."""
        return self if self.selected is None else self.selected

    def balance_scores(self) -> Tensor:
        """Return the scores that balance losses are taken on, `[T, E]`.

        Raises:
            ValueError: the router has no logits.
        """
        if self.balance_probs_TE is not None:
            return self.balance_probs_TE
        if self.logits_TE is None:
            raise ValueError("this routing has no logits")
        return apply_score_fn(self.logits_TE, self.score_fn)

    def assignments(self) -> Assignments:
        """Return the token-expert pairs.

        Raises:
            ValueError: a soft or merged routing has none.
        """
        if self.experts_TK is not None and self.weights_TK is not None:
            num_tokens, top_k = self.experts_TK.shape
            token_N = torch.arange(num_tokens, device=self.experts_TK.device)
            token_N = token_N.unsqueeze(1).expand(-1, top_k).reshape(-1)
            return Assignments(token_N, self.experts_TK.reshape(-1), self.weights_TK.reshape(-1), top_k, self.may_drop)
        if self.token_N is None or self.expert_N is None or self.weight_N is None:
            raise ValueError("this routing mixes tokens, or experts; it has no assignments")
        return Assignments(self.token_N, self.expert_N, self.weight_N, None, self.may_drop)

    def merged_weights(self) -> Tensor:
        """Return the weight of each expert in what computes each token, `[T, E]`; zeros for a token without group.

        Raises:
            ValueError: the routing is of another form.
        """
        if self.merge_GE is None or self.group_T is None:
            raise ValueError("only a merged routing has such weights")
        nothing_1E = self.merge_GE.new_zeros(1, self.merge_GE.shape[1])
        return torch.cat([self.merge_GE, nothing_1E]).index_select(0, self.group_T.remainder(len(self.merge_GE) + 1))

    def expert_load(self, num_experts: int) -> Tensor:
        """Return how many assignments each expert gets, float32 `[num_experts]`, without a host synchronization.

        An expert's load in a soft routing is the number of its slots, in a merged one the sum of its weights over
        tokens.
        """
        if self.merge_GE is not None and self.group_T is not None:
            return self.merged_weights().float().sum(0)
        if self.dispatch_GSEP is not None:
            groups, _, _, slots = self.dispatch_GSEP.shape
            return self.dispatch_GSEP.new_full((num_experts,), float(groups * slots), dtype=torch.float32)
        expert_N = self.assignments().expert_N
        # One extra bin collects the -1 of padded choices.
        load = torch.zeros(num_experts + 1, device=expert_N.device, dtype=torch.float32)
        ones_N = torch.ones(expert_N.shape, device=expert_N.device, dtype=torch.float32)
        return load.scatter_add_(0, expert_N.remainder(num_experts + 1), ones_N)[:num_experts]
