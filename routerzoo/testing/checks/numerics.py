"""Checks of precision, of broken numbers and of compilation."""
# Shape suffixes: T tokens, D model width, E experts, K choices per token.

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from routerzoo.testing.cases import Case, Cases, CheckFailure, seeded
from routerzoo.testing.checks.common import (
    MODES,
    brief,
    draws_random_numbers,
    fail_unless,
    mode,
    require_equal_effects,
    require_same,
    require_valid,
)


def float32_scores(cases: Cases) -> None:
    """Scores are float32 under autocast, under bfloat16 hidden states and after `.bfloat16()`.

    A gate rounded to 16 bits decides near-ties at random. Implement `route` and leave `forward` alone: it switches
    autocast off. Every product with the hidden states, which come in their own dtype, goes through
    `routerzoo.functional.gate_linear`.
    """

    def law(case: Case) -> None:
        router, x_TD, context = case.router(), case.hidden(), case.context()
        for training in MODES:
            with _NarrowOperations() as narrow:
                plain = case.route(router.train(training), x_TD, context)
            fail_unless(
                not narrow.found,
                f"rounds float32 hidden states to 16 bits in {mode(training)} ({', '.join(narrow.found)})",
            )
        with torch.autocast(case.device.type, torch.bfloat16):
            mixed = case.route(router, x_TD, context)
        require_same(case, plain, mixed, x_TD, "routes differently under bfloat16 autocast")
        rounded_TD = x_TD.bfloat16()
        expected = case.route(router, rounded_TD.float(), context)
        rounded = case.route(copy.deepcopy(router).bfloat16(), rounded_TD, context)
        for routing, where in ((mixed, "autocast"), (rounded, "bfloat16 hidden states")):
            fail_unless(
                routing.logits_TE is None or routing.logits_TE.dtype == torch.float32,
                f"logits are {routing.logits_TE.dtype if routing.logits_TE is not None else ''} under {where}",
            )
        require_equal_effects(
            case.effect(expected, x_TD),
            case.effect(rounded, x_TD).float(),
            "routes differently when model and hidden states are bfloat16",
            tolerance=1e-2,
        )

    cases.each(law)


class _NarrowOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what operations give tensors of 16 bits or fewer: a product of such looks like any other afterwards."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and look at what it gives."""
        given = func(*args, **(kwargs or {}))
        for value in tree_leaves(given):
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype.itemsize < 4:
                self.found = list(dict.fromkeys([*self.found, str(func)]))
        return given


def default_dtype(cases: Cases) -> None:
    """A router builds, routes and adapts under another default dtype of torch, with hidden states of that dtype.

    Whole models are built so. Draw what 16 bits cannot (decompositions, as `nn.init.orthogonal_`) in float32 and round
    it: `routerzoo.functional.initialization.orthogonal` does.
    """
    usual = torch.get_default_dtype()
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            case = cases.standard()
            for training in MODES:
                router, x_TD, context = case.router(training=training), case.hidden(), case.context()
                routing, _ = case.route_with_losses(router, x_TD, context)
                require_valid(case, routing, x_TD)
                if training and router.needs_updates:
                    with torch.no_grad():
                        router.update(router.statistics(routing.for_losses, context))
        except CheckFailure as error:
            raise CheckFailure(f"under the default dtype {dtype}: {error}") from error
        except Exception as error:
            raise CheckFailure(f"raises {type(error).__name__} under the default dtype {dtype}: {error}") from error
        finally:
            torch.set_default_dtype(usual)


def assigned_bfloat16(cases: Cases) -> None:
    """Parameters that were loaded in bfloat16 (`load_state_dict(assign=True)`) route in float32.

    As the same router with those parameters, rounded, in float32. `Router.forward` gives `route` parameters and buffers
    of float32: read them there, not through a reference that `__init__` kept.
    """

    def law(case: Case) -> None:
        x_TD, context = case.hidden(), case.context()
        for training in MODES:
            router, narrow = case.router(training=training), case.router(training=training)
            rounded = {
                name: value.bfloat16() if value.is_floating_point() else value
                for name, value in router.state_dict().items()
            }
            router.load_state_dict(rounded)
            narrow.load_state_dict(rounded, assign=True)
            for hidden_TD in (x_TD, x_TD.bfloat16()):
                routing = case.route(narrow, hidden_TD, context)
                fail_unless(
                    routing.logits_TE is None or routing.logits_TE.dtype == torch.float32,
                    f"logits are {'' if routing.logits_TE is None else routing.logits_TE.dtype} with parameters that "
                    "were assigned in bfloat16",
                )
                require_equal_effects(
                    case.effect(case.route(router, hidden_TD, context), hidden_TD),
                    case.effect(routing, hidden_TD),
                    f"parameters that were assigned in bfloat16 are not computed with in float32, in {mode(training)}",
                )

    cases.each(law)


def extremes(cases: Cases) -> None:
    """Huge, tiny and tied hidden states give finite weights and no expert twice.

    Take softmax and logsumexp of logits rather than exponents of them, and bound what is divided by.
    """

    def law(case: Case) -> None:
        num_tokens, width = case.num_tokens, case.sizes.d_model
        inputs = {
            "hidden states around 1e15": case.hidden(scale=1e15),
            "hidden states around 1e-30": case.hidden(scale=1e-30),
            "hidden states of 0": torch.zeros(num_tokens, width, device=case.device),
            "equal hidden states": torch.ones(num_tokens, width, device=case.device),
        }
        for training in MODES:
            router = case.router(training=training)
            for what, x_TD in inputs.items():
                routing = case.route(router, x_TD, case.context())
                effect = case.effect(routing, x_TD)
                fail_unless(
                    effect.isfinite().all(), f"weights are not finite for {what} in {mode(training)}: {brief(effect)}"
                )
                if not routing.dense:
                    chosen_TE = effect[:, case.sizes.num_experts :]
                    fail_unless((chosen_TE <= 1).all(), f"a token selects an expert twice for {what}")

    cases.each(law)


def nan(cases: Cases) -> None:
    """A NaN hidden state is refused with a ValueError or gives NaN weights; it is never silently routed.

    A broken number must surface where it is, not as a plausible choice of experts. A router that ignores hidden states
    (a table of token ids) cannot know. Chosen experts stay valid indices, and other tokens are unharmed in a tokenwise
    router.
    """

    def law(case: Case) -> None:
        if case.num_tokens == 0:
            return
        router, x_TD, context = case.router(), case.hidden(), case.context()
        broken_TD = x_TD.clone()
        broken_TD[0, 0] = torch.nan
        try:
            routing = case.route(router, broken_TD, context)
        except ValueError:
            return
        except Exception as error:
            raise CheckFailure(f"raises {type(error).__name__} for a NaN hidden state: {error}") from error
        effect = case.effect(routing, broken_TD.nan_to_num())
        if not routing.dense:
            expert_N = routing.assignments().expert_N
            fail_unless(
                ((expert_N >= -1) & (expert_N < case.sizes.num_experts)).all(), "selects experts that do not exist"
            )
        if not effect[0].isnan().any():
            others = []
            for seed in (5, 6, 7):
                y_TD = x_TD.clone()
                y_TD[0] = case.hidden(seed, scale=3.0)[0]
                others.append(case.effect(case.route(router, y_TD, context), y_TD)[0])
            fail_unless(
                all(torch.equal(effect[0], other) for other in others),
                f"routes a token whose hidden state is NaN as if nothing were wrong: {brief(effect[0])}",
            )
        if router.properties.tokenwise:
            sound = case.effect(case.route(router, x_TD, context), x_TD)
            require_equal_effects(sound[1:], effect[1:], "a NaN in one token changes the routing of others")

    cases.each(law)


def compiles(cases: Cases) -> None:
    """`torch.compile(fullgraph=True)` takes the router where `compiles` is declared, and gives the same routings.

    Branch on k, stage and `self.training` as you like; branching on values of tensors breaks the graph.
    """
    case = cases.standard()
    if not case.router().properties.compiles:
        return
    for training in MODES:
        router, x_TD, context = case.router(training=training), case.hidden(), case.context()
        noisy = training and draws_random_numbers(case, router)
        expected = case.route(router, x_TD, context)
        torch.compiler.reset()
        try:
            compiled = torch.compile(router, backend="eager", fullgraph=True)
            with seeded(case.sizes.seed + 2), warnings.catch_warnings():
                # Torch's advice about one version of Python says nothing of the router.
                warnings.filterwarnings("ignore", message="Guards may run slower on Python")
                routing = compiled(x_TD, context.new_pass())
        except Exception as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else ""
            raise CheckFailure(
                f"does not compile in {mode(training)} ({type(error).__name__}: {first}); fix it, or declare "
                "compiles = False"
            ) from error
        finally:
            torch.compiler.reset()
        if not noisy:
            require_equal_effects(
                case.effect(expected, x_TD),
                case.effect(routing, x_TD),
                f"routes differently when compiled, in {mode(training)}",
                tolerance=1e-5,
            )
