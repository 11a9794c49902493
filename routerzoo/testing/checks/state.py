"""Checks of a router's state: saved, loaded, copied, initialized again."""
# Shape suffixes: T tokens, D model width.

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from routerzoo.router import LoadedTopKWarning, Router
from routerzoo.testing.cases import Case, Cases, CheckFailure, seeded, takes_top_k
from routerzoo.testing.checks.common import MODES, differs, fail_unless, mode, require_same
from routerzoo.testing.loop import Loop, sgd


def state_dict(cases: Cases) -> None:
    """A `state_dict` carries all that decides: loaded into a router built with another seed, it routes the same.

    Random tables and frozen weights are buffers, drawn once, when the router is built. Stages of training are kept by
    `Router.store_int`. All values are contiguous tensors that share no memory, as safetensors has it; the file loads
    with `weights_only=True`; keys do not change over calls; k comes back.
    """

    def law(case: Case) -> None:
        trained = case.router(training=True)
        if takes_top_k(case.factory):
            trained.top_k = max(1, case.sizes.top_k - 1)
        x_TD, context = case.hidden(), case.context()
        keys = set(trained.state_dict())
        case.route(trained, x_TD, context)
        fail_unless(set(trained.state_dict()) == keys, "has other keys in its state_dict after the first call")
        _require_tensors(trained.state_dict())
        other = case.build(seed=99)
        _load(other, _saved(trained.state_dict()))
        fail_unless(other.top_k == trained.top_k, f"top_k was {trained.top_k}, and {other.top_k} after loading")
        for training in MODES:
            trained.train(training)
            other.train(training)
            require_same(
                case,
                case.route(trained, x_TD, context),
                case.route(other, x_TD, context),
                x_TD,
                f"its state_dict, loaded into a router built with another seed, routes differently in {mode(training)}",
            )

    cases.each(law)


def _require_tensors(state: dict[str, Any]) -> None:
    owners: dict[int, str] = {}
    for name, value in state.items():
        fail_unless(
            isinstance(value, Tensor),
            f"the state_dict holds {name}, a {type(value).__name__}: keep state in tensors, integers by `store_int`",
        )
        fail_unless(value.is_contiguous(), f"{name} in the state_dict is not contiguous, which safetensors refuses")
        if value.numel():
            owner = owners.setdefault(value.untyped_storage().data_ptr(), name)
            fail_unless(owner == name, f"{owner} and {name} in the state_dict share memory, which safetensors refuses")


def _saved(state: object) -> Any:
    """Return what a file holds of a state."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    try:
        return torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckFailure(f"its state_dict does not load with weights_only=True: {error}") from error


def _load(router: Router, state: dict[str, Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoadedTopKWarning)  # the other k is the check's doing
        router.load_state_dict(state)


def reset_parameters(cases: Cases) -> None:
    """Built on the meta device and initialized by `reset_parameters`, a router is as if it had been built where it is.

    So are models that are too large to build twice, or whose checkpoint lacks the router. The base class builds the
    router again; draw every initial value from torch's global generator or from one of your own, with no regard to what
    was drawn before.
    """

    def law(case: Case) -> None:
        with torch.device("meta"):
            empty = case.construct()
        empty.to_empty(device=case.device)
        with torch.no_grad():
            for value in (*empty.parameters(), *empty.buffers()):
                value.fill_(float("nan") if value.is_floating_point() else 77)
        with seeded(case.sizes.seed):
            empty.reset_parameters()
        built = case.build()
        for (name, value), reset in zip(built.state_dict().items(), empty.state_dict().values(), strict=True):
            fail_unless(
                not differs(reset, value),
                f"{name} is not what the constructor draws from the same seed after `to_empty` and `reset_parameters`: "
                "draw all of it in `__init__`",
            )
        fail_unless(empty.top_k == built.top_k, f"top_k is {empty.top_k} after `reset_parameters`, not {built.top_k}")

    cases.each(law)


def resume(cases: Cases) -> None:
    """Training that is interrupted, saved and resumed in a new router ends where uninterrupted training does.

    Bit for bit. What adapts is a parameter, a buffer of the `state_dict` (not `persistent=False`), or an integer that
    `store_int` keeps; a plain attribute starts over, and so must not change, whatever it decides.
    """
    case = cases.standard()
    x_TD, context = case.hidden(), case.context()
    exactness = 0.0 if case.device.type == "cpu" else 1e-5  # sums on a GPU are not in order
    for steps in (1, 4):
        straight = Loop(case, case.build(), sgd())
        at_start = _plain_values(straight.router)
        straight.run(range(2 * steps), 2 * steps)
        first, second = Loop(case, case.build(), sgd()), Loop(case, case.build(seed=99), sgd())
        first.run(range(steps), 2 * steps)
        second.layer.load_state_dict(_saved(first.layer.state_dict()))
        second.run(range(steps, 2 * steps), 2 * steps)
        message = f"trained {steps} steps, loaded into a new router and trained {steps} more,"
        for (name, value), tensor in zip(
            straight.router.state_dict().items(), second.router.state_dict().values(), strict=True
        ):
            fail_unless(
                not differs(tensor, value, exactness),
                f"{message} {name} is not what it is after {2 * steps} steps: keep all that adapts in the state_dict",
            )
        resumed_values = _plain_values(second.router)
        for name, value in _plain_values(straight.router).items():
            # What it decides may show after many more steps.
            fail_unless(
                value == at_start.get(name) or value == resumed_values.get(name),
                f"{message} the attribute {name} is {resumed_values.get(name)!r}, and {value!r} after {2 * steps} "
                "steps: keep it by `store_int`, or in a buffer",
            )
        for training in MODES:
            expected, losses = case.route_with_losses(straight.router.train(training), x_TD, context)
            resumed, losses_resumed = case.route_with_losses(second.router.train(training), x_TD, context)
            routes = f"{message} it routes differently than after {2 * steps} steps, in {mode(training)}"
            require_same(case, expected, resumed, x_TD, routes)
            for name, loss in losses.items():
                fail_unless(
                    not differs(losses_resumed[name], loss, exactness),
                    f"{message} it has another loss {name!r} than after {2 * steps} steps: keep all that adapts in the "
                    "state_dict",
                )


def _plain_values(router: Router) -> dict[str, Any]:
    """Return numbers, strings and collections of them that are attributes of a router or of its modules."""
    values: dict[str, Any] = {}
    for prefix, module in router.named_modules():
        for name, value in vars(module).items():
            if name in ("training", "_stored_ints", "_built_with") or "_hooks" in name:
                continue
            if all(leaf is None or isinstance(leaf, bool | int | float | str) for leaf in tree_leaves(value)):
                values[f"{prefix}.{name}".removeprefix(".")] = copy.deepcopy(value)
    return values


def copies(cases: Cases) -> None:
    """`copy.deepcopy` and `pickle` give routers that route alike."""

    def law(case: Case) -> None:
        router, x_TD, context = case.router(), case.hidden(), case.context()
        with torch.no_grad():
            expected = case.route(router, x_TD, context)
            for how, twin in (("copy", copy.deepcopy(router)), ("unpickled one", pickle.loads(pickle.dumps(router)))):
                require_same(case, expected, case.route(twin, x_TD, context), x_TD, f"a {how} routes differently")

    cases.each(law)
