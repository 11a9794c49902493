"""What the checks share."""
# Shape suffixes: T tokens, D model width, E experts, K choices per token.

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from routerzoo.router import Router
from routerzoo.routing import Routing
from routerzoo.testing.cases import Case, Cases, CheckFailure

MODES = (True, False)
CHECKS: dict[str, Callable[[Cases], None]] = {}
"""The checks by name, in the order in which `check_router` tries them."""


def law_of_routers(function: Callable[[Cases], None]) -> Callable[[Cases], None]:
    """Add a law to those that `check_router` tries."""
    CHECKS[function.__name__] = function
    return function


def mode(training: bool) -> str:
    """Name a mode."""
    return "training" if training else "evaluation"


def fail_unless(condition: bool | Tensor, message: str) -> None:
    """Fail with this message where the condition does not hold."""
    if not bool(condition):
        raise CheckFailure(message)


def require_same(case: Case, a: Routing, b: Routing, x_TD: Tensor, message: str) -> None:
    """Fail unless two routings of the same hidden states do the same, bit for bit."""
    require_equal_effects(case.effect(a, x_TD), case.effect(b, x_TD), message)


def require_equal_effects(a: Tensor, b: Tensor, message: str, tolerance: float = 0.0) -> None:
    """Fail unless two effects (see `Case.effect`) are equal, and name the first token where they are not."""
    if a.shape != b.shape:
        raise CheckFailure(f"{message}: {len(a)} tokens became {len(b)}")
    close = torch.isclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True).flatten(1).all(1)
    if not close.all():
        token = int((~close).nonzero()[0])
        raise CheckFailure(f"{message} (first at token {token}: {brief(a[token])} became {brief(b[token])})")


def brief(values: Tensor) -> str:
    """Show the first values of a tensor."""
    return "[" + ", ".join(f"{value:.4g}" for value in values.flatten().tolist()[:8]) + "]"


def draws_random_numbers(case: Case, router: Router) -> bool:
    """Whether the router draws random numbers in training."""
    x_TD, context = case.hidden(), case.context()
    one, other = case.route(router, x_TD, context, seed=2), case.route(router, x_TD, context, seed=3)
    return not torch.equal(case.effect(one, x_TD), case.effect(other, x_TD))


def require_valid(case: Case, routing: object, x_TD: Tensor) -> None:
    """Fail unless an answer has the shapes, dtypes and devices of the contract."""
    if not isinstance(routing, Routing):
        raise CheckFailure(f"answers with a {type(routing).__name__}; a router returns a routerzoo.Routing")
    num_tokens, num_experts = len(x_TD), case.sizes.num_experts
    if routing.dispatch_GSEP is not None and routing.combine_GSEP is not None:
        shape = list(routing.dispatch_GSEP.shape)
        fail_unless(
            routing.combine_GSEP.shape == routing.dispatch_GSEP.shape
            and shape[0] * shape[1] == num_tokens
            and shape[2] == num_experts,
            f"dispatch is {shape}, combine {list(routing.combine_GSEP.shape)}; both must be "
            f"[groups, tokens of a group, {num_experts}, slots] with {num_tokens} tokens in all",
        )
        weights = [routing.dispatch_GSEP, routing.combine_GSEP]
    elif routing.merge_GE is not None and routing.group_T is not None:
        groups = routing.merge_GE.shape[0]
        fail_unless(
            list(routing.merge_GE.shape) == [groups, num_experts] and list(routing.group_T.shape) == [num_tokens],
            f"merge weights are {list(routing.merge_GE.shape)}, groups of tokens {list(routing.group_T.shape)}; they "
            f"must be [groups, {num_experts}] and [{num_tokens}]",
        )
        fail_unless(
            routing.group_T.dtype == torch.int64 and bool(((routing.group_T >= -1) & (routing.group_T < groups)).all()),
            f"groups of tokens must be int64 in -1..{groups - 1}, got {routing.group_T.tolist()}",
        )
        weights = [routing.merge_GE]
    else:
        pairs = routing.assignments()
        weights = [pairs.weight_N]
        if routing.experts_TK is not None and routing.weights_TK is not None:
            fail_unless(
                routing.experts_TK.shape == routing.weights_TK.shape and len(routing.experts_TK) == num_tokens,
                f"experts are {list(routing.experts_TK.shape)}, weights {list(routing.weights_TK.shape)}; both must be "
                f"[{num_tokens}, k]",
            )
        for name, values, low, size in (
            ("expert", pairs.expert_N, -1, num_experts),
            ("token", pairs.token_N, 0, num_tokens),
        ):
            fail_unless(values.dtype == torch.int64, f"{name} indices are {values.dtype}, not int64")
            fail_unless(values.device == x_TD.device, f"{name} indices are on {values.device}, not {x_TD.device}")
            fail_unless(
                ((values >= low) & (values < size)).all(),
                f"{name} indices must be in {low}..{size - 1}, got {values.tolist()}",
            )
    for value in weights:
        fail_unless(value.dtype == x_TD.dtype, f"weights are {value.dtype} where the hidden states are {x_TD.dtype}")
        fail_unless(value.device == x_TD.device, f"weights are on {value.device}, the hidden states on {x_TD.device}")
    if routing.logits_TE is not None:
        expected = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
        fail_unless(routing.logits_TE.dtype == expected, f"logits are {routing.logits_TE.dtype}, not {expected}")
        fail_unless(
            routing.logits_TE.shape == (num_tokens, num_experts),
            f"logits are {list(routing.logits_TE.shape)}, not {[num_tokens, num_experts]}",
        )
    for name, loss in routing.losses.items():
        fail_unless(
            isinstance(loss, Tensor) and loss.ndim == 0 and bool(loss.isfinite()),
            f"the loss {name!r} is {loss!r}; a loss is a finite scalar tensor",
        )
