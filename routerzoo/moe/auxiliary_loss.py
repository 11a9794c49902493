"""Auxiliary losses of a model: functions of its layers' routings, weighted and reduced over layers."""
# Shape suffixes: T tokens, E experts.

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from routerzoo.functional.losses import Scope, balance_loss, importance_loss, load_loss, scope_of, z_loss
from routerzoo.functional.topk import topk_indices
from routerzoo.moe.layer import MoE, inner_router, moe_layers
from routerzoo.moe.softmax_losses import softmax_losses
from routerzoo.moe.step_load import StepLoad
from routerzoo.router import LossWeight, Router
from routerzoo.routing import LayerRouting, Routing, RoutingContext


def auxiliary_loss(
    model: nn.Module | Iterable[MoE],
    context: RoutingContext,
    weights: Mapping[str, float | LossWeight] | None = None,
    *,
    token_losses: Tensor | None = None,
) -> Tensor:
    """Return what a training loop adds to its loss: the weighted sum of all auxiliary losses, a scalar.

    Args:
        model: the model, or its MoE layers.
        context: the context that the model was called with.
        weights: coefficients by name, summed over layers unless a `LossWeight` says otherwise; by default those that
            each router's source publishes, reduced over layers as it does.
        token_losses: the task's loss of each token, `[tokens]` or `[batch, sequence]`, 0 for tokens without a target;
            needed by routers that learn from it (`Router.feedback`).

    Returns:
        0 where there is nothing to add.

    Raises:
        ValueError: a loss that a router does not have, a context that none of the layers was called with, or
            `token_losses` of another number of tokens.

    Example:
        >>> import torch
        >>> from routerzoo import MoE, RoutingContext
        >>> layer, context = MoE(d_model=8, num_experts=4), RoutingContext()
        >>> y = layer(torch.randn(2, 5, 8), context)
        >>> auxiliary_loss(layer, context, {"balance": 0.01}).requires_grad
        True
    """
    losses = list(auxiliary_losses(model, context, weights, token_losses=token_losses).values())
    if not losses:
        parameters = (p for module in ([model] if isinstance(model, nn.Module) else model) for p in module.parameters())
        return torch.zeros((), device=next((parameter.device for parameter in parameters), None))
    return torch.stack(losses).sum() if len(losses) > 3 else sum(losses[1:], losses[0])


def auxiliary_losses(
    model: nn.Module | Iterable[MoE],
    context: RoutingContext,
    weights: Mapping[str, float | LossWeight] | None = None,
    *,
    token_losses: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the terms of `auxiliary_loss` by name, weighted and reduced over layers; the arguments are the same."""
    layers = list(moe_layers(model)) if isinstance(model, nn.Module) else list(model)
    published = [entry for entry in context.routings if entry.layer in layers]
    if layers and not published:
        raise ValueError(
            "no MoE layer of the model was called with this context: hand it to the layers, or call the model inside "
            "`with provide_context(model, context)`"
        )
    if (missing := len(layers) - len({entry.layer for entry in published})) > 0 and published:
        warnings.warn(
            f"{missing} of {len(layers)} MoE layers were not called with this context, so that their auxiliary losses "
            "are missing: hand it to all of them",
            stacklevel=3,
        )
    groups: dict[tuple[str, LossWeight], list[LayerRouting]] = {}
    for entry in published:
        given = inner_router(entry.layer).default_loss_weights if weights is None else weights  # type: ignore[arg-type]
        for name, weight in given.items():
            declared = weight if isinstance(weight, LossWeight) else LossWeight(weight)
            if declared.value != 0:
                groups.setdefault((name, declared), []).append(entry)
    for entry in published:
        wanted = {name for (name, _), entries in groups.items() if entry in entries}
        _learn(entry, context, token_losses, wanted - ROUTING_LOSSES.keys() - {GLOBAL_BALANCE})
    losses: dict[str, Tensor] = {}
    for (name, weight), entries in groups.items():
        loss = weight.value * _reduced(name, weight, entries, context)
        losses[name] = losses[name] + loss if name in losses else loss
    return losses


class UnavailableLossError(ValueError):
    """A loss that a router does not have; `loss_of` says what follows the router's name."""


def loss_of(name: str, routing: Routing, context: RoutingContext) -> Tensor:
    """Return a routing's raw loss of that name: the router's own where it has one, else the function of its routing.

    Raises:
        UnavailableLossError: it has no such loss.
    """
    if name in routing.losses:
        return routing.losses[name]
    routing = routing.for_losses
    loss = ROUTING_LOSSES[name](routing, context) if name in ROUTING_LOSSES else None
    if loss is None:
        declared = {*ROUTING_LOSSES, GLOBAL_BALANCE}
        known = sorted({*routing.losses, *(declared if routing.logits_TE is not None else ())})
        raise UnavailableLossError(f"has no loss {name!r}; it has {', '.join(known) or 'none'}")
    return loss


def _reduced(name: str, weight: LossWeight, entries: list[LayerRouting], context: RoutingContext) -> Tensor:
    router = inner_router(entries[0].layer)  # type: ignore[arg-type]
    try:
        if weight.over_layers == "pooled" and name == GLOBAL_BALANCE:
            raise ValueError("each layer counts its own load: give a weight that is summed over layers, or their mean")
        if weight.over_layers == "pooled" and name in ROUTING_LOSSES and name not in entries[0].routing.losses:
            return loss_of(name, *_pooled([entry.routing.for_losses for entry in entries], context))
        losses = [_loss_of_entry(name, entry, context) for entry in entries]
    except UnavailableLossError as error:
        raise UnavailableLossError(f"{type(router).__name__} {error}") from None
    except ValueError as error:
        raise ValueError(f"the loss {name!r} of {type(router).__name__} cannot be computed: {error}") from None
    total = torch.stack(losses).sum() if len(losses) > 1 else losses[0]
    return total if weight.over_layers == "sum" else total / len(losses)


def _loss_of_entry(name: str, entry: LayerRouting, context: RoutingContext) -> Tensor:
    if name == GLOBAL_BALANCE and name not in entry.routing.losses:
        return _global_balance(entry, context)
    return loss_of(name, entry.routing, context)


def _global_balance(entry: LayerRouting, context: RoutingContext) -> Tensor:
    """Return the balance loss whose load counts the earlier micro-batches of the optimizer step too."""
    step_load: StepLoad | None = entry.layer.step_load  # type: ignore[assignment]
    routing = entry.routing.for_losses
    counted_TK = _balanced_choices(routing)
    if counted_TK is None:
        raise UnavailableLossError("has no loss 'global_balance': it has no logits, or does not choose experts")
    if step_load is None:
        raise ValueError(
            "it counts over the micro-batches of an optimizer step: call routerzoo.attach(model, optimizer) once, or "
            "add the callback routerzoo.RouterHooks() to the Trainer"
        )
    loss = _balance(routing, context, earlier_E=step_load.earlier_E)
    assert loss is not None
    counted = Routing(counted_TK, counted_TK)
    step_load.follow(entry, counted.expert_load(routing.balance_scores().shape[1]))
    return loss


def _learn(entry: LayerRouting, context: RoutingContext, token_losses: Tensor | None, wanted: set[str]) -> None:
    """Add to a routing the losses that its router takes from the task's, in place of those of an earlier call."""
    router: Router = inner_router(entry.layer)  # type: ignore[arg-type]
    if not (router.wants_feedback and wanted):
        return
    if token_losses is None:
        if missing := sorted(wanted - entry.routing.losses.keys()):
            raise ValueError(
                f"{type(router).__name__} learns {missing[0]!r} from the task's loss of each token: give token_losses"
            )
        return
    routing, losses_T = entry.routing.for_losses, token_losses.detach().flatten()
    per_token = (getattr(routing, name) for name in ("logits_TE", "weights_TK", "experts_TK"))
    num_tokens = next((len(value) for value in per_token if value is not None), len(losses_T))
    if len(losses_T) != num_tokens:
        raise ValueError(
            f"token_losses has {len(losses_T)} entries, and {type(router).__name__} routed {num_tokens} tokens: give "
            "the loss of each token of the batch, 0 for those without a target"
        )
    learned = router.feedback(routing, context, losses_T)
    entry.routing = replace(entry.routing, losses={**entry.routing.losses, **learned})


def _pooled(routings: list[Routing], context: RoutingContext) -> tuple[Routing, RoutingContext]:
    """Return one routing of the tokens of all layers, and its context.

    Raises:
        UnavailableLossError: layers whose routings cannot be joined.
    """
    if len({(None if r.logits_TE is None else r.logits_TE.shape[1], r.experts_TK is None) for r in routings}) > 1:
        raise UnavailableLossError(
            "has layers of different sizes, whose losses cannot be pooled: give weights that are summed"
        )
    first, times = routings[0], len(routings)
    if first.dense or first.logits_TE is None:
        raise UnavailableLossError("has no logits, or mixes tokens, so that its losses cannot be pooled over layers")
    num_tokens = len(first.logits_TE)
    fields: dict[str, Any] = {}
    scores = ("logits_TE", "clean_logits_TE", "balance_probs_TE")
    for name in (*scores, "weights_TK", "experts_TK", "weight_N", "expert_N"):
        values = [getattr(routing, name) for routing in routings]
        if all(value is not None for value in values):
            fields[name] = torch.cat(values)
    if first.token_N is not None:
        fields["token_N"] = torch.cat([r.assignments().token_N + i * num_tokens for i, r in enumerate(routings)])
    if len({(r.score_fn, r.balance_probs_TE is None) for r in routings}) > 1:
        fields["balance_probs_TE"] = torch.cat([routing.balance_scores() for routing in routings])
    if len({type(routing.noise_std) for routing in routings}) > 1:
        raise UnavailableLossError("has layers with and without noise, whose losses cannot be pooled: sum them")
    if len({routing.balances_by_score for routing in routings}) > 1:
        raise UnavailableLossError(
            "has layers with and without a selection bias, whose losses cannot be pooled: sum them"
        )
    if isinstance(first.noise_std, Tensor):
        fields["noise_std"] = torch.cat([r.noise_std for r in routings if isinstance(r.noise_std, Tensor)])
    repeated = {
        name: None if values is None else values.repeat(times)
        for name, values in (("padding_mask", context.padding_mask), ("sequence_ids", context.sequence_ids))
    }
    return replace(first, losses={}, **fields), context.new_pass(attention=None, **repeated)


def _balance(
    routing: Routing,
    context: RoutingContext,
    scope: Scope = "batch",
    weighted: bool = False,
    earlier_E: Tensor | None = None,
) -> Tensor | None:
    plain = scope == "batch" and not weighted and earlier_E is None
    if plain and (both := softmax_losses(routing, context)) is not None:
        return both[0]
    experts_TK = _balanced_choices(routing)
    if experts_TK is None:
        return None
    scores_TE = routing.balance_scores()
    may_drop = not routing.balances_by_score and (routing.may_drop or routing.experts_TK is None)
    normalized = routing.balance_probs_TE is None and routing.score_fn == "softmax"
    return balance_loss(
        scores_TE,
        experts_TK,
        weighted=weighted,
        normalized=normalized,
        may_drop=may_drop,
        earlier_E=earlier_E,
        **scope_of(scope, context),
    )


def _local_balance(routing: Routing, context: RoutingContext) -> Tensor | None:
    """Balance this process's micro-batch by itself, as many training loops do."""
    return _balance(routing, context.replace(process_group=None))


def _balanced_choices(routing: Routing) -> Tensor | None:
    """Return the choices that balance losses count, -1 for none; None where there are no logits or no choices."""
    experts_TK = _choices(routing)
    if experts_TK is None or not routing.balances_by_score:
        return experts_TK
    return topk_indices(routing.balance_scores().detach(), experts_TK.shape[1])


def _choices(routing: Routing) -> Tensor | None:
    """Return the choices of each token, -1 for none; None where there are no logits or no choices."""
    if routing.logits_TE is None or routing.dense:
        return None
    if routing.experts_TK is not None:
        return routing.experts_TK
    pairs = routing.assignments()
    num_tokens, num_experts = routing.logits_TE.shape
    flat = pairs.expert_N.new_full((num_tokens * num_experts + 1,), -1)
    place_N = torch.where(pairs.expert_N >= 0, pairs.token_N * num_experts + pairs.expert_N, num_tokens * num_experts)
    return flat.index_copy(0, place_N, pairs.expert_N)[:-1].view(num_tokens, num_experts)


def _importance(routing: Routing, context: RoutingContext) -> Tensor | None:
    """Shazeer's importance of the combine weights where the noise is learned; elsewhere V-MoE's, without noise."""
    if routing.logits_TE is None:
        return None
    if isinstance(routing.noise_std, Tensor) and routing.experts_TK is not None and routing.weights_TK is not None:
        kept_TK = routing.weights_TK.to(routing.logits_TE.dtype)
        gates_TE = torch.zeros_like(routing.logits_TE)
        gates_TE = gates_TE.scatter_add(1, routing.experts_TK.clamp_min(0), kept_TK)
    elif routing.clean_logits_TE is not None:
        gates_TE = routing.clean_logits_TE.softmax(-1)
    else:
        gates_TE = routing.balance_scores()
    return importance_loss(gates_TE, **scope_of("batch", context))


def _load(routing: Routing, context: RoutingContext) -> Tensor | None:
    """Shazeer's load where the noise is learned; elsewhere V-MoE's."""
    if routing.logits_TE is None or routing.experts_TK is None:
        return None
    clean_TE = routing.logits_TE if routing.clean_logits_TE is None else routing.clean_logits_TE
    return load_loss(
        clean_TE,
        routing.experts_TK.shape[1],
        noisy_logits_TE=routing.logits_TE,
        noise_std=routing.noise_std,
        exclude_itself=isinstance(routing.noise_std, Tensor),
        **scope_of("batch", context),
    )


def _z(routing: Routing, context: RoutingContext) -> Tensor | None:
    if (both := softmax_losses(routing, context)) is not None:
        return both[1]
    clean_TE = routing.logits_TE if routing.clean_logits_TE is None else routing.clean_logits_TE
    return None if clean_TE is None else z_loss(clean_TE, padding_mask=context.padding_mask)


GLOBAL_BALANCE = "global_balance"
"""The one loss that is no function of a routing alone: its load is that of an optimizer step."""
RoutingLoss = Callable[[Routing, RoutingContext], Tensor | None]
ROUTING_LOSSES: dict[str, RoutingLoss] = {
    "balance": _balance,
    "sequence_balance": partial(_balance, scope="sequence"),
    "local_balance": _local_balance,
    "weighted_balance": partial(_balance, weighted=True),
    "importance": _importance,
    "load": _load,
    "z": _z,
}
"""Losses that any router with logits has, by the name that loss weights use; None where a routing has not."""
