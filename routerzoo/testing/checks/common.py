"""What the checks share.

A check tries a *law* on many examples of a router: a statement that holds in each of them, whatever the sizes, the seed
and the step of training.
"""
# Shape suffixes: T tokens, D model width, E experts, K choices per token.

from __future__ import annotations

import itertools
import pickle
from typing import Any

import torch
from torch import Tensor

from routerzoo.router import Router
from routerzoo.routing import Routing
from routerzoo.testing.cases import Case, CheckFailure

MODES = (True, False)


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


def differs(a: Tensor, b: Tensor, tolerance: float = 0.0) -> bool:
    """Whether two tensors differ, by more than a share of the largest value; bit for bit where the share is 0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return True
    largest = float(b.detach().abs().nan_to_num(posinf=0.0).max()) if b.is_floating_point() and b.numel() else 0.0
    return not bool(torch.isclose(a, b, rtol=0.0, atol=tolerance * largest, equal_nan=True).all())


def snapshot(router: Router) -> dict[str, Any]:
    """Return a copy of all that a router holds: tensors by name, and whatever else can be pickled, pickled."""
    tensors = itertools.chain(router.named_parameters(), router.named_buffers())
    held: dict[str, Any] = {name: value.detach().clone() for name, value in tensors}
    for prefix, module in router.named_modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules", "_built_with", "training") or name.endswith("_hooks"):
                continue
            try:
                held[f"{prefix}.{name}".removeprefix(".")] = pickle.dumps(value)
            except Exception:  # (the check of copies tells of what cannot be pickled)
                continue
    return held


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the names of what differs between two snapshots."""
    names = {**before, **after}
    return [name for name in names if not _same(before.get(name), after.get(name))]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return not differs(a, b)
    return bool(type(a) is type(b) and a == b)


def brief(values: Tensor) -> str:
    """Show the first values of a tensor."""
    return "[" + ", ".join(f"{value:.4g}" for value in values.flatten().tolist()[:8]) + "]"


def draws_random_numbers(case: Case, router: Router) -> bool:
    """Whether the router draws random numbers in training."""
    x_TD, context = case.hidden(), case.context()
    one, other = case.route(router, x_TD, context, seed=2), case.route(router, x_TD, context, seed=3)
    return not torch.equal(case.effect(one, x_TD), case.effect(other, x_TD))


def require_valid(case: Case, routing: object, x_TD: Tensor) -> None:
    """Fail unless a routing has the shapes, dtypes and devices of the contract."""
    if not isinstance(routing, Routing):
        raise CheckFailure(f"returns a {type(routing).__name__}; a router returns a routerzoo.Routing")
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
