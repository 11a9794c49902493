"""Checks of what a router learns by."""
# Shape suffixes: T tokens, D model width.

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from routerzoo.routing import Routing
from routerzoo.testing.cases import TOTAL_STEPS, Case, Cases, CheckFailure, seeded
from routerzoo.testing.checks.common import fail_unless
from routerzoo.testing.loop import Loop, sgd


def gradients(cases: Cases) -> None:
    """`trainable` says whether the router learns: then every parameter gets a gradient, else it has none to get.

    A random or generated gate that must not learn consists of buffers, which no optimizer and no
    `requires_grad_(True)` can move.
    """
    case = cases.standard()
    if case.sizes.top_k == 1:
        case = cases.standard(top_k=2)
    router = case.build()
    learned = [name for name, value in router.named_parameters() if value.requires_grad]
    if not router.train().properties.trainable:
        fail_unless(not learned, f"declares trainable = False, but {', '.join(learned)} require gradients")
        return
    fail_unless(bool(learned), "declares trainable = True, but has no parameter that learns")
    loop = Loop(case, router, sgd(learning_rate=0.0))
    loop.run(range(3), TOTAL_STEPS)
    loop.run(range(TOTAL_STEPS - 2, TOTAL_STEPS), TOTAL_STEPS)
    dead = [name for name, yes in loop.reached.items() if not yes]
    fail_unless(not dead, f"no gradient reaches {', '.join(dead)}, neither of the weights nor of the losses")


def gradient_at_top_1(cases: Cases) -> None:
    """`trains_at_top_1` says exactly whether the task's gradient reaches the router's parameters at k = 1.

    Weights that are renormalized over one expert are always 1, and teach the router nothing.
    """
    try:
        case = cases.standard(top_k=1)
        router = case.router(training=True, top_k=1)
        router.top_k = 1
    except (CheckFailure, ValueError):
        return  # has no k = 1
    if not router.properties.trainable:
        return
    x_TD = case.hidden()
    objective = _projected(case.effect(case.route(router, x_TD, case.context()), x_TD))
    if objective.requires_grad:
        torch.autograd.backward(objective)
    # A softmax over one logit leaves rounding of its gradient, not exactly 0.
    largest = max((float(p.grad.abs().max()) for p in router.parameters() if p.grad is not None), default=0.0)
    learns, declared = largest > 1e-5, router.properties.trains_at_top_1
    fail_unless(
        learns == declared,
        f"declares trains_at_top_1 = {declared}, but the largest gradient at k = 1 is {largest:.3g}",
    )


def recomputation(cases: Cases) -> None:
    """Activation checkpointing gives the same gradients: nothing that `route` writes makes its second call differ.

    Count in `statistics` and move in `update`, not in `route`.
    """

    def law(case: Case) -> None:
        router, x_TD, context = case.router(training=True), case.hidden().requires_grad_(), case.context()
        if not any(p.requires_grad for p in router.parameters()):
            return

        def objective(x_TD: Tensor) -> Tensor:
            routing: Routing = router(x_TD, context.new_pass())
            return _projected(case.effect(routing, x_TD)) + sum(routing.losses.values()) + 0.0 * x_TD.sum()

        gradients = []
        for repeated in (False, True):
            router.zero_grad()
            with seeded(case.sizes.seed + 3):
                loss = checkpoint(objective, x_TD, use_reentrant=False) if repeated else objective(x_TD)
                torch.autograd.backward(loss)
            gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in router.parameters()])
        for (name, _), one, other in zip(router.named_parameters(), *gradients, strict=True):
            fail_unless(torch.equal(one, other), f"the gradient of {name} differs under activation checkpointing")

    cases.each(law)


def _projected(effect: Tensor) -> Tensor:
    """Return a scalar that every entry takes part in."""
    with seeded(8):
        probe = torch.randn(effect.shape).to(effect)
    return (effect * probe).sum()
