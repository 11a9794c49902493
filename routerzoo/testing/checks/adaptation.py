"""Checks of what training moves, and of what it must not."""
# Shape suffixes: T tokens, D model width.

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from routerzoo.router import Router
from routerzoo.routing import Routing
from routerzoo.testing.cases import TOTAL_STEPS, Case, Cases, CheckFailure
from routerzoo.testing.checks.common import (
    MODES,
    changes,
    differs,
    draws_random_numbers,
    fail_unless,
    mode,
    require_same,
    snapshot,
)
from routerzoo.testing.loop import Loop, MakeOptimizer, adamw, sgd

Observed = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
"""Losses and statistics, by name."""


def stateless(cases: Cases) -> None:
    """A forward pass changes nothing in the router, and neither do its backward pass and `statistics`.

    What adapts in `route` moves once for each micro-batch, again when activation checkpointing repeats the pass, and in
    passes whose gradient is skipped. Return sums over tokens from `statistics`, and move what they move in `update`,
    which is called once per optimizer step.
    """

    def law(case: Case) -> None:
        for training in MODES:
            router, x_TD = case.router(training=training), case.hidden().requires_grad_()
            before = snapshot(router)
            first, losses = case.route_with_losses(router, x_TD, case.context())
            total = case.effect(first, x_TD).sum() + sum(losses.values())
            if total.requires_grad:
                torch.autograd.backward(total)
            if router.needs_updates:
                with torch.no_grad():
                    router.statistics(first.for_losses, case.context())
            changed = changes(before, snapshot(router))
            fail_unless(
                not changed,
                f"changes {', '.join(changed)} in a forward pass in {mode(training)}: return sums from `statistics`, "
                "and move it in `update`, which is called once per optimizer step",
            )
            again, losses_again = case.route_with_losses(router, x_TD, case.context())
            message = f"routes the same micro-batch differently the second time, in {mode(training)}"
            require_same(case, first, again, x_TD, message)
            for name, loss in losses.items():
                fail_unless(
                    not differs(losses_again[name], loss),
                    f"the loss {name!r} of one micro-batch is {loss.item():.6g}, then {losses_again[name].item():.6g}: "
                    "move what it depends on in `update`",
                )

    cases.each(law)


def frozen(cases: Cases) -> None:
    """What is frozen stays, bit for bit, through optimizer steps with momentum and weight decay.

    That is every buffer (but those named in `trained_buffers`, and what `store_int` keeps), every parameter with
    `requires_grad=False`, and every parameter that a later stage of training no longer reaches: optimizers move a
    parameter whose gradient is 0 on by momentum, and shrink it by weight decay, so `update` writes it back.
    """
    case = cases.standard()
    makes: tuple[MakeOptimizer, ...] = (sgd(momentum=0.9, weight_decay=0.1), adamw)
    for make in makes:
        router = case.build()
        missing = router.trained_buffers - {name for name, _ in router.named_buffers()}
        fail_unless(not missing, f"trained_buffers names {', '.join(sorted(missing))}, which it does not have")
        kinds = {router.get_buffer(name).dtype == torch.bool for name in router.trained_buffers}
        fail_unless(
            len(kinds) < 2,
            "trained_buffers names a flag beside other buffers, which averaged models average apart: let a buffer be "
            "infinite until it is known",
        )
        moving = router.trained_buffers | _stored_ints(router)
        parts = {
            **{name: value for name, value in router.named_buffers() if name not in moving},
            **{name: value for name, value in router.named_parameters() if not value.requires_grad},
        }
        case.fit(router)
        before = {name: value.detach().clone() for name, value in parts.items()}
        loop = Loop(case, router, make)
        loop.run(range(3), TOTAL_STEPS)
        loop.run(range(TOTAL_STEPS - 2, TOTAL_STEPS), TOTAL_STEPS)
        for name, value in parts.items():
            fail_unless(
                torch.equal(value, before[name]),
                f"{name} is frozen, but changed in training; name a buffer that training is meant to change in "
                "trained_buffers",
            )


def _stored_ints(router: Router) -> set[str]:
    """Return the names of the buffers that `Router.store_int` keeps: training may change them."""
    return {
        f"{prefix}.{name}".removeprefix(".")
        for prefix, module in router.named_modules()
        if isinstance(module, Router)
        for name in module._stored_ints
    }


def freeze(cases: Cases) -> None:
    """After `freeze()` nothing learns and nothing adapts, whatever trains around the router.

    A router that overrides `freeze` calls `super().freeze()`, which is what stops updates; what adapts in `route` goes
    on (see `stateless`).
    """
    case = cases.standard()
    router = case.build()
    loop = Loop(case, router, sgd(momentum=0.9, weight_decay=0.1))
    loop.run(range(2), TOTAL_STEPS)
    router.freeze()
    learning = [name for name, value in router.named_parameters() if value.requires_grad]
    fail_unless(not learning, f"{', '.join(learning)} learns after freeze(): call `super().freeze()`")
    before = snapshot(router)
    loop.run(range(2, 4), TOTAL_STEPS)
    loop.run(range(TOTAL_STEPS - 2, TOTAL_STEPS), TOTAL_STEPS)
    changed = changes(before, snapshot(router))
    fail_unless(
        not changed,
        f"changes {', '.join(changed)} after freeze(): adapt in `update` alone, and call `super().freeze()`, which "
        "stops it",
    )


def processes(cases: Cases) -> None:
    """Statistics and losses are right where the tokens of a batch are spread over processes.

    `statistics` are sums over tokens, which are added up over processes, so those of a batch are the sum of those of
    its halves. Losses are averaged over processes, so those of a batch are the mean of those of its halves. What is no
    such sum or mean (a product of two means, a quantile) is taken over the tokens of all processes in
    `context.process_group`, as `routerzoo.functional.losses` do.
    """

    def law(case: Case) -> None:
        router = case.router(training=True)
        if not router.properties.batch_independent or draws_random_numbers(case, router):
            # Halves are routed otherwise than in one batch: statistics alone can be told, of parts of one routing.
            whole, halves = _observed_in_parts(case, router)
        else:
            whole = _observed(case, router, slice(None))
            halves = [_observed(case, router, own) for own in _halves(case)]
        for kind, index, reduced in (("loss", 0, 0.5), ("statistic", 1, 1.0)):
            for name, value in whole[index].items():
                parts = [half[index].get(name, torch.zeros_like(value)) for half in halves]
                if differs(reduced * (parts[0] + parts[1]), value, tolerance=1e-4) and not _uses_group(
                    case, router, index
                ):
                    what = "the mean of its" if kind == "loss" else "the sum of its"
                    raise CheckFailure(
                        f"the {kind} {name!r} of a batch is not {what} halves' ({_shown(value)} against "
                        f"{_shown(parts[0])} and {_shown(parts[1])}), so that it changes with the number of processes: "
                        f"{'make it a mean' if kind == 'loss' else 'return sums'} over tokens, or take it over the "
                        "tokens of all processes in `context.process_group`"
                    )

    def of_two_halves(case: Case) -> None:
        law(cases.case(replace(case.sizes, num_sequences=2 * case.sizes.num_sequences)))

    cases.each(of_two_halves)


def _halves(case: Case) -> tuple[slice, slice]:
    half = case.num_tokens // 2
    return slice(0, half), slice(half, case.num_tokens)


def _observed(case: Case, router: Router, own: slice, group: Any = None) -> Observed:
    """Return the losses and the statistics of some of the tokens."""
    x_TD, context = case.hidden()[own], case.take(case.context(process_group=group), own)
    with torch.no_grad():
        routing, losses = case.route_with_losses(router, x_TD, context)
        return losses, router.statistics(routing.for_losses, context) if router.needs_updates else {}


def _observed_in_parts(case: Case, router: Router) -> tuple[Observed, list[Observed]]:
    """Return the statistics of a routing and of its halves; none where it mixes tokens or experts."""
    context = case.context()
    with torch.no_grad():
        routing = case.route_with_losses(router, case.hidden(), context)[0].for_losses
        if not router.needs_updates or routing.dense:
            return ({}, {}), []
        halves = [router.statistics(_part(routing, own), case.take(context, own)) for own in _halves(case)]
        return ({}, router.statistics(routing, context)), [({}, half) for half in halves]


def _part(routing: Routing, own: slice) -> Routing:
    """Return the routing of some of the tokens."""
    fields: dict[str, Any] = {
        name: value[own]
        for name, value in vars(routing).items()
        if isinstance(value, Tensor) and (name == "noise_std" or name.endswith(("_TE", "_TK")))
    }
    if routing.token_N is not None and routing.expert_N is not None and routing.weight_N is not None:
        own_N = (routing.token_N >= own.start) & (routing.token_N < own.stop)
        fields |= {"token_N": routing.token_N[own_N] - own.start}
        fields |= {"expert_N": routing.expert_N[own_N], "weight_N": routing.weight_N[own_N]}
    return replace(routing, losses={}, **fields)


def _uses_group(case: Case, router: Router, index: int) -> bool:
    """Whether losses (0) or statistics (1) are taken over a process group: they fail with one that is none."""
    x_TD, context = case.hidden(), case.context()
    no_group: Any = object()
    told = case.context(process_group=no_group)
    with torch.no_grad():
        if index == 0:
            return _fails(lambda: case.route_with_losses(router, x_TD, told))
        routing, _ = case.route_with_losses(router, x_TD, context)
        return _fails(lambda: router.statistics(routing.for_losses, told))


def _fails(function: Callable[[], object]) -> bool:
    try:
        function()
    except Exception:
        return True
    return False


def _shown(value: Tensor) -> str:
    return ", ".join(f"{number:.6g}" for number in value.flatten().tolist()[:4])


def accumulation(cases: Cases) -> None:
    """An optimizer step over two micro-batches moves what is adapted as one over both in a single batch.

    `update` is called once per optimizer step, with sums over its micro-batches: count in `statistics`, and move
    nothing there or in `route`, which are called once per micro-batch.
    """
    case = cases.standard(num_sequences=4)
    router = case.router(training=True)
    if not router.properties.batch_independent or draws_random_numbers(case, router):
        return
    if router.needs_updates and _uses_group(case, router, 1):
        return  # no sums over tokens
    one, two = case.build(), case.build()
    for router, parts in ((one, 1), (two, 2)):
        Loop(case, router, sgd(learning_rate=0.0), micro_batches=parts).run(range(3), TOTAL_STEPS)
    for (name, value), other in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        fail_unless(
            not differs(other, value, tolerance=1e-5),
            f"{name} is {_shown(other)} after steps over two micro-batches, {_shown(value)} over one batch of both: "
            "move it in `update`, by sums over tokens that `statistics` returns",
        )
