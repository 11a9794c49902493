"""Laws of what a router answers, and of what it asks for."""
# Shape suffixes: T tokens, D model width, E experts, K choices per token.

from __future__ import annotations

import inspect
from dataclasses import replace

import torch

from routerzoo.moe.auxiliary_loss import loss_of
from routerzoo.router import Router, UnmetRequirementError
from routerzoo.routing import CONTEXT_FIELDS, Routing, RoutingContext
from routerzoo.testing.cases import Case, Cases, CheckFailure, RefusedSizesError, takes_top_k
from routerzoo.testing.checks.common import (
    MODES,
    brief,
    fail_unless,
    law_of_routers,
    mode,
    require_equal_effects,
    require_same,
    require_valid,
)


@law_of_routers
def declaration(cases: Cases) -> None:
    """The class says what it is.

    A concrete subclass of `routerzoo.Router` with a docstring, a `paper`, and arguments `(spec, *, keywords)`, so that
    configs can name each of them. Coefficients in `default_loss_weights` are for losses that it has.
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
    case, x_TD = cases.standard(), cases.standard().hidden()
    context = case.context()
    routing: Routing = router(x_TD, context)
    losses = dict(routing.losses)
    if router.wants_feedback:
        losses.update(router.feedback(routing, context, x_TD[:, 0].abs()))
    routing = replace(routing, losses=losses)
    for name in router.default_loss_weights:
        try:
            loss_of(name, routing, context)
        except ValueError as error:
            raise CheckFailure(f"default_loss_weights has {name!r}, but the routing {error}") from error
    router.eval()
    fail_unless(
        not router.properties.tokenwise or (router.properties.causal and router.properties.batch_independent),
        "declares tokenwise, but not causal and batch_independent, which follow from it",
    )


@law_of_routers
def answer(cases: Cases) -> None:
    """Shapes, dtypes and devices are those of the contract.

    Experts are int64 in -1..num_experts - 1, weights have the hidden states' dtype and device, logits are float32
    `[T, E]` (float64 where the model is), losses are scalars. This holds for no token, one token, one expert and
    k = E too.
    """

    def law(case: Case) -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for training in MODES:
                router = case.router(training=training)
                router = router.double() if dtype == torch.float64 else router
                x_TD = case.hidden().to(dtype)
                require_valid(case, case.route(router, x_TD, case.context()), x_TD)

    cases.each(law)
    for sizes in ({"length": 0}, {"num_sequences": 1, "length": 1}, {"num_experts": 1, "top_k": 1}, {"top_k": 8}):
        try:
            case = cases.standard(**sizes)
        except CheckFailure:
            continue  # a ValueError refused these sizes by name, as it may
        for training in MODES:
            x_TD = case.hidden()
            try:
                require_valid(case, case.route(case.router(training=training), x_TD, case.context()), x_TD)
            except CheckFailure as error:
                raise CheckFailure(f"with {sizes}: {error}") from error
            except Exception as error:
                raise CheckFailure(f"with {sizes} in {mode(training)}: {type(error).__name__}: {error}") from error


@law_of_routers
def weights(cases: Cases) -> None:
    """Weights are finite; not negative and summing to 1 where declared.

    Declare `nonnegative = False` or `normalized = False` where the method is otherwise.
    """

    def law(case: Case) -> None:
        for training in MODES:
            router, x_TD = case.router(training=training), case.hidden()
            routing = case.route(router, x_TD, case.context())
            if routing.combine_GSEP is not None:
                weight_TN = routing.combine_GSEP.flatten(2).flatten(0, 1)
            else:
                weight_TN = case.effect(routing, x_TD)[:, : case.sizes.num_experts]
            fail_unless(weight_TN.isfinite().all(), f"weights are not finite: {brief(weight_TN)}")
            if router.properties.nonnegative:
                fail_unless((weight_TN >= 0).all(), f"declares nonnegative, but has the weight {weight_TN.min():.4g}")
            if router.properties.normalized:
                sums = weight_TN.sum(-1)
                off = (sums - 1).abs().argmax() if len(sums) else 0
                fail_unless(
                    torch.isclose(sums, torch.ones_like(sums), atol=1e-5).all(),
                    f"declares normalized, but the weights of token {int(off)} sum to {sums[off]:.6g}",
                )

    cases.each(law)


@law_of_routers
def choices(cases: Cases) -> None:
    """No expert is chosen twice by a token, -1 stands for no expert and has weight 0, and `may_drop` tells of it.

    `may_drop=False` lets the layer skip a pass over the hidden states; an expert of -1 would then be read as the last.
    """

    def law(case: Case) -> None:
        for training in MODES:
            router, x_TD = case.router(training=training), case.hidden()
            routing = case.route(router, x_TD, case.context())
            if routing.dense:
                return
            pairs = routing.assignments()
            none_N = pairs.expert_N < 0
            fail_unless(pairs.may_drop or not none_N.any(), "promises may_drop=False, but chooses expert -1")
            fail_unless((pairs.weight_N[none_N] == 0).all(), "gives a choice of -1 (no expert) a weight other than 0")
            chosen_TE = case.effect(routing, x_TD)[:, case.sizes.num_experts :]
            twice = (chosen_TE > 1).nonzero()
            if len(twice):
                token, expert = twice[0].tolist()
                raise CheckFailure(f"token {token} chooses expert {expert} {int(chosen_TE[token, expert])} times")

    cases.each(law)


@law_of_routers
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


@law_of_routers
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
            raise CheckFailure(f"takes top_k = {bad} with {case.sizes.num_experts} experts")
    router = case.router()
    for bad in (0, too_many):
        try:
            router.top_k = bad
        except ValueError:
            continue
        raise CheckFailure(f"lets top_k be set to {bad} with {case.sizes.num_experts} experts")
    router.top_k = 1
    require_valid(case, case.route(router, case.hidden(), case.context()), case.hidden())


@law_of_routers
def policies(cases: Cases) -> None:
    """`select_experts` and `combine_weights`, where a router has them, do what `route` does in evaluation.

    They let policies around a router (a capacity, a replay, a steering) choose and weigh experts as it would. An expert
    whose logit is minus infinity is chosen by nobody who has others; no expert (-1) has weight 0.
    """

    def law(case: Case) -> None:
        router, x_TD = case.router(), case.hidden()
        routing = case.route(router, x_TD, case.context())
        logits_TE = routing.logits_TE
        if logits_TE is None or routing.dense:
            return
        experts_TK = routing.experts_TK
        try:
            chosen_TK = router.select_experts(logits_TE)
        except NotImplementedError:
            pass
        else:
            chosen = Routing(chosen_TK, torch.ones_like(chosen_TK, dtype=x_TD.dtype))
            require_equal_effects(
                case.effect(routing, x_TD)[:, case.sizes.num_experts :],
                case.effect(chosen, x_TD)[:, case.sizes.num_experts :],
                "choose(logits) are other experts than route's",
            )
            experts_TK = chosen_TK
            if case.sizes.num_experts > chosen_TK.shape[1]:
                out = case.sizes.seed % case.sizes.num_experts
                others_TK = router.select_experts(
                    logits_TE.index_fill(1, torch.tensor([out], device=x_TD.device), -torch.inf)
                )
                fail_unless(
                    (others_TK != out).all(), f"select_experts takes expert {out}, whose logit is minus infinity"
                )
        if experts_TK is None:
            return
        try:
            weights_TK = router.combine_weights(logits_TE, experts_TK)
        except NotImplementedError:
            return
        weighed = Routing(experts_TK, weights_TK.to(x_TD.dtype))
        require_equal_effects(
            case.effect(routing, x_TD),
            case.effect(weighed, x_TD),
            "weigh(logits, experts) gives other weights than route",
            tolerance=1e-5,
        )
        left_TK = experts_TK.index_fill(1, torch.tensor([0], device=x_TD.device), -1)
        weights_TK = router.combine_weights(logits_TE, left_TK)
        fail_unless(
            (weights_TK[:, 0] == 0).all() and weights_TK.isfinite().all(),
            f"weigh gives no expert (-1) the weights {brief(weights_TK)}; they must be 0, and the others finite",
        )

    cases.each(law)
