"""`python -m routerzoo plan`: the memory, FLOPs and traffic of a run, without its processes and its weights."""
# Shape suffixes: T tokens, D model width, N rows (token-expert pairs).

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from routerzoo.cli.arguments import CommandParser
from routerzoo.cli.main import RouterZooCLI
from routerzoo.cli.main import main as run
from routerzoo.costs import short
from routerzoo.errors import UserError
from routerzoo.moe.dispatch import apply_experts
from routerzoo.moe.experts import Experts
from routerzoo.moe.layer import MoE, moe_layers
from routerzoo.router import Router
from routerzoo.routing import Routing, RoutingContext
from routerzoo.tasks.base import MoETask

SAMPLE_TOKENS = 256
# Tensors of more elements than this are made on the meta device: large experts are, routers are not.
LARGE = 2**22
WEIGHT_BYTES = 4


@dataclass(frozen=True)
class Needs:
    """What a training run needs of each process. Bytes of weights are those of float32, as mixed precision keeps them.

    Args:
        parameters: in all, frozen ones and floating-point buffers included.
        trainable: those that learn.
        active: those active per token.
        flops: of a token's forward pass, two per multiply-add; training takes about three times as many.
        router_flops: the routers' part.
        tokens: of a process's batch.
        weights: bytes of the weights that a process holds.
        gathered: bytes of the largest part that is gathered at a time, with its gradient.
        gradients: bytes of gradients.
        optimizer: bytes of the optimizer's state, of AdamW: two numbers a parameter.
        activations: bytes kept for the backward pass.
        gradient_traffic: bytes that a process sends in each step to average gradients.
        weight_traffic: bytes that it sends to gather sharded weights, forward and backward.
        token_traffic: bytes that it sends to exchange tokens between experts, if experts have equal loads.
    """

    parameters: int
    trainable: int
    active: int
    flops: float
    router_flops: float
    tokens: int
    weights: int
    gathered: int
    gradients: int
    optimizer: int
    activations: int
    gradient_traffic: int
    weight_traffic: int
    token_traffic: int

    @property
    def memory(self) -> int:
        """Bytes in all; the libraries' own, and what a device's memory loses to fragments, come on top."""
        return self.weights + self.gathered + self.gradients + self.optimizer + self.activations


def plan(task: MoETask, examples: int, processes: int = 1, *, sharded: bool = False, expert_parallel: int = 1) -> Needs:
    """Say what a run needs.

    Args:
        task: its large weights may be on the meta device (`without_memory`). It cannot be used afterwards.
        examples: sequences or images in a process's batch.
        processes: of the run.
        sharded: weights are sharded over processes (`ShardedStrategy`), or else each has all (DDP).
        expert_parallel: processes that share experts.

    Raises:
        UserError: numbers that do not divide each other, or a router that mixes tokens instead of assigning them.
    """
    if expert_parallel < 1 or processes % expert_parallel:
        raise UserError(f"expert_parallel = {expert_parallel} must divide the number of processes = {processes}")
    if expert_parallel > 1 and not sharded:
        raise UserError("experts are only shared where weights are sharded: set the strategy to sharded")
    layers = list(moe_layers(task.net))
    for layer in layers:
        if layer.num_experts % expert_parallel:
            raise UserError(f"expert_parallel = {expert_parallel} must divide num_experts = {layer.num_experts}")
    trainable = sum(p.numel() for p in task.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in task.parameters()) - trainable
    frozen += sum(b.numel() for b in task.net.buffers() if b.is_floating_point())
    routers_of_layers = [copy.deepcopy(layer.router) for layer in layers]
    rest = _rest(task, layers)
    parts = [_MoEPart.of(layer, router, rest.tokens) for layer, router in zip(layers, routers_of_layers, strict=True)]
    tokens = examples * rest.tokens
    idle = sum(part.idle for part in parts)
    router_flops = sum(part.router_flops for part in parts)
    saved_by_layers = [part.saved_per_token for part in parts]
    if getattr(task.net, "activation_checkpointing", False):
        saved_by_layers = [max(saved_by_layers, default=0.0)]  # one layer at a time is computed again
    experts = sum(part.expert_parameters for part in parts)
    routers = sum(part.router_parameters for part in parts)
    others = trainable - experts - routers
    held = experts / processes + others / processes + routers if sharded else trainable
    largest = 0.0
    if sharded and processes > 1:
        # Experts that one process holds alone need not be put together.
        shards_experts = processes > expert_parallel
        largest = max([part.expert_parameters / expert_parallel * shards_experts for part in parts], default=0.0)
        largest = max(largest, float(others) / max(len(layers), 1))
    share = (processes - 1) / processes
    copies = processes // expert_parallel
    spread = others * share + experts / expert_parallel * (copies - 1) / copies
    sent_tokens = sum(part.rows_per_token * part.width for part in parts) * tokens * WEIGHT_BYTES
    return Needs(
        parameters=trainable + frozen,
        trainable=trainable,
        active=round(trainable + frozen - idle),
        flops=rest.flops + sum(part.flops for part in parts) + router_flops,
        router_flops=router_flops,
        tokens=tokens,
        weights=round((held + frozen) * WEIGHT_BYTES),
        gathered=round(2 * largest * WEIGHT_BYTES),
        gradients=round(held * WEIGHT_BYTES),
        optimizer=round(2 * held * WEIGHT_BYTES),
        activations=round(examples * rest.saved + tokens * sum(saved_by_layers)),
        # A ring all-reduce sends each gradient twice; a reduce-scatter sends it once.
        gradient_traffic=round((spread + 2 * routers * share if sharded else 2 * trainable * share) * WEIGHT_BYTES),
        weight_traffic=round(2 * spread * WEIGHT_BYTES if sharded else 0),
        # To the experts and back, forward and backward.
        token_traffic=round(4 * sent_tokens * (expert_parallel - 1) / expert_parallel),
    )


@dataclass(frozen=True)
class _MoEPart:
    """A MoE layer, measured with its real router and one of its experts."""

    rows_per_token: float
    width: int
    flops: float
    router_flops: float
    saved_per_token: float
    expert_parameters: int
    router_parameters: int
    idle: float

    @classmethod
    def of(cls, layer: MoE, router: Router, tokens: int) -> _MoEPart:
        """Measure a layer.

        Args:
            layer: its large weights may be on the meta device.
            router: a copy of its router that is not.
            tokens: of one example, which share the costs of a pass.
        """
        spec = layer.spec
        x_TD = torch.randn(tokens, spec.d_model, generator=torch.Generator().manual_seed(0))
        context = _context(layer, tokens)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            routing: Routing = router.eval()(x_TD, context)
        if routing.dense:
            raise UserError(f"{type(router).__name__} mixes tokens, or experts; only runs that assign can be planned")
        rows = float(routing.expert_load(layer.num_experts).sum()) / tokens
        size = sum(p.numel() for p in layer.experts.parameters())
        per_expert = sum(p[0].numel() for p in layer.experts.parameters() if p.ndim > 2)
        shared = layer.shared_experts
        shared_size = 0 if shared is None else sum(p.numel() for p in shared.parameters() if p.ndim > 2)
        with _saved(router) as saved:
            router.train()(x_TD.clone().requires_grad_(), context.new_pass())
        kept = saved.bytes / tokens + _saved_by_experts(layer.experts, rows, spec.d_model)
        if shared is not None:
            kept += _saved_by_experts(shared, float(layer.num_shared_experts), spec.d_model, dispatched=False)
        return cls(
            rows_per_token=rows,
            width=spec.d_model,
            flops=2 * (per_expert * rows + shared_size),
            router_flops=counter.get_total_flops() / tokens,
            saved_per_token=kept,
            expert_parameters=size,
            router_parameters=sum(p.numel() for p in router.parameters() if p.requires_grad),
            idle=size * (1 - rows / layer.num_experts),
        )


def _saved_by_experts(experts: Experts, rows_per_token: float, width: int, *, dispatched: bool = True) -> float:
    """Return the bytes for each token that one expert of the bank keeps for the backward pass, and its dispatch."""
    one = copy.copy(experts)
    one._parameters = {}
    for name, parameter in experts.named_parameters(recurse=False):
        weight = torch.empty(1, *parameter.shape[1:]).normal_(std=0.01)
        one._parameters[name] = nn.Parameter(weight)
    tokens = max(round(SAMPLE_TOKENS * rows_per_token), 1)
    x_TD = torch.randn(tokens, width).requires_grad_()
    routing = Routing(torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1).requires_grad_(), may_drop=False)
    with _saved(one.train()) as saved:
        if dispatched:
            apply_experts(x_TD, routing, one, 1)
        else:
            one(x_TD * 1, torch.tensor([tokens], dtype=torch.int32))
    return saved.bytes / SAMPLE_TOKENS


@dataclass(frozen=True)
class _Rest:
    tokens: int
    flops: float
    saved: int


def _as_large(x: Tensor, context: RoutingContext | None = None, *, router_input: Tensor | None = None) -> Tensor:
    return x * 1


def _rest(task: MoETask, layers: list[MoE]) -> _Rest:
    """Measure everything but the MoE layers, on one example, without computing anything."""
    task.to("meta")
    for layer in layers:
        layer.forward = _as_large  # type: ignore[method-assign]
    outputs: list[Any] = []
    handle = task.net.register_forward_hook(lambda module, arguments, output: outputs.append(output[0]))
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            tokens = task.eval().example()
        outputs.clear()
        with _saved(task) as saved:
            task.train().example()
            for logits in outputs:
                rows = logits.flatten(0, -2)
                F.cross_entropy(rows, torch.zeros(len(rows), dtype=torch.int64, device="meta"))
    finally:
        handle.remove()
    return _Rest(tokens, counter.get_total_flops() / tokens, saved.bytes)


def _context(layer: MoE, tokens: int) -> RoutingContext:
    spec, token_T = layer.spec, torch.arange(tokens)
    length = min(spec.num_positions or tokens, tokens)
    return RoutingContext(
        token_ids=token_T % (spec.vocab_size or 1),
        positions=token_T % length,
        sequence_ids=token_T // length,
        task_ids=torch.zeros_like(token_T),
        attention=torch.full((tokens, 1, length), 1 / length),
        step=0,
        total_steps=1,
    )


class _Kept:
    def __init__(self) -> None:
        self.bytes = 0


@contextmanager
def _saved(module: nn.Module) -> Iterator[_Kept]:
    """Add up what autograd keeps, the module's own parameters and buffers aside."""
    kept = _Kept()
    seen = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    alive: list[Tensor] = []  # so that no storage gets the number of one that has gone

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            alive.append(tensor)
            kept.bytes += storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


class without_memory(TorchFunctionMode):
    """Puts large new tensors on the meta device."""

    _MAKERS = frozenset({torch.empty, torch.zeros, torch.ones, torch.randn, torch.rand})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, on the meta device where it makes a large tensor."""
        kwargs = dict(kwargs or {})
        if func in self._MAKERS and args:
            shape = args[0] if isinstance(args[0], (tuple, list, torch.Size)) else args
            if all(isinstance(size, int) for size in shape) and math.prod(shape) > LARGE:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


class _PlanningCLI(RouterZooCLI):
    """Reads a `fit` command, and builds task and data, but no trainer."""

    def instantiate_classes(self) -> None:
        with without_memory():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        return None  # type: ignore[return-value]

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def main(args: Sequence[str]) -> None:
    """Print what a run needs, from the options of `fit`."""
    parser = CommandParser(
        prog="python -m routerzoo plan",
        description="What a training run will need of each process. All other options are those of fit.",
    )
    parser.add_argument("--processes", type=int, default=1, help="processes of the run, one a GPU")
    parser.add_argument("--strategy", choices=("ddp", "sharded"), default="ddp")
    parser.add_argument("--expert_parallel", type=int, default=1, help="processes that share experts")
    parser.add_argument("--json", action="store_true", help="print numbers for a program")
    own, rest = parser.parse_known_args(list(args))
    if own.processes < 1:
        parser.exit(2, f"error: --processes must be at least 1, got {own.processes}\n")
    run(["fit", *rest], partial(_plan, own=own))


def _plan(args: Sequence[str], own: argparse.Namespace) -> None:
    cli = _PlanningCLI(args)
    task, data = cli.model, cli.datamodule
    if not isinstance(task, MoETask):
        raise UserError(f"{type(task).__name__} is no task of routerzoo's: it cannot be planned")
    examples = int(getattr(data, "batch_size", 1))
    sharded = own.strategy == "sharded"
    needs = plan(task, examples, own.processes, sharded=sharded, expert_parallel=own.expert_parallel)
    if own.json:
        print(json.dumps({**asdict(needs), "memory": needs.memory}, indent=2))
    else:
        show(needs, own.processes)


def show(needs: Needs, processes: int) -> None:
    """Print it as tables."""
    console = Console(soft_wrap=True, highlight=False)
    _table(
        console,
        "the model",
        {
            "parameters": short(needs.parameters),
            "trainable": short(needs.trainable),
            "active per token": short(needs.active),
            "FLOPs per token": short(needs.flops),
            "of these the routers'": short(needs.router_flops),
        },
    )
    memory = {"weights": needs.weights, "gathered": needs.gathered, "gradients": needs.gradients}
    memory |= {"optimizer": needs.optimizer, "activations": needs.activations, "in all": needs.memory}
    _table(console, "memory of each process", {name: _bytes(value) for name, value in memory.items()})
    if processes > 1:
        traffic = {"gradients": needs.gradient_traffic, "weights": needs.weight_traffic, "tokens": needs.token_traffic}
        traffic["in all"] = sum(traffic.values())
        _table(console, "sent by each process, per step", {name: _bytes(value) for name, value in traffic.items()})
    steps = f"{short(3 * needs.flops * needs.tokens * processes)}FLOP"
    console.print(
        f"A step has {needs.tokens * processes:,} tokens and takes about {steps} in all, 3 forward passes' worth."
    )


def _table(console: Console, title: str, row: dict[str, str]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in row:
        table.add_column(name, justify="right")
    table.add_row(*row.values())
    console.print(table)


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
