"""`cross_batch_attack`: can one sequence of a batch change what another one gets?"""
# Shape suffixes: T tokens, D model width, E experts.

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from routerzoo.moe.layer import RouterFactory
from routerzoo.registry import router_class
from routerzoo.router import Router
from routerzoo.routing import RoutingContext
from routerzoo.testing.cases import Case, Cases, seeded

__all__ = ["Attack", "cross_batch_attack"]


class Attack(NamedTuple):
    """The worst batch-mate that a search found.

    Args:
        change: largest change of the victim's output, relative to the output's root mean square; 0 for none, bit for
            bit.
        tried: batch-mates that were tried.
        hidden_TD: the worst one's hidden states; None where none changed anything.
    """

    change: float
    tried: int
    hidden_TD: Tensor | None

    def __str__(self) -> str:
        if self.hidden_TD is None:
            return f"none of {self.tried} batch-mates changed the victim's output"
        return f"the worst of {self.tried} batch-mates changed the victim's output by {self.change:.3g} of its size"


def cross_batch_attack(
    router: str | RouterFactory, *, training: bool = False, tries: int = 60, seed: int = 0, length: int = 8
) -> Attack:
    """Search a batch-mate that changes a victim's output, in the spirit of "Buffer Overflow in Mixture of Experts".

    Victim and attacker are two sequences of a batch of fixed shape (Hayes et al. 2024,
    https://arxiv.org/abs/2402.05526). The attacker tries copies of the victim's tokens, which want the same experts,
    noise of all sizes, and steps from the worst found so far; before the victim in the batch and after it. The experts
    are random linear maps, all computed for all tokens, so that nothing but the routing can make a difference, and a
    safe router makes none: not a bit.

    Args:
        router: a router class, a function that builds one from a `LayerSpec`, or a registered name.
        training: attack the router as it trains; by default as it serves.
        tries: batch-mates to try.
        seed: of the router, the victim and the search.
        length: tokens of each sequence.

    Returns:
        The worst one found.

    Example:
        >>> print(cross_batch_attack("LinearRouter", tries=10))
        none of 10 batch-mates changed the victim's output
    """
    factory = router_class(router) if isinstance(router, str) else router
    case = Cases(factory).standard(num_sequences=2, length=length, seed=seed)
    built = case.router(training=training)
    with seeded(case.sizes.seed + 11):
        experts_EDD = torch.randn(case.sizes.num_experts, case.sizes.d_model, case.sizes.d_model)
    worst, worst_TD, tried = 0.0, None, 0
    victim_TD, harmless_TD = case.hidden()[:length], case.hidden()[length:]
    safe = {}
    for first in (True, False):
        x_TD = _batch(victim_TD, harmless_TD, first)
        safe[first] = _output(case, built, x_TD, case.context(), experts_EDD, first)
    for attacker_TD in _attackers(case, victim_TD, tries):
        if worst_TD is not None and tried % 2:
            with seeded(case.sizes.seed + 1000 + tried):  # climb
                attacker_TD = worst_TD + 0.3 * attacker_TD.std() * torch.randn_like(attacker_TD)
        first = tried % 2 == 0  # the attacker comes before the victim, or after it
        tried += 1
        before_SD = safe[first]
        context = case.context(ids_seed=20 + tried)
        after_SD = _output(case, built, _batch(victim_TD, attacker_TD, first), context, experts_EDD, first)
        if torch.equal(before_SD, after_SD):
            continue
        change = float((after_SD - before_SD).abs().max() / before_SD.square().mean().sqrt().clamp_min(1e-12))
        if change > worst or worst_TD is None:
            worst, worst_TD = change, attacker_TD
    return Attack(worst, tried, worst_TD)


def _own(case: Case, attacker_first: bool) -> slice:
    """Return the victim's place in the batch."""
    return slice(case.sizes.length, None) if attacker_first else slice(0, case.sizes.length)


def _batch(victim_TD: Tensor, attacker_TD: Tensor, attacker_first: bool) -> Tensor:
    return torch.cat([attacker_TD, victim_TD] if attacker_first else [victim_TD, attacker_TD])


def _output(
    case: Case, router: Router, x_TD: Tensor, context: RoutingContext, experts_EDD: Tensor, attacker_first: bool
) -> Tensor:
    """Return what the victim gets, `[length, D]`."""
    own, plain = _own(case, attacker_first), case.context()
    fields = {}
    for name in ("token_ids", "attention"):
        value, kept = getattr(context, name).clone(), getattr(plain, name)
        value[own] = kept[own]
        fields[name] = value
    with torch.no_grad():
        routing = case.route(router, x_TD, context.replace(**fields))
        if routing.dispatch_GSEP is not None:
            return case.effect(routing, x_TD)[own]  # already outputs of linear experts
        weights_TE = case.effect(routing, x_TD)[:, : case.sizes.num_experts]
        outputs_TED = torch.einsum("td,edf->tef", x_TD, experts_EDD)
        return torch.bmm(weights_TE.unsqueeze(1), outputs_TED).squeeze(1)[own]


def _attackers(case: Case, victim_TD: Tensor, tries: int) -> Iterator[Tensor]:
    for number in range(tries):
        with seeded(case.sizes.seed + 100 + number):
            scale = 10.0 ** float(torch.empty(()).uniform_(-2, 2))
            if number % 3 == 0:
                # One of the victim's tokens again and again: all want the same experts.
                token = victim_TD[torch.randint(len(victim_TD), (1,))]
                yield (token * scale).expand_as(victim_TD).clone()
            elif number % 3 == 1:
                yield victim_TD[torch.randperm(len(victim_TD))] * scale
            else:
                yield torch.randn_like(victim_TD) * scale
