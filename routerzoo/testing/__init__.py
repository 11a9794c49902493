"""`check_router`: proof that a router, anyone's, is what it declares.

    from routerzoo.testing import check_router

    def test_my_router():
        check_router(MyRouter)

It needs hypothesis: `pip install 'routerzoo[testing]'`.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch

from routerzoo.moe.layer import RouterFactory
from routerzoo.registry import router_class
from routerzoo.testing.cases import Cases, CheckFailure
from routerzoo.testing.checks import CHECKS

__all__ = ["CHECKS", "QUICK_EXAMPLES", "CheckResult", "RouterCheckError", "check_router", "run_checks"]

QUICK_EXAMPLES = 4
"""Random sizes by default. More find rarer faults: 20, say, before a release."""


class CheckResult(NamedTuple):
    """What came of one check.

    Args:
        check: its name, in `CHECKS`.
        failure: what is wrong; empty where nothing is.
    """

    check: str
    failure: str


class RouterCheckError(AssertionError):
    """A router is not what it declares, or not what every router must be.

    Args:
        router: its name.
        failures: the checks that failed.
    """

    def __init__(self, router: str, failures: list[CheckResult]) -> None:
        told = "".join(f"\n\n{_explained(failure)}" for failure in failures)
        count = f"{len(failures)} of {len(CHECKS)} checks" if len(failures) > 1 else "1 check"
        super().__init__(f"{router} fails {count}.{told}")
        self.router, self.failures = router, failures


def check_router(
    router: str | RouterFactory,
    *,
    examples: int = QUICK_EXAMPLES,
    only: Collection[str] = (),
    device: str | torch.device = "cpu",
) -> None:
    """Prove that a router keeps the contract and has the properties that it declares.

    Each check is run on usual and on random sizes, in training and evaluation, at the start and at the end of training.
    A failure says what happened, with the smallest sizes that show it, how to fix the router, and where to read on. The
    same call tries the same examples every time. A few seconds a router.

    Args:
        router: a router class, a function that builds one from a `LayerSpec` (`functools.partial(MyRouter, rank=4)`),
            or a registered name. Where it takes `top_k`, several are tried.
        examples: random sizes that each check is run on, beside the usual ones.
        only: names of checks, from `CHECKS`, instead of all.
        device: where the router runs.

    Raises:
        RouterCheckError: it lists every check that failed.
        ImportError: hypothesis is not installed.
        ValueError: `only` names a check that does not exist.

    Example:
        >>> from routerzoo import HyperRouter
        >>> check_router(HyperRouter, examples=3)
    """
    __tracebackhide__ = True  # pytest shows the caller and the message
    name = router if isinstance(router, str) else _name(router)
    failures = [r for r in run_checks(router, examples=examples, only=only, device=device) if r.failure]
    if failures:
        raise RouterCheckError(name, failures)


def run_checks(
    router: str | RouterFactory,
    *,
    examples: int = QUICK_EXAMPLES,
    only: Collection[str] = (),
    device: str | torch.device = "cpu",
) -> Iterator[CheckResult]:
    """Yield the result of each check as it is run; the arguments are those of `check_router`."""
    try:
        import hypothesis  # noqa: F401 (what follows needs it)
    except ImportError as error:
        raise ImportError("routerzoo.testing needs hypothesis: pip install 'routerzoo[testing]'") from error
    if unknown := set(only) - set(CHECKS):
        raise ValueError(f"no check is called {', '.join(sorted(unknown))}; there are {', '.join(CHECKS)}")
    factory = router_class(router) if isinstance(router, str) else router
    cases = Cases(factory, examples, device)
    for name in only or CHECKS:
        try:
            CHECKS[name](cases)
        except CheckFailure as error:
            yield CheckResult(name, str(error))
        except Exception as error:
            # Whatever a router does, the other checks run.
            yield CheckResult(name, f"raises {type(error).__name__}: {error}")
        else:
            yield CheckResult(name, "")


def _explained(failure: CheckResult) -> str:
    summary, _, details = (inspect.getdoc(CHECKS[failure.check]) or "").partition("\n\n")
    advice = f"\n  {' '.join(details.split())}" if details else ""
    where = f"help(routerzoo.testing.CHECKS[{failure.check!r}]), help(routerzoo.Router)"
    return f"{failure.check}: {failure.failure}\n  Must hold: {' '.join(summary.split())}{advice}\n  Read: {where}"


def _name(factory: RouterFactory) -> str:
    function = getattr(factory, "func", factory)
    return str(getattr(function, "__name__", type(function).__name__))
