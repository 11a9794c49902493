"""One run: build the model, train it, evaluate it. Everything follows from the task's seed."""
# Shape suffixes: T tokens, E experts, K choices per token, C domains.

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from routerzoo.bench.choices import RouterChoice
from routerzoo.bench.controls import ORACLE_EXPERTS, DenseRouter, OracleRouter
from routerzoo.bench.routings import chosen_experts, correlation, first_choices, normalized_mutual_information
from routerzoo.bench.task import Batch, BenchTask
from routerzoo.costs import Costs, count_costs
from routerzoo.errors import UserError
from routerzoo.moe.attach import attach
from routerzoo.moe.auxiliary_loss import auxiliary_loss
from routerzoo.moe.layer import MoE, inner_router, moe_layers
from routerzoo.router import LossWeight
from routerzoo.routing import RoutingContext

FINAL_LR = 0.1
"""The learning rate falls by a cosine to this share of its peak."""
EVALUATIONS = 10
"""Along training, the last one at its end."""
OF_MICRO_BATCHES = frozenset({"local_balance", "global_balance"})
"""Losses for which each micro-batch is a pass of its own; to all others they are parts of one batch."""
CURVE_TOKENS = 1024
"""Of each evaluation but the last, in whole sequences."""


class DivergedError(ArithmeticError):
    """The loss became NaN or inf."""


@dataclass(frozen=True)
class Outcome:
    """What a run measures; see `Row`."""

    loss: float
    nmi: float | None
    dead_experts: float | None
    max_load: float | None
    load_entropy: float | None
    nmi_by_layer: str
    loss_by_domain: str
    mean_k: float
    train_k: float
    need_correlation: float | None
    parameters: int
    active_parameters: int
    train_flops: float
    curve: str


def build(task: BenchTask, choice: RouterChoice) -> nn.Module:
    """Build the task's model around a router.

    A MoE layer draws its router's weights from a generator of their own, so that all others are equal bit for bit
    between the routers of a seed.
    """
    with drawn_from(task.seed_of("initialization")):
        # A router that is causal in evaluation alone, as assignments are, may do causal tasks: evaluation is compared.
        return task.model(lambda spec: choice.build(spec, task.top_k).eval())


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Draw random numbers of the CPU from a seed for a while."""
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


class Run:
    """Trains and evaluates one router in one task.

    Args:
        task: the task, of the run's seed.
        choice: the router.
        lr: the peak learning rate, of AdamW without weight decay.
        aux_scale: factor on the router's published coefficients of auxiliary losses.
    """

    def __init__(self, task: BenchTask, choice: RouterChoice, lr: float, aux_scale: float = 1.0) -> None:
        self.task, self.lr = task, lr
        self.model = build(task, choice)
        self.layers: list[MoE] = list(moe_layers(self.model))
        for layer in self.layers:
            layer.warns_of_batch_dependence = False  # nobody is served
        routers = [inner_router(layer) for layer in self.layers]
        weights = routers[0].default_loss_weights if choice.loss_weights is None and routers else choice.loss_weights
        self.aux_weights: dict[str, LossWeight] = scaled(weights or {}, aux_scale)
        self._passes = task.micro_batches if self.aux_weights.keys() & OF_MICRO_BATCHES else 1
        self._oracle = any(isinstance(router, OracleRouter) for router in routers)
        self._dense = any(isinstance(router, DenseRouter) for router in routers)
        self._attention = any("attention" in router.requires for router in routers)
        self._wants_feedback = any(router.wants_feedback for router in routers)
        self._token_counts = self._counted_ids() if any(router.wants_token_counts for router in routers) else None
        places: dict[int, tuple[Tensor, Tensor]] = {}
        self._curve_tokens = max(CURVE_TOKENS // task.sequence_length, 1) * task.sequence_length
        for tokens in (task.tokens, task.tokens // self._passes, task.evaluation_tokens, self._curve_tokens):
            place_T = torch.arange(tokens)
            places[tokens] = place_T % task.sequence_length, place_T // task.sequence_length
        self._places = places

    def _counted_ids(self) -> Tensor:
        tokens, generator = self.task.evaluation_tokens, self.task.generator("token counts")
        ids_T = self.task.batch(tokens, generator, 0.0).token_ids_T
        return torch.bincount(ids_T, minlength=self.task.vocab_size)

    def context(self, batch: Batch, step: int, compute_aux_losses: bool) -> RoutingContext:
        """Return what the router may look at beside the hidden states."""
        positions_T, sequence_ids_T = self._places[len(batch.token_ids_T)]
        context = RoutingContext(
            token_ids=batch.token_ids_T,
            positions=positions_T,
            sequence_ids=sequence_ids_T,
            task_ids=batch.domain_T if "task_ids" in self.task.provides else None,
            attention=self.task.attention(batch) if self._attention else None,
            step=step,
            total_steps=self.task.num_steps,
            compute_aux_losses=compute_aux_losses,
        )
        if self._oracle:
            context.carry[ORACLE_EXPERTS] = self.task.oracle(batch)
        return context

    def outcome(self) -> Outcome:
        """Train, and return what came of it.

        Raises:
            DivergedError: the loss became NaN or inf.
        """
        task, steps = self.task, self.task.num_steps
        with drawn_from(task.seed_of("noise")):
            points = []
            every = max(steps // EVALUATIONS, 1)
            for step in self._train():
                if step % every == 0 or step == steps:
                    points.append((step, *self.evaluate(step)))
        _, loss, batch, context, costs = points[-1]
        curve = " ".join(f"{step}:{value:.6g}" for step, value, *_ in points)
        train_k = sum(self._mean_k(told) for *_, told, _ in points) / len(points)
        flops = sum(told.flops for *_, told in points) / len(points)
        return Outcome(
            loss=loss,
            **self._routing_metrics(batch, context),
            loss_by_domain=self._loss_by_domain(batch),
            mean_k=self._mean_k(context),
            train_k=train_k,
            parameters=costs.trainable,
            active_parameters=costs.active,
            train_flops=3 * flops * task.tokens * steps,
            curve=curve,
        )

    def _train(self) -> Iterator[int]:
        """Train, and yield the number of steps taken after each."""
        task, steps, model = self.task, self.task.num_steps, self.model.train()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = AdamW(parameters, self.lr, weight_decay=0.0, fused=True)
        updates = attach(self.layers, optimizer, steps, token_counts=self._token_counts)
        generator = task.generator("training")
        warm_up = max(min(task.warm_up_steps, steps // 5), 1)
        for step in range(steps):
            for batch in task.batch(task.tokens, generator, step / steps).split(self._passes):
                torch.autograd.backward(self._loss(batch, step) / self._passes)
            if math.isfinite(task.max_gradient_norm):
                nn.utils.clip_grad_norm_(parameters, task.max_gradient_norm)
            optimizer.param_groups[0]["lr"] = self.lr * learning_rate_share(step, steps, warm_up)
            optimizer.step()
            optimizer.zero_grad()
            yield step + 1
        updates.remove()

    def _loss(self, batch: Batch, step: int) -> Tensor:
        """Return the loss of a micro-batch, with its auxiliary losses.

        Raises:
            DivergedError: it is NaN or inf.
        """
        context = self.context(batch, step, bool(self.aux_weights))
        losses_T = self.task.token_losses(self.model(batch.x, context), batch)
        loss = losses_T.mean()
        if self.aux_weights:
            told = losses_T if self._wants_feedback else None
            loss = loss + auxiliary_loss(self.layers, context, self.aux_weights, token_losses=told)
        if not math.isfinite(loss.item()):
            raise DivergedError(f"the training loss is {loss.item()} at step {step}")
        return loss

    def evaluate(self, step: int) -> tuple[float, Batch, RoutingContext, Costs]:
        """Return the loss on fresh tokens, which are the same for all routers, and what it was measured on."""
        task, last = self.task, step == self.task.num_steps
        tokens = task.evaluation_tokens if last else self._curve_tokens
        batch = task.batch(tokens, task.generator("evaluation" if last else "curve"), step / task.num_steps)
        context = self.context(batch, step, False)
        losses: list[Tensor] = []

        def run() -> int:
            losses.append(task.token_losses(self.model(batch.x, context), batch))
            return tokens

        costs = count_costs(self.model, run)
        loss = float(losses[0].mean())
        if not math.isfinite(loss):
            raise DivergedError(f"the evaluation loss is {loss} after {step} steps")
        self._losses_T = losses[0]
        return loss, batch, context, costs

    def flops(self) -> float:
        """Return the operations of a token's forward pass, as the model is before training."""
        return self.evaluate(0)[-1].flops

    def _loss_by_domain(self, batch: Batch) -> str:
        """Return the mean of the last evaluation's losses in each domain."""
        known_T, domains = batch.domain_T >= 0, self.task.num_domains
        domain_N, losses_N = batch.domain_T[known_T], self._losses_T[known_T].double()
        total_C = torch.zeros(domains, dtype=torch.float64).index_add_(0, domain_N, losses_N)
        mean_C = total_C / torch.bincount(domain_N, minlength=domains)
        return " ".join(f"{mean:.6g}" for mean in mean_C.tolist())

    def _mean_k(self, context: RoutingContext) -> float:
        """Return experts per token, the mean over layers."""
        loads = [entry.routing.expert_load(self.task.num_experts).sum() for entry in context.routings]
        tokens = len(context.token_ids) if context.token_ids is not None else 1
        return float(torch.stack(loads).mean()) / tokens if loads else 0.0

    def _routing_metrics(self, batch: Batch, context: RoutingContext) -> dict[str, Any]:
        """Return metrics of the final routing, means over layers; nothing for a dense network."""
        names = ("nmi", "dead_experts", "max_load", "load_entropy", "need_correlation")
        found: dict[str, Any] = dict.fromkeys(names)
        if self._dense:
            return {**found, "nmi_by_layer": ""}
        num_experts = self.task.num_experts
        values: dict[str, list[float]] = {name: [] for name in found}
        for entry in context.routings:
            routing = entry.routing
            load_E = routing.expert_load(num_experts)
            share_E = load_E / load_E.sum() * num_experts
            values["dead_experts"].append(float((share_E < 0.1).sum()))
            values["max_load"].append(float(share_E.max()))
            part_E = share_E.double() / num_experts
            values["load_entropy"].append(-float(torch.xlogy(part_E, part_E).sum()) / math.log(num_experts))
            first_T = first_choices(routing, len(batch.domain_T))
            values["nmi"].append(normalized_mutual_information(batch.domain_T, first_T, num_experts))
            if batch.need_T is not None and not routing.dense:
                values["need_correlation"].append(correlation(chosen_experts(routing, len(batch.need_T)), batch.need_T))
        for name, of_layers in values.items():
            finite = [value for value in of_layers if math.isfinite(value)]
            found[name] = sum(finite) / len(finite) if finite else None
        return {**found, "nmi_by_layer": " ".join(f"{value:.4g}" for value in values["nmi"])}


def check_passes(cls: type[BenchTask]) -> None:
    """Let a task's model learn from one batch, with the blind control, and evaluate it.

    Raises:
        UserError: it cannot; the message says why.
    """
    task = cls(0)
    try:
        run = Run(task, RouterChoice("blind"), 0.0)
        batch = task.batch(task.tokens, task.generator("training"), 0.0)
        losses_T = task.token_losses(run.model(batch.x, run.context(batch, 0, False)), batch)
        torch.autograd.backward(losses_T.mean())
        run.flops()
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the task {cls.name} cannot be trained on: {type(error).__name__}: {reason}") from error
    if losses_T.shape != (task.tokens,):
        raise UserError(
            f"{cls.name}: token_losses must return a loss for each of {task.tokens} tokens, got {list(losses_T.shape)}"
        )


def learning_rate_share(step: int, steps: int, warm_up_steps: int) -> float:
    """Return the share of the peak learning rate: a linear warm-up, then a cosine."""
    share = FINAL_LR + (1 - FINAL_LR) * (1 + math.cos(math.pi * step / steps)) / 2
    return min(1.0, (step + 1) / warm_up_steps) * share


def scaled(weights: Mapping[str, float | LossWeight], factor: float) -> dict[str, LossWeight]:
    """Return loss weights times a factor, without those that are 0."""
    declared = {name: w if isinstance(w, LossWeight) else LossWeight(w) for name, w in weights.items()}
    return {name: replace(w, value=w.value * factor) for name, w in declared.items() if w.value * factor != 0}
