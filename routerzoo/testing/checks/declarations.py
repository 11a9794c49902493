"""Checks of what a router declares, and of what it requires."""
# Shape suffixes: T tokens, D model width.

from __future__ import annotations

import inspect
from dataclasses import replace

from routerzoo.router import ByMode, Properties, Router, UnmetRequirementError
from routerzoo.routing import CONTEXT_FIELDS, RoutingContext
from routerzoo.testing.cases import Cases, CheckFailure, RefusedSizesError, takes_top_k
from routerzoo.testing.checks.common import fail_unless, require_same, require_valid


def declaration(cases: Cases) -> None:
    """The class says what it is.

    A concrete subclass of `routerzoo.Router` with a docstring, a `paper`, and arguments `(spec, *, keywords)`, so that
    configs can name each of them. Properties are a bool or a `ByMode`. `default_loss_weights` names losses that the
    router returns, or that follow from its logits. `needs_updates` is set where `begin_step` or `update` does
    something: nobody calls them otherwise.
    """
    router = cases.standard().router(training=True)
    cls = type(router)
    fail_unless(isinstance(router, Router), f"{cls.__name__} is not a subclass of routerzoo.Router")
    fail_unless(bool(cls.__dict__.get("__doc__")), f"{cls.__name__} has no docstring")
    fail_unless(bool(cls.paper), f"{cls.__name__}.paper is empty: say where the method was published, or whose it is")
    parameters = list(inspect.signature(cls).parameters.values())
    fail_unless(
        bool(parameters) and parameters[0].name == "spec" and all(p.kind is p.KEYWORD_ONLY for p in parameters[1:]),
        f"{cls.__name__}{inspect.signature(cls)}: the arguments must be (spec, *, keywords)",
    )
    for name in Properties._fields:
        value = getattr(router, name)
        fail_unless(isinstance(value, bool | ByMode), f"{name} is {value!r}; a property is a bool or a ByMode")
    adapts = [
        name for name in ("begin_step", "statistics", "update") if getattr(cls, name) is not getattr(Router, name)
    ]
    fail_unless(
        # An argument may switch updates off.
        "needs_updates" in vars(router) or router.needs_updates or not adapts,
        f"implements {' and '.join(adapts)}, which nobody calls: set needs_updates = True",
    )
    case = cases.standard()
    try:
        case.route_with_losses(router, case.hidden(), case.context())
    except ValueError as error:
        raise CheckFailure(f"default_loss_weights names a loss that it {error}") from error
    declared = router.eval().properties
    fail_unless(
        not declared.tokenwise or (declared.causal and declared.batch_independent),
        "declares tokenwise, but not causal and batch_independent, which follow from it",
    )


def requirements(cases: Cases) -> None:
    """`requires` names exactly what the router reads of the context, and a model that lacks it is refused.

    The rest may be missing, and changes nothing where it is there (the padding mask aside, see `padding`). Sizes that
    the router needs of the spec are refused with `UnmetRequirementError` when it is built.
    """
    case = cases.standard()
    router, x_TD, full = case.router(), case.hidden(), case.context()
    least = RoutingContext(**{name: getattr(full, name) for name in CONTEXT_FIELDS & router.requires})
    try:
        routing = case.route(router, x_TD, least)
    except CheckFailure:
        raise
    except Exception as error:
        raise CheckFailure(
            f"fails with the required fields ({', '.join(sorted(router.requires)) or 'none'}) alone: "
            f"{type(error).__name__}: {error}; name what it reads in requires"
        ) from error
    require_same(
        case, routing, case.route(router, x_TD, full), x_TD, "reads fields of the context that it does not require"
    )
    for name in sorted(router.requires):
        try:
            case.route(router, x_TD, full.replace(**{name: None}))
        except ValueError as error:
            fail_unless(name in str(error), f"refuses a missing {name} without naming it: {error}")
        else:
            raise CheckFailure(f"requires {name}, but routes without it; leave it out of requires")
        try:
            case.build(replace(case.spec, provides=case.spec.provides - {name}))
        except RefusedSizesError as error:
            fail_unless(
                isinstance(error.__cause__, UnmetRequirementError),
                f"refuses a model without {name} by {type(error.__cause__).__name__}, not UnmetRequirementError",
            )
        else:
            raise CheckFailure(f"requires {name}, but builds in a model that does not provide it")
    try:
        case.build(replace(case.spec, vocab_size=None, num_positions=None, hidden_dim=None, num_tasks=None))
    except RefusedSizesError as error:
        fail_unless(
            isinstance(error.__cause__, UnmetRequirementError),
            f"refuses a spec without sizes it needs by a {type(error.__cause__).__name__}, not UnmetRequirementError",
        )


def top_k(cases: Cases) -> None:
    """A k below 1 or above the number of experts is refused, when the router is built and later, with the value named.

    k is not the router's alone: schedules set it in training, and evaluation at several k sets it on a trained router.
    """
    case = cases.standard()
    if not takes_top_k(case.factory):
        return
    too_many = case.sizes.num_experts + 1
    for bad in (0, too_many):
        try:
            case.build(top_k=bad)
        except RefusedSizesError as error:
            fail_unless(str(bad) in str(error), f"refuses top_k = {bad} without naming it: {error}")
        else:
            raise CheckFailure(f"accepts top_k = {bad} with {case.sizes.num_experts} experts")
    router = case.router()
    for bad in (0, too_many):
        try:
            router.top_k = bad
        except ValueError:
            continue
        raise CheckFailure(f"lets top_k be set to {bad} with {case.sizes.num_experts} experts")
    router.top_k = 1
    require_valid(case, case.route(router, case.hidden(), case.context()), case.hidden())
