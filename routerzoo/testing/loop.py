"""`Loop`: the training loop of the checks, with what `routerzoo.attach` does in anybody's."""
# Shape suffixes: T tokens, D model width.

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from routerzoo.moe.attach import attach
from routerzoo.moe.auxiliary_loss import auxiliary_loss
from routerzoo.moe.layer import MoE
from routerzoo.router import Router
from routerzoo.testing.cases import TOKEN_COUNTS, Case, CheckFailure, seeded

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


class Loop:
    """Trains one MoE layer around a router, on inputs that follow from the number of the step.

    The objective is a random projection of the layer's output and the router's losses, all with coefficient 1.

    Args:
        case: sizes and inputs.
        router: the router; it must not have trained yet.
        make: builds the optimizer.
        micro_batches: parts of the batch whose gradients are accumulated in a step.

    Attributes:
        reached: for each parameter of the router, whether a gradient other than 0 ever reached it.
    """

    def __init__(self, case: Case, router: Router, make: MakeOptimizer, micro_batches: int = 1) -> None:
        self.case, self.router, self.micro_batches = case, router, micro_batches
        with seeded(case.sizes.seed + 3):
            self.layer = MoE(router.spec, lambda spec: router).to(case.device).train()
        self.optimizer = make(self.layer.parameters())
        self.reached = {name: False for name, value in router.named_parameters() if value.requires_grad}
        self._at_start: dict[str, bool] = {}

    def run(self, steps: range, total_steps: int) -> None:
        """Take steps of training, of a run that is `total_steps` long.

        Raises:
            CheckFailure: the optimizer moves a parameter of the router that is no longer trained.
        """
        counts = TOKEN_COUNTS.to(self.case.device)
        updates = attach(self.layer, self.optimizer, total_steps, step=steps[0], token_counts=counts)
        for step in steps:
            self._step(step, total_steps)
        updates.remove()

    def _step(self, step: int, total_steps: int) -> None:
        case, router = self.case, self.router
        self.optimizer.zero_grad()
        x_TD = case.hidden(10 + step)
        context = case.context(ids_seed=10 + step, step=step, total_steps=total_steps)
        size = case.num_tokens // self.micro_batches
        for begin in range(0, case.num_tokens, size):
            own = slice(begin, begin + size)
            part = case.take(context, own)
            with seeded(case.sizes.seed + 20 + step):
                y_TD = self.layer(x_TD[own].clone().requires_grad_(), part)
                probe_TD = torch.randn(y_TD.shape).to(y_TD)
            (routing,) = part.routings_of(self.layer)
            losses = dict.fromkeys((*router.default_loss_weights, *routing.losses), 1.0)
            told = auxiliary_loss(self.layer, part, losses, token_losses=case.token_losses(size))
            torch.autograd.backward((y_TD * probe_TD).sum() + told)
        now = {}
        for name, value in router.named_parameters():
            if value.requires_grad:
                now[name] = value.grad is not None and bool(value.grad.any())
                # What data-parallel training without unused-parameter detection hands to the optimizer.
                value.grad = torch.zeros_like(value) if value.grad is None else value.grad
        self._at_start = self._at_start or now
        before = {name: value.detach().clone() for name, value in router.named_parameters()}
        self.optimizer.step()  # and what `attach` hangs on it
        for name, value in router.named_parameters():
            if self._at_start.get(name) and not now.get(name) and not torch.equal(value, before[name]):
                raise CheckFailure(
                    f"{name} is no longer trained at the end of training, but the optimizer still moves it: write its "
                    "frozen value back in `update`"
                )
        self.reached = {name: self.reached[name] or now.get(name, False) for name in self.reached}


def sgd(learning_rate: float = 1e-3, momentum: float = 0.0, weight_decay: float = 0.0) -> MakeOptimizer:
    """Return what builds a `torch.optim.SGD`."""
    return lambda parameters: torch.optim.SGD(parameters, learning_rate, momentum, weight_decay=weight_decay)


def adamw(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Build a `torch.optim.AdamW` with a large weight decay."""
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
