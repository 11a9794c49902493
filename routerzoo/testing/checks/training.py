"""Laws of what is learned, kept and carried over."""
# Shape suffixes: T tokens, D model width, E experts, K choices per token.

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from routerzoo.router import LoadedTopKWarning, Router
from routerzoo.routing import Routing
from routerzoo.testing.cases import TOTAL_STEPS, Case, Cases, CheckFailure, seeded, takes_top_k
from routerzoo.testing.checks.common import (
    MODES,
    fail_unless,
    law_of_routers,
    mode,
    require_same,
)


@law_of_routers
def state_dict(cases: Cases) -> None:
    """A `state_dict` carries all that decides: loaded into a router built with another seed, it gives the same answers.

    Random tables and frozen weights are buffers, drawn once, when the router is built. Stages of training are kept by
    `Router.store_int`. The file must load with `weights_only=True`, and its keys must not change over calls.
    """

    def law(case: Case) -> None:
        trained = case.router(training=True)
        if takes_top_k(case.factory):
            trained.top_k = max(1, case.sizes.top_k - 1)
        x_TD, context = case.hidden(), case.context()
        keys = set(trained.state_dict())
        case.route(trained, x_TD, context)
        fail_unless(set(trained.state_dict()) == keys, "has other keys in its state_dict after the first call")
        file = io.BytesIO()
        torch.save(trained.state_dict(), file)
        file.seek(0)
        try:
            state = torch.load(file, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckFailure(f"its state_dict does not load with weights_only=True: {error}") from error
        other = case.build(seed=99)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LoadedTopKWarning)  # the other k is the check's doing
            other.load_state_dict(state)
        fail_unless(other.top_k == trained.top_k, f"top_k was {trained.top_k}, and {other.top_k} after loading")
        for training in MODES:
            trained.train(training)
            other.train(training)
            require_same(
                case,
                case.route(trained, x_TD, context),
                case.route(other, x_TD, context),
                x_TD,
                f"its state_dict, loaded into a router built with another seed, routes otherwise in {mode(training)}",
            )

    cases.each(law)


@law_of_routers
def copies(cases: Cases) -> None:
    """`copy.deepcopy` and `pickle` give routers that answer alike."""

    def law(case: Case) -> None:
        router, x_TD, context = case.router(), case.hidden(), case.context()
        with torch.no_grad():
            expected = case.route(router, x_TD, context)
            for how, twin in (("copy", copy.deepcopy(router)), ("unpickled one", pickle.loads(pickle.dumps(router)))):
                require_same(case, expected, case.route(twin, x_TD, context), x_TD, f"a {how} routes otherwise")

    cases.each(law)


@law_of_routers
def frozen(cases: Cases) -> None:
    """What is frozen stays bit-identical through optimizer steps with momentum and weight decay.

    That is every buffer (but those named in `trained_buffers`), every parameter with `requires_grad=False`, and every
    parameter that a later stage of training no longer reaches: set its gradient to None in `update`,
    since optimizers move a parameter whose gradient is 0 on by momentum, and shrink it by weight decay.
    """
    case = cases.standard()
    for make in (_sgd, _adamw):
        router = case.router(training=True)
        moving = router.trained_buffers | _stored_ints(router)
        frozen_parts = {
            **{name: value for name, value in router.named_buffers() if name not in moving},
            **{name: value for name, value in router.named_parameters() if not value.requires_grad},
        }
        missing = router.trained_buffers - {name for name, _ in router.named_buffers()}
        fail_unless(not missing, f"trained_buffers names {', '.join(sorted(missing))}, which it does not have")
        before = {name: value.detach().clone() for name, value in frozen_parts.items()}
        learned = [value for value in router.parameters() if value.requires_grad]
        _train(case, router, make(learned) if learned else None)
        for name, value in frozen_parts.items():
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


def _sgd(parameters: list[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)


def _adamw(parameters: list[Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)


def _train(case: Case, router: Router, optimizer: torch.optim.Optimizer | None) -> dict[str, bool]:
    """Take a few steps at the start and at the end of training; say which parameters a gradient ever reached."""
    reached = {name: False for name, value in router.named_parameters() if value.requires_grad}
    at_start: dict[str, bool] = {}
    for number, step in enumerate((0, 1, 2, TOTAL_STEPS - 2, TOTAL_STEPS - 1)):
        if router.needs_updates:
            router.begin_step(step, TOTAL_STEPS)
        x_TD = case.hidden(10 + number).requires_grad_()
        context = case.context(ids_seed=10 + number, step=step)
        router.zero_grad()
        context = context.new_pass()
        with seeded(case.sizes.seed + 20 + number):
            routing: Routing = router(x_TD, context)
        objective = _objective(case, routing, x_TD)
        if router.wants_feedback:
            told = router.feedback(routing, context, case.hidden(30 + number)[:, 0].abs())
            objective = objective + sum(told.values())
        torch.autograd.backward(objective)
        now = {}
        for name, value in router.named_parameters():
            if value.requires_grad:
                now[name] = value.grad is not None and bool(value.grad.any())
                # What data-parallel training without unused-parameter detection hands to the optimizer.
                value.grad = torch.zeros_like(value) if value.grad is None else value.grad
        at_start = at_start or now
        before = {name: value.detach().clone() for name, value in router.named_parameters()}
        if optimizer is not None:
            optimizer.step()
        if router.needs_updates:
            with torch.no_grad():
                router.update(router.statistics(routing.for_losses, context))
        for name, value in router.named_parameters():
            if value.requires_grad and at_start[name] and not now[name] and not torch.equal(value, before[name]):
                raise CheckFailure(
                    f"{name} is no longer trained at the end of training, but the optimizer still moves it; set its "
                    "gradient to None in update"
                )
        reached = {name: reached[name] or now[name] for name in reached}
    return reached


def _objective(case: Case, routing: Routing, x_TD: Tensor) -> Tensor:
    """Return something that every weight and every loss takes part in."""
    effect = case.effect(routing, x_TD).flatten(1)
    with torch.random.fork_rng():
        torch.manual_seed(8)
        probe = torch.randn(effect.shape).to(effect)
    return (effect * probe).sum() + sum(routing.losses.values()) + 0.0 * x_TD.sum()


@law_of_routers
def gradients(cases: Cases) -> None:
    """`trainable` says whether the router learns: then every parameter gets a gradient, else it has none to get.

    A random or generated gate that must not learn consists of buffers, which no optimizer and no
    `requires_grad_(True)` can move.
    """
    case = cases.standard()
    if case.sizes.top_k == 1:
        case = cases.standard(top_k=2)
    router = case.router(training=True)
    learned = [name for name, value in router.named_parameters() if value.requires_grad]
    if not router.properties.trainable:
        fail_unless(not learned, f"declares trainable = False, but {', '.join(learned)} require gradients")
        return
    fail_unless(bool(learned), "declares trainable = True, but has no parameter that learns")
    reached = _train(case, router, None)
    dead = [name for name, yes in reached.items() if not yes]
    fail_unless(not dead, f"no gradient reaches {', '.join(dead)}, neither of the weights nor of the losses")


@law_of_routers
def gradient_at_top_1(cases: Cases) -> None:
    """`trains_at_top_1` says exactly whether the task's gradient reaches the router's parameters at k = 1.

    Weights that are renormalised over one expert are always 1, and teach the router nothing.
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
    effect = case.effect(case.route(router, x_TD, case.context()), x_TD).flatten(1)
    with torch.random.fork_rng():
        torch.manual_seed(8)
        probe = torch.randn(effect.shape).to(effect)
    if effect.requires_grad:
        torch.autograd.backward((effect * probe).sum())
    # A softmax over one logit leaves rounding of its gradient, not exactly 0.
    largest = max((float(p.grad.abs().max()) for p in router.parameters() if p.grad is not None), default=0.0)
    learns, declared = largest > 1e-5, router.properties.trains_at_top_1
    fail_unless(
        learns == declared,
        f"declares trains_at_top_1 = {declared}, but the largest gradient at k = 1 is {largest:.3g}",
    )


@law_of_routers
def recomputation(cases: Cases) -> None:
    """Activation checkpointing gives the same gradients: nothing that `route` writes makes its second call differ.

    Count and update in `update`, not in `route`.
    """

    def law(case: Case) -> None:
        router, x_TD, context = case.router(training=True), case.hidden().requires_grad_(), case.context()
        if not any(p.requires_grad for p in router.parameters()):
            return

        def objective(x_TD: Tensor) -> Tensor:
            routing: Routing = router(x_TD, context.new_pass())
            return _objective(case, routing, x_TD)

        gradients = []
        for repeated in (False, True):
            router.zero_grad()
            with torch.random.fork_rng():
                torch.manual_seed(case.sizes.seed + 3)
                loss = checkpoint(objective, x_TD, use_reentrant=False) if repeated else objective(x_TD)
                torch.autograd.backward(loss)
            gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in router.parameters()])
        for (name, _), one, other in zip(router.named_parameters(), *gradients, strict=True):
            fail_unless(torch.equal(one, other), f"the gradient of {name} differs under activation checkpointing")

    cases.each(law)
