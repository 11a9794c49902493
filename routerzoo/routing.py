"""What a router is told (`LayerSpec`, `RoutingContext`) and what it answers (`Routing`)."""
# Shape suffixes: T tokens, K choices per token, E experts, N assignments (token-expert pairs),
# G groups of tokens (sequences), S tokens of one group, P slots of one expert.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

CONTEXT_FIELDS = frozenset(
    {"token_ids", "positions", "sequence_ids", "padding_mask", "task_ids", "attention", "step", "total_steps"}
)
"""The fields of a `RoutingContext` that a router can require."""


@dataclass(frozen=True)
class LayerSpec:
    """What a MoE layer knows when it builds its router and its experts.

    Args:
        d_model: width of the hidden states.
        num_experts: experts in the layer.
        layer: index of the layer among the MoE layers of its model, from 0.
        num_layers: number of MoE layers in the model.
        vocab_size: number of distinct token ids, where the model has any.
        num_positions: longest sequence that the model takes, where it has a limit.
        hidden_dim: width of the feed-forward network that the experts stand in for, where there is one.
        num_tasks: number of tasks (corpora, say) that tokens come from, where the model tells them apart.
        provides: the `RoutingContext` fields that the model fills in on every call. A router that requires another
            one is refused when it is built.
        decoder: True where a token must not see later ones; a router that is not `causal` is then refused.

    Raises:
        ValueError: a size below 1, or a provided field that no context has.
    """

    d_model: int
    num_experts: int
    layer: int = 0
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
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if unknown := self.provides - CONTEXT_FIELDS:
            raise ValueError(f"no context field is called {', '.join(sorted(unknown))}; there are {_known_fields()}")


def _known_fields() -> str:
    return ", ".join(sorted(CONTEXT_FIELDS))


@dataclass(frozen=True)
class RoutingContext:
    """Everything that a router may look at beside the hidden states. Each field is optional.

    A model makes one for each forward pass and hands the same one to all its MoE layers.

    Args:
        token_ids: [tokens] int64, which token each is.
        positions: [tokens] int64, place of each token in its sequence, from 0.
        sequence_ids: [tokens] int64, the sequence that each token belongs to.
        padding_mask: [tokens] bool, True where a token is padding. The MoE layer sends padding to no expert.
        task_ids: [tokens] int64, the task that each token belongs to.
        attention: [tokens, heads, keys], what each token pays to the places of its sequence in the attention layer
            before the MoE layer, after the softmax. Models compute it for the layers whose routers require it.
        step: optimiser steps taken so far.
        total_steps: optimiser steps that the run will take.
        carry: what one MoE layer leaves for the next (recurrent and shared routers live on it).
        process_group: processes that train on parts of one batch. What is defined over the batch, such as balance
            losses, is then taken over the tokens of all of them, and all of them must route at the same time.
        routings: the answer of each layer's router by layer index, filled in by the layers during the pass.
        compute_aux_losses: False where nobody will read the routings' losses, so that a router need not compute them.
    """

    token_ids: Tensor | None = None
    positions: Tensor | None = None
    sequence_ids: Tensor | None = None
    padding_mask: Tensor | None = None
    task_ids: Tensor | None = None
    attention: Tensor | None = None
    step: int | None = None
    total_steps: int | None = None
    process_group: ProcessGroup | None = None
    carry: dict[str, Any] = field(default_factory=dict)
    routings: dict[int, Routing] = field(default_factory=dict)
    compute_aux_losses: bool = True


class Assignments(NamedTuple):
    """Token-expert pairs, the form that dispatch works on.

    Pairs with expert -1 name no expert. Where `top_k` is set, pair `n` belongs to token `n // top_k`.
    """

    token_N: Tensor
    expert_N: Tensor
    weight_N: Tensor
    top_k: int | None
    may_drop: bool


@dataclass(frozen=True)
class Routing:
    """A router's answer for T tokens, in one of four forms.

    *Sparse*: `experts_TK` and `weights_TK`; most routers. Fewer than K experts for a token is padding with -1.
    *Flat*: `token_N`, `expert_N`, `weight_N`; where experts choose tokens, or k varies widely.
    *Dense*: `dispatch_GSEP` and `combine_GSEP`; where every expert computes P slots that mix the tokens of a group.
    *Merged*: `merge_GE` and `group_T`; where each group of tokens is computed by one mixture of all experts.

    Args:
        experts_TK: int64, chosen experts; -1 for none.
        weights_TK: what each chosen expert's output is multiplied with, in the hidden dtype; 0 for none.
        logits_TE: float32, scores before any normalisation; None for a router that has none.
        losses: raw scalar losses by name. The task multiplies them with its coefficients; nobody else does.
        balance_probs_TE: float32, the scores that balance losses are taken on; None for the softmax of `logits_TE`.
        may_drop: False promises that `experts_TK` holds no -1, which saves a pass over the hidden states.
        token_N: int64, the token of each assignment.
        expert_N: int64, the expert of each assignment; -1 for none.
        weight_N: weight of each assignment.
        dispatch_GSEP: share of each token in each slot.
        combine_GSEP: share of each slot in each token's output.
        merge_GE: weight of each expert's parameters in the one that computes a group.
        group_T: int64, the group of each token; -1 for none.
    """

    experts_TK: Tensor | None = None
    weights_TK: Tensor | None = None
    logits_TE: Tensor | None = None
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    balance_probs_TE: Tensor | None = None
    may_drop: bool = True
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

    def assignments(self) -> Assignments:
        """Return the token-expert pairs.

        Raises:
            ValueError: a dense routing has none.
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
        """Return how many assignments each expert gets, float32 `[num_experts]`, without a host synchronisation.

        An expert's load in a dense routing is the number of its slots, in a merged one the sum of its weights over
        tokens.
        """
        if self.merge_GE is not None and self.group_T is not None:
            return self.merged_weights().float().sum(0)
        if self.dispatch_GSEP is not None:
            groups, _, _, slots = self.dispatch_GSEP.shape
            return self.dispatch_GSEP.new_full((num_experts,), float(groups * slots), dtype=torch.float32)
        expert_N = self.assignments().expert_N
        # One extra bin collects the -1 of padded choices.
        load = torch.zeros(num_experts + 1, device=expert_N.device)
        ones_N = torch.ones(expert_N.shape, device=expert_N.device)
        return load.scatter_add_(0, expert_N.remainder(num_experts + 1), ones_N)[:num_experts]
