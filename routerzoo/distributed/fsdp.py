"""Shard a model over ranks: weights by FSDP2, experts by expert parallelism; routers are replicated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from routerzoo.distributed.expert_parallel import shard_experts
from routerzoo.errors import UserError
from routerzoo.moe.layer import moe_layers


def shard_model(model: nn.Module, mesh: DeviceMesh, expert_parallel: int = 1) -> None:
    """Shard a model over all ranks of a mesh, each of which trains on its own data.

    With `expert_parallel = n`, n neighboring ranks share the experts of each MoE layer and exchange tokens; ranks that
    hold the same experts shard these among themselves, and all ranks shard everything else. Routers are small, and
    their updates read whole parameters: they are replicated, and `average_gradients` does what FSDP2 would.

    Args:
        model: with the same weights on each rank. Its blocks (the members of its first list of modules) are sharded one
            by one, so that one at a time is gathered.
        mesh: of one dimension.
        expert_parallel: ranks that share the experts.

    Raises:
        UserError: numbers that do not divide each other.
    """
    ranks = mesh.size()
    if expert_parallel < 1 or ranks % expert_parallel:
        raise UserError(f"expert_parallel = {expert_parallel} must divide the number of processes = {ranks}")
    layers = list(moe_layers(model))
    ignored = {parameter for layer in layers for parameter in layer.router.parameters()}
    if expert_parallel > 1:
        if not layers:
            raise UserError(f"expert_parallel is {expert_parallel}, but the model has no MoE layer")
        both = init_device_mesh(
            mesh.device_type, (ranks // expert_parallel, expert_parallel), mesh_dim_names=("copies", "experts")
        )
        for layer in layers:
            shard_experts(layer, both["experts"])
            if layer.shared_experts is not None:
                fully_shard(layer.shared_experts, mesh=mesh)
            experts = set(layer.experts.parameters())
            if ranks == expert_parallel:
                ignored |= experts
            else:
                _shard_copies(layer, both["copies"], ignored)
    for block in _blocks(model):
        if not isinstance(block, FSDPModule):  # a MoE layer that is a block is already
            fully_shard(block, mesh=mesh, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    for method in ("hidden",):
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)


def _shard_copies(layer: nn.Module, mesh: DeviceMesh, ignored: set[nn.Parameter]) -> None:
    # The first dimension is the experts', which other ranks share; where the second can be divided, both stay plain.
    plain = all(p.ndim > 1 and p.shape[1] % mesh.size() == 0 for p in layer.experts.parameters())  # type: ignore[union-attr]
    fully_shard(
        layer,
        mesh=mesh,
        shard_placement_fn=(lambda parameter: Shard(1)) if plain else None,
        ignored_params=ignored,
    )


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and any(
            next(moe_layers(child), None) is not None for child in module.children()
        ):
            for child in module.children():
                if next(child.parameters(), None) is not None:
                    yield child
            return


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """All-reduce the mean gradients of parameters that are replicated, in one message."""
    whole = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    if not whole:
        return
    # A rank that has no gradient where others have one takes part with zeros.
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in whole])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, mean in zip(whole, torch.split(flat, [p.numel() for p in whole]), strict=True):
        mean = mean.view_as(parameter).to(parameter.dtype)
        if parameter.grad is not None:
            parameter.grad.copy_(mean)
        elif bool(mean.any()):
            parameter.grad = mean


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], largest_norm: float) -> Tensor:
    """Scale gradients so that their norm, over all ranks and shards, is at most `largest_norm`; return what it was.

    As `torch.nn.utils.clip_grad_norm_`, which takes no parameters that are sharded in different ways.
    """
    groups = list(_by_mesh([p for p in parameters if p.grad is not None]))
    total: Any = 0.0
    for group in groups:
        norm = torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        total = total + whole.square()
    norm = torch.as_tensor(total).sqrt()
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, largest_norm, norm)
    return norm


def _by_mesh(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        place = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault(place, []).append(parameter)
    yield from groups.values()
