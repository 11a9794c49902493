"""Counterfactuals: the loss when another expert takes the place of a token's first choice."""
# Shape suffixes: T tokens, K choices per token, E experts, B sequences or images.

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from routerzoo.audit.observation import evaluating, mean_loss, rows_of
from routerzoo.audit.subject import Losses, Subject
from routerzoo.moe.layer import MoE, inner_router, moe_layers
from routerzoo.routing import LayerRouting, Routing, RoutingContext

Change = Literal["drop", "next", "random"]
CHANGES: tuple[Change, ...] = ("drop", "next", "random")


class BestExpert(NamedTuple):
    """What other first choices cost single tokens, in nats of the token's whole sequence or image, means over tokens.

    Args:
        tokens: how many were tried, one in each sequence.
        gain: loss with the router's choice minus the loss with the best of all experts.
        router_is_best: share of tokens whose loss no other expert lowers.
        next: loss with the next best by the router, minus that with its choice; None where it has no logits.
        random: the same for an expert drawn at random.
    """

    tokens: int
    gain: float
    router_is_best: float
    next: float | None
    random: float


def first_choice(routing: Routing) -> Tensor:
    """Return the column of each token's first choice, the expert of the largest weight, int64 `[T]`."""
    assert routing.experts_TK is not None
    assert routing.weights_TK is not None  # `Routing` has one whole form
    return routing.weights_TK.masked_fill(routing.experts_TK < 0, -torch.inf).argmax(1)


def with_first(routing: Routing, experts_T: Tensor | None, rows_T: Tensor | None = None) -> Routing:
    """Return a routing with another first choice, under the weight of the one that it replaces.

    Args:
        routing: of k experts for each token.
        experts_T: the first choice of each token; None drops it, and the other weights stay as they are.
        rows_T: bool, the tokens to change; by default all that have an expert.
    """
    assert routing.experts_TK is not None
    assert routing.weights_TK is not None
    column_T1 = first_choice(routing).unsqueeze(1)
    changes_T1 = routing.experts_TK.gather(1, column_T1) >= 0
    if rows_T is not None:
        changes_T1 = changes_T1 & rows_T.unsqueeze(1)
    now_T1 = routing.experts_TK.gather(1, column_T1)
    given_T1 = torch.full_like(now_T1, -1) if experts_T is None else experts_T.unsqueeze(1)
    experts_TK = routing.experts_TK.scatter(1, column_T1, torch.where(changes_T1, given_T1, now_T1))
    weights_TK = routing.weights_TK
    if experts_T is None:
        weights_TK = weights_TK.scatter(1, column_T1, weights_TK.gather(1, column_T1).masked_fill(changes_T1, 0.0))
    return replace(
        routing, experts_TK=experts_TK, weights_TK=weights_TK, may_drop=routing.may_drop or experts_T is None
    )


def substitute(routing: Routing, change: Change, num_experts: int, generator: torch.Generator) -> Routing:
    """Return a routing whose first choices are dropped, or replaced by an expert that is not selected.

    That is the one with the largest logit (`next`; the second choice where k is 1), or any (`random`).
    """
    if change == "drop":
        return with_first(routing, None)
    assert routing.experts_TK is not None
    if change == "next":
        assert routing.logits_TE is not None  # `refusal` was asked
        scores_TE = routing.logits_TE
    else:
        scores_TE = torch.rand(len(routing.experts_TK), num_experts, generator=generator).to(routing.experts_TK.device)
    return with_first(routing, scores_TE.masked_fill(_selected(routing, num_experts), -torch.inf).argmax(1))


def _selected(routing: Routing, num_experts: int) -> Tensor:
    """Return which experts each token has, bool `[T, E]`."""
    assert routing.experts_TK is not None
    ids_TK = routing.experts_TK.remainder(num_experts + 1)  # one column more collects -1
    none = torch.zeros(len(ids_TK), num_experts + 1, dtype=torch.bool, device=ids_TK.device)
    return none.scatter(1, ids_TK, True)[:, :num_experts]


def refusal(layer: MoE, routing: Routing, change: Change | Literal["best"]) -> str | None:
    """Return why a counterfactual of a layer cannot be measured, None if it can."""
    name = type(inner_router(layer)).__name__
    if routing.experts_TK is None:
        return f"{name} names no experts in order for each token"
    if change != "drop" and routing.experts_TK.shape[1] >= layer.num_experts:
        return f"{name} selects all {layer.num_experts} experts, so that none can replace another"
    if change == "next" and routing.logits_TE is None:
        return f"{name} has no logits, hence no next choice"
    if change == "best" and not inner_router(layer).properties.batch_independent:
        return f"{name} is not batch independent: a token's expert cannot be changed alone"
    return None


@contextmanager
def _routed_as(layer: MoE, change: Callable[[Routing], Routing]) -> Iterator[None]:
    # The layer publishes and computes what its router returns.
    handle = layer.router.register_forward_hook(lambda module, args, routing: change(routing))
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def costs_of_changes(
    subject: Subject, batches: Sequence[Any], seed: int = 0
) -> tuple[float, list[dict[Change, float]], list[str]]:
    """Measure what each change costs when all tokens' first choices in one layer are changed at once.

    One forward pass of each batch for each layer and change, and one without any.

    Returns:
        The loss as it is, in nats; by layer and change what is added to it; and what was left out, in sentences.
    """
    layers = list(moe_layers(subject.net))
    routings = _routings(subject, batches[0])
    costs: list[dict[Change, float]] = []
    left_out: list[str] = []
    with evaluating(subject.net):
        before = mean_loss(map(subject.losses, batches))
        for index, layer in enumerate(layers):
            costs.append({})
            for change in CHANGES:
                if (reason := refusal(layer, routings[layer], change)) is not None:
                    left_out.append(f"MoE layer {index}, counterfactual {change!r}: {reason}")
                    continue
                generator = torch.Generator().manual_seed(seed)

                def changed(
                    routing: Routing, change: Change = change, count: int = layer.num_experts, g: Any = generator
                ) -> Routing:
                    return substitute(routing, change, count, g)

                with _routed_as(layer, changed):
                    costs[index][change] = mean_loss(map(subject.losses, batches)) - before
    return before, costs, left_out


@torch.inference_mode()
def best_experts(subject: Subject, batches: Sequence[Any], seed: int = 0) -> tuple[list[BestExpert | None], list[str]]:
    """Try every expert as the first choice of one token in each sequence or image.

    Each layer takes as many passes of each batch as it has experts. Only one token of a sequence is changed at a time,
    so that what its sequence loses or gains is due to that token's expert, also where later tokens see it.

    Returns:
        By layer the result, None where there is none; and what was left out, in sentences.
    """
    results: list[BestExpert | None] = []
    left_out: list[str] = []
    generator = torch.Generator().manual_seed(seed)
    with evaluating(subject.net):
        first = _routings(subject, batches[0])
        reasons = [refusal(layer, first[layer], "best") for layer in moe_layers(subject.net)]
        tried: list[list[Tensor]] = [[] for _ in reasons]
        for batch in batches:
            routings, sequences_T = _routings(subject, batch), _sequences(subject, batch)
            for index, layer in enumerate(moe_layers(subject.net)):
                if reasons[index] is None and sequences_T is None:
                    reasons[index] = "the model does not say which sequence a token is of"
                if reasons[index] is None and sequences_T is not None:
                    tried[index].append(_tried(subject, batch, layer, routings[layer], sequences_T, generator))
    for index, (reason, parts) in enumerate(zip(reasons, tried, strict=True)):
        results.append(None if reason is not None else _best(torch.cat(parts)))
        if reason is not None:
            left_out.append(f"MoE layer {index}, counterfactual 'best': {reason}")
    return results, left_out


def _tried(
    subject: Subject, batch: Any, layer: MoE, routing: Routing, sequences_T: Tensor, generator: torch.Generator
) -> Tensor:
    """Return the loss of each sequence by the expert of its chosen token, over that with the router's own, `[B, E+1]`.

    Entries of experts that the token has beside its first choice are NaN. The last column is that of the next choice.
    """
    assert routing.experts_TK is not None
    real_T = (routing.experts_TK >= 0).any(1)
    order_T = torch.rand(len(real_T), generator=generator).to(real_T.device).masked_fill(~real_T, -1)
    num_sequences = int(sequences_T.max()) + 1
    largest_B = order_T.new_full((num_sequences,), -1).scatter_reduce(0, sequences_T, order_T, "amax")
    rows_T = real_T & (order_T == largest_B[sequences_T])
    places = rows_T.nonzero().squeeze(1)
    chosen_B = sequences_T[places]
    selected_TE = _selected(routing, layer.num_experts)
    first_T = routing.experts_TK.gather(1, first_choice(routing).unsqueeze(1)).squeeze(1)
    columns = []
    for expert in range(layer.num_experts):

        def changed(routing: Routing, expert: int = expert) -> Routing:
            if routing.experts_TK is None or len(routing.experts_TK) != len(rows_T):
                return routing
            return with_first(routing, torch.full_like(first_T, expert), rows_T)

        with _routed_as(layer, changed):
            losses = subject.losses(batch)
        assert losses is not None  # asked for losses before
        columns.append(losses.sums_B.double()[chosen_B])
    loss_BE = torch.stack(columns, 1)
    own_B1 = loss_BE.gather(1, first_T[places].unsqueeze(1))
    others_BE = selected_TE[places].scatter(1, first_T[places].unsqueeze(1), False)
    added_BE = (loss_BE - own_B1).masked_fill(others_BE, torch.nan)
    next_B1 = torch.full_like(own_B1, torch.nan)
    if routing.logits_TE is not None:
        next_B1 = added_BE.gather(
            1, routing.logits_TE[places].masked_fill(selected_TE[places], -torch.inf).argmax(1, keepdim=True)
        )
    return torch.cat([added_BE, next_B1], 1)


def _best(added: Tensor) -> BestExpert:
    added_BE, next_B = added[:, :-1], added[:, -1]
    lowest_B = added_BE.nan_to_num(nan=torch.inf).amin(1)
    others_B = (~added_BE.isnan()).sum(1) - 1  # the router's own choice is there too, and adds nothing
    return BestExpert(
        len(added),
        float(-lowest_B.mean()) + 0.0,  # never -0
        float((lowest_B >= 0).double().mean()),
        None if next_B.isnan().all() else float(next_B.nanmean()),
        float((added_BE.nansum(1) / others_B).mean()),
    )


def _routings(subject: Subject, batch: Any) -> dict[MoE, Routing]:
    """Return each layer's routing of a batch, that of its first call."""
    found: dict[MoE, Routing] = {}

    def take(published: LayerRouting, context: RoutingContext) -> None:
        found.setdefault(published.layer, published.routing)  # type: ignore[arg-type]

    _watched(subject, batch, take)
    return found


def _sequences(subject: Subject, batch: Any) -> Tensor | None:
    """Return the row of `Losses` that each token of a batch counts in, int64 `[T]`; None where nothing says it."""
    found: list[tuple[LayerRouting, RoutingContext]] = []
    losses = _watched(subject, batch, lambda published, context: found.append((published, context)))
    assert losses is not None  # asked for losses before
    return rows_of(subject, *found[0], len(losses.sums_B))


def _watched(subject: Subject, batch: Any, take: Callable[[LayerRouting, RoutingContext], None]) -> Losses | None:
    handles = [layer.register_routing_hook(take) for layer in moe_layers(subject.net)]
    try:
        with evaluating(subject.net):
            return subject.losses(batch)
    finally:
        for handle in handles:
            handle.remove()
