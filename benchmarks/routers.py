"""Cost of each router: against `LinearRouter`, as a share of its layer, in training and in evaluation.

    python benchmarks/routers.py
    python benchmarks/routers.py --tokens 2048 --d_model 256 --num_experts 16

Forward and backward in training (losses included), forward alone in evaluation. All routers run in one process, in
turn; a ratio is the median over rounds of the times in the same round, CPU time of the process on a CPU. One thread,
unless OMP_NUM_THREADS says otherwise. Writes a table.
"""

from __future__ import annotations

import argparse
import inspect
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import routerzoo
from routerzoo import LayerSpec, MLPExperts, MoE, Router, Routing, RoutingContext
from routerzoo.moe.auxiliary_loss import ROUTING_LOSSES, loss_of

LAYER_ROUNDS = 2


def main() -> None:
    """Measure every registered router."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--d_model", type=int, default=512)
    parser.add_argument("--num_experts", type=int, default=64)
    parser.add_argument("--top_k", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=None, help="a file for the table")
    options = parser.parse_args()
    spec = LayerSpec(
        options.d_model, options.num_experts, layer=0, vocab_size=50_000, num_positions=options.tokens, num_tasks=2
    )
    torch.manual_seed(0)
    steps: dict[tuple[str, str], Callable[[], None]] = {}
    layers: dict[str, Callable[[LayerSpec], Router]] = {}
    for name in routerzoo.list_routers():
        factory = routerzoo.registry.router_class(name)
        if "top_k" in inspect.signature(factory).parameters:
            factory = partial(factory, top_k=options.top_k)
        router = factory(spec).to(options.device)
        steps[name, "training"] = training_step(router, options)
        steps[name, "evaluation"] = evaluation_step(factory(spec).to(options.device).eval(), options)
        layers[name] = factory
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for number in range(options.rounds + 1):
        for key in random.Random(number).sample(list(steps), len(steps)):
            seconds = timed(steps[key], options.device)
            if number:
                times[key].append(seconds)
    # One after the other: all at once would fill the memory. Their time changes a share by little.
    shares = {}
    for name, factory in layers.items():
        step = training_step(MoE(spec, factory, MLPExperts).to(options.device, dtype_on(options.device)), options)
        step()
        shares[name] = min(times[name, "training"]) / min(timed(step, options.device) for _ in range(LAYER_ROUNDS))
        del step
    table = [
        f"{options.tokens} tokens, width {options.d_model}, {options.num_experts} experts, k = {options.top_k}, "
        f"{options.device}, {dtype_on(options.device)}, {torch.get_num_threads()} thread(s), torch {torch.__version__},"
        f" medians of {options.rounds} rounds. Command: `python benchmarks/routers.py`",
        "",
        "| router | training, ms | to LinearRouter | share of its layer | evaluation, ms | to LinearRouter |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in routerzoo.list_routers():
        training, evaluation = times[name, "training"], times[name, "evaluation"]
        linear = times["LinearRouter", "training"]
        table.append(
            f"| {name} | {1000 * statistics.median(training):.2f} | {ratio(training, linear):.2f} "
            f"| {100 * shares[name]:.1f} % | {1000 * statistics.median(evaluation):.2f} "
            f"| {ratio(evaluation, times['LinearRouter', 'evaluation']):.2f} |"
        )
    print("\n".join(table))
    if options.out is not None:
        options.out.write_text("\n".join(table) + "\n")


def inputs(options: Any) -> tuple[Tensor, RoutingContext]:
    """Return hidden states and a whole context."""
    tokens = torch.arange(options.tokens, device=options.device)
    ids = torch.randint(50_000, (options.tokens,), device=options.device)
    attention_THS = torch.ones(options.tokens, 8, options.tokens, device=options.device).tril_().softmax(-1)
    context = RoutingContext(
        token_ids=ids,
        positions=tokens,
        sequence_ids=tokens * 0,
        task_ids=tokens * 0,
        attention=attention_THS,
        step=0,
        total_steps=100,
    )
    x_TD = torch.randn(options.tokens, options.d_model, device=options.device, dtype=dtype_on(options.device))
    return x_TD, context


def dtype_on(device: str) -> torch.dtype:
    """Return the dtype of hidden states and experts that one would use there."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def training_step(module: Router | MoE, options: Any) -> Callable[[], None]:
    """Return forward and backward, through the losses of a router too."""
    x_TD, context = inputs(options)
    x_TD.requires_grad_()

    def step() -> None:
        module.zero_grad()
        x_TD.grad = None
        current = context.new_pass()
        answer = module(x_TD, current)
        if isinstance(answer, Tensor):
            answer.sum().backward()
            return
        objective = first_weight(answer) + sum(answer.losses.values())
        declared = [
            name for name in module.default_loss_weights if name in ROUTING_LOSSES and name not in answer.losses
        ]
        objective = objective + sum(loss_of(name, answer, current) for name in declared)
        if objective.requires_grad:
            objective.backward()

    return step


def first_weight(routing: Routing) -> Tensor:
    """Return a sum of weights that a gradient goes through, whatever the form."""
    for weights in (routing.weights_TK, routing.weight_N, routing.combine_GSEP, routing.merge_GE):
        if weights is not None:
            return weights.select(-1, 0).sum() if weights.ndim > 1 else weights[::2].sum()
    raise AssertionError("a Routing has one form")


def evaluation_step(router: Router, options: Any) -> Callable[[], None]:
    """Return the forward pass without gradients."""
    x_TD, context = inputs(options)

    @torch.no_grad()
    def step() -> None:
        router(x_TD, context.new_pass())

    return step


def timed(step: Callable[[], None], device: str) -> float:
    """Return the seconds of a step."""
    if device == "cuda":
        torch.cuda.synchronize()
        begun = time.perf_counter()
        step()
        torch.cuda.synchronize()
        return time.perf_counter() - begun
    begun = time.process_time()
    step()
    return time.process_time() - begun


def ratio(own: list[float], other: list[float]) -> float:
    """Return the median of paired ratios."""
    return statistics.median(a / b for a, b in zip(own, other, strict=True))


if __name__ == "__main__":
    main()
