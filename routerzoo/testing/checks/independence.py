"""Checks of what a routing may depend on."""
# Shape suffixes: T tokens, D model width, E experts, K choices per token.

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from routerzoo.routing import RoutingContext
from routerzoo.testing.cases import Case, Cases, CheckFailure, seeded
from routerzoo.testing.checks.common import (
    MODES,
    differs,
    fail_unless,
    mode,
    require_equal_effects,
    require_same,
)

THOROUGH = 20


def deterministic(cases: Cases) -> None:
    """Evaluation gives the same routing every time, draws no random number, and keeps nothing of a call.

    Noise belongs behind `if self.training`. What a call leaves behind (a cache, a counter) must not change the next.
    """

    def law(case: Case) -> None:
        router, x_TD, context = case.router(), case.hidden(), case.context()
        first = case.route(router, x_TD, context, seed=2)
        again = case.route(router, x_TD, context, seed=3)
        message = (
            "routes differently the second time in evaluation: it draws random numbers, or keeps something of a call"
        )
        require_same(case, first, again, x_TD, message)
        with torch.random.fork_rng():
            before = torch.get_rng_state()
            router(x_TD, context.new_pass())
            fail_unless(torch.equal(torch.get_rng_state(), before), "advances the global random state in evaluation")
        for changed in (case.context(ids_seed=9), context):
            case.route(router, case.hidden(9, scale=10), changed)
        require_same(
            case, first, case.route(router, x_TD, context), x_TD, "routes differently after routing something else"
        )

    cases.each(law)


def isolated(cases: Cases) -> None:
    """A router changes nothing but itself: not another router, not the process's random state, not its input.

    Keep state on the instance: a class attribute, a module-level cache or `torch.manual_seed` is everybody's. Hidden
    states are the experts' input too; `x_TD.mul_(2)` changes them for all.
    """

    def law(case: Case) -> None:
        drawn = []
        for seed in (0, 1):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                case.build_here()
                drawn.append(torch.rand(4))
        fail_unless(not torch.equal(*drawn), "reseeds the global random state when it is built")
        for training in MODES:
            x_TD, context = case.hidden(), case.context()
            router = case.router(training=training)
            given = {"hidden states": x_TD.clone(), **_tensors(context)}
            alone = case.route(router, x_TD, context)
            for name, value in {"hidden states": x_TD, **_tensors(context, copied=False)}.items():
                fail_unless(torch.equal(value, given[name]), f"writes into the {name} that it is given")
            other = case.router(training=training, seed=7)
            case.route(other, case.hidden(9), case.context(ids_seed=9))
            require_same(
                case,
                alone,
                case.route(router, x_TD, context),
                x_TD,
                f"routes differently in {mode(training)} after another router was built and used",
            )

    cases.each(law)


def _tensors(context: RoutingContext, copied: bool = True) -> dict[str, Tensor]:
    values = {name: value for name, value in vars(context).items() if isinstance(value, Tensor)}
    return {name: value.clone() for name, value in values.items()} if copied else values


def causal(cases: Cases) -> None:
    """`causal` says exactly whether later tokens of a sequence change a token's routing, in training and evaluation.

    A decoder that routes by later tokens cannot generate as it was trained, and leaks what it is to predict. Where the
    two modes differ, declare `causal = ByMode(training=False)`.
    """
    _as_declared(cases, "causal", _later_tokens)


def batch_independent(cases: Cases) -> None:
    """`batch_independent` says exactly whether other sequences of the batch change a token's routing, in both modes.

    Without it one user's input changes another's output (Hayes et al. 2024, https://arxiv.org/abs/2402.05526). A
    capacity that the batch shares, a balanced assignment and statistics over the batch all break it.
    """
    _as_declared(cases, "batch_independent", _other_sequences)


def _later_tokens(case: Case, which: int) -> tuple[Tensor, Tensor]:
    """Mark the tokens of a sequence at and after some position, and those before it."""
    tokens = torch.arange(case.num_tokens)
    sequence_T, position_T = tokens // case.sizes.length, tokens % case.sizes.length
    own_T = sequence_T == which % case.sizes.num_sequences
    late_T = position_T >= 1 + which % max(case.sizes.length - 1, 1)
    return own_T & late_T, own_T & ~late_T


def _other_sequences(case: Case, which: int) -> tuple[Tensor, Tensor]:
    """Mark all sequences but one, and that one."""
    own_T = torch.arange(case.num_tokens) // case.sizes.length == which % case.sizes.num_sequences
    return ~own_T, own_T


def _as_declared(cases: Cases, name: str, others: Callable[[Case, int], tuple[Tensor, Tensor]]) -> None:
    declared: dict[bool, bool] = {}
    seen = {True: False, False: False}
    told = {"causal": "later tokens", "batch_independent": "other sequences"}[name]

    def law(case: Case) -> None:
        for training in MODES:
            router = case.router(training=training)
            declared[training] = getattr(router.properties, name)
            x_TD, context = case.hidden(), case.context()
            assert context.token_ids is not None
            assert context.attention is not None
            before = case.effect(case.route(router, x_TD, context), x_TD)
            for which in range(2):
                changed_T, kept_T = (mask_T.to(x_TD.device) for mask_T in others(case, which))
                # Noise, extremes, and copies of the tokens that are looked at, which want the same experts.
                copies_TD = x_TD[kept_T].repeat(len(x_TD), 1)[: len(x_TD)] if kept_T.any() else x_TD
                other = case.context(ids_seed=which + 7)
                assert other.token_ids is not None
                assert other.attention is not None
                ids = torch.where(changed_T, other.token_ids, context.token_ids)
                attention = torch.where(changed_T.view(-1, 1, 1), other.attention, context.attention)
                changed = context.new_pass(token_ids=ids, attention=attention)
                for new_TD in (case.hidden(5), case.hidden(6, scale=30.0), copies_TD):
                    y_TD = torch.where(changed_T.unsqueeze(1), new_TD, x_TD)
                    after = case.effect(case.route(router, y_TD, changed), y_TD)
                    if torch.equal(before[kept_T], after[kept_T]):
                        continue
                    seen[training] = True
                    if declared[training]:
                        require_equal_effects(
                            before[kept_T],
                            after[kept_T],
                            f"declares {name}, but in {mode(training)} {told} change a token's routing",
                        )

    cases.each(law)
    if False in declared.values() and not any(seen[mode] for mode in MODES if not declared[mode]):
        if cases.examples < THOROUGH:  # what depends on others rarely needs more examples to show it
            _as_declared(Cases(cases.factory, THOROUGH, cases.device), name, others)
            return
        raise CheckFailure(f"declares {name} = False, but {told} changed no token's routing: declare {name} = True")


def tokenwise(cases: Cases) -> None:
    """`tokenwise` says whether evaluation routes a token the same alone; another order gives the answers in that order.

    Generation with a key-value cache routes one token at a time. A router that reads earlier tokens is not tokenwise,
    and has to keep them itself. Any order of the tokens (of the sequences, where the router is not tokenwise but
    batch independent) must give the answers in that order: positions and sequences are told by the context, never by
    the place in the batch.
    """

    def law(case: Case) -> None:
        router, x_TD, context = case.router(), case.hidden(), case.context()
        before = case.effect(case.route(router, x_TD, context), x_TD)
        if router.properties.tokenwise:
            for token in range(min(case.num_tokens, 4)):
                place = torch.tensor([token], device=x_TD.device)
                alone = case.route(router, x_TD[place], case.take(context, place))
                require_equal_effects(
                    case.effect(alone, x_TD[place]),
                    before[place],
                    f"declares tokenwise, but routes token {token} differently when it is alone",
                    tolerance=1e-4,
                )
        elif not router.properties.batch_independent:
            return
        with seeded(case.sizes.seed + 4):
            if router.properties.tokenwise:
                order = torch.randperm(case.num_tokens)
            else:
                sequences = torch.randperm(case.sizes.num_sequences)
                order = torch.arange(case.num_tokens).view(case.sizes.num_sequences, -1)[sequences].flatten()
        order = order.to(x_TD.device)
        after = case.effect(case.route(router, x_TD[order], case.take(context, order)), x_TD[order])
        what = "tokens" if router.properties.tokenwise else "sequences"
        require_equal_effects(before[order], after, f"another order of the {what} changes the routing", tolerance=1e-4)

    cases.each(law)


def padding(cases: Cases) -> None:
    """What stands at padded places (`context.padding_mask`) changes no loss, no statistic and no other token's routing.

    Losses and statistics are taken over the tokens that are not padding, however small a loss is: losses are compared
    relative to their size. `routerzoo.functional.losses` take the mask.
    """

    def law(case: Case) -> None:
        with seeded(case.sizes.seed + 4):
            mask_T = (torch.rand(case.num_tokens) < 0.4).to(case.device)
        for training in MODES:
            router, x_TD = case.router(training=training), case.hidden()
            context = case.context(padding_mask=mask_T)
            before, losses = case.route_with_losses(router, x_TD, context)
            y_TD = torch.where(mask_T.unsqueeze(1), case.hidden(5, scale=10.0), x_TD)
            after, losses_after = case.route_with_losses(router, y_TD, context)
            for name, loss in losses.items():
                fail_unless(
                    not differs(losses_after[name], loss, tolerance=1e-5),
                    f"the loss {name!r} depends on what stands at padded places: {loss.item():.6g} became "
                    f"{losses_after[name].item():.6g}; leave out the tokens of `context.padding_mask`",
                )
            if training and router.needs_updates:
                with torch.no_grad():
                    sums = router.statistics(before.for_losses, context)
                    sums_after = router.statistics(after.for_losses, context)
                for name, value in sums.items():
                    fail_unless(
                        not differs(sums_after[name], value, tolerance=1e-5),
                        f"the statistic {name!r} depends on what stands at padded places; leave out the tokens of "
                        "`context.padding_mask`",
                    )
            require_equal_effects(
                case.effect(before, x_TD)[~mask_T],
                case.effect(after, y_TD)[~mask_T],
                f"what stands at padded places changes other tokens' routing in {mode(training)}",
            )

    cases.each(law)
