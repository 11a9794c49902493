"""Checks of what a router returns."""
# Shape suffixes: T tokens, D model width, E experts, K choices per token, N weights of a token.

from __future__ import annotations

import torch

from routerzoo.routing import Routing
from routerzoo.testing.cases import Case, Cases, CheckFailure
from routerzoo.testing.checks.common import (
    MODES,
    brief,
    fail_unless,
    mode,
    require_equal_effects,
    require_valid,
)


def output(cases: Cases) -> None:
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


def choices(cases: Cases) -> None:
    """No token selects an expert twice, -1 stands for no expert and has weight 0, and `may_drop` tells of it.

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
            fail_unless(pairs.may_drop or not none_N.any(), "promises may_drop=False, but selects expert -1")
            fail_unless((pairs.weight_N[none_N] == 0).all(), "gives a choice of -1 (no expert) a weight other than 0")
            chosen_TE = case.effect(routing, x_TD)[:, case.sizes.num_experts :]
            twice = (chosen_TE > 1).nonzero()
            if len(twice):
                token, expert = twice[0].tolist()
                raise CheckFailure(f"token {token} selects expert {expert} {int(chosen_TE[token, expert])} times")

    cases.each(law)


def selection(cases: Cases) -> None:
    """`select_experts` and `combine_weights`, where a router has them, do what `route` does in evaluation.

    Selection looks at logits, never at scores, whose saturation would make ties: so do `route`, these two, and the
    wrappers around a router (a capacity, a replay, a steering) that call them. An expert whose logit is minus infinity
    is selected only where there are fewer than k others; no expert (-1) has weight 0.
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
                "select_experts(logits) returns other experts than route",
            )
            experts_TK = chosen_TK
            if case.sizes.num_experts > chosen_TK.shape[1]:
                out = case.sizes.seed % case.sizes.num_experts
                others_TK = router.select_experts(
                    logits_TE.index_fill(1, torch.tensor([out], device=x_TD.device), -torch.inf)
                )
                fail_unless(
                    (others_TK != out).all(), f"select_experts selects expert {out}, whose logit is minus infinity"
                )
        if experts_TK is None:
            return
        try:
            weights_TK = router.combine_weights(logits_TE, experts_TK)
        except NotImplementedError:
            return
        weighted = Routing(experts_TK, weights_TK.to(x_TD.dtype))
        require_equal_effects(
            case.effect(routing, x_TD),
            case.effect(weighted, x_TD),
            "combine_weights(logits, experts) gives other weights than route",
            tolerance=1e-5,
        )
        left_TK = experts_TK.index_fill(1, torch.tensor([0], device=x_TD.device), -1)
        weights_TK = router.combine_weights(logits_TE, left_TK)
        fail_unless(
            (weights_TK[:, 0] == 0).all() and weights_TK.isfinite().all(),
            f"combine_weights returns {brief(weights_TK)} where the first expert is -1: that must be 0, all finite",
        )

    cases.each(law)
