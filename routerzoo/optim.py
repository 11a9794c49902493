"""Optimizer and learning-rate schedule of the tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from routerzoo.moe.layer import inner_router, moe_layers

PLATEAU = "follows a metric, while tasks set the learning rate at every step"
"""Why no task takes `ReduceLROnPlateau`."""


class WarmupCosine(LambdaLR):
    """Learning rate that rises linearly, then falls along half a cosine.

    Args:
        optimizer: whose learning rate it sets.
        total_steps: optimizer steps of the run.
        warmup_steps: steps of the rise; below 1, a share of `total_steps`.
        final_share: learning rate at the end, as a share of the highest.

    Raises:
        ValueError: options out of range.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, *, warmup_steps: float = 0.05, final_share: float = 0.1
    ) -> None:
        if warmup_steps < 0 or not 0 <= final_share <= 1:
            raise ValueError(
                f"warmup_steps must be at least 0 and final_share between 0 and 1, got {warmup_steps} and {final_share}"
            )
        warmup = round(warmup_steps * total_steps) if warmup_steps < 1 else int(warmup_steps)

        def share(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
            return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * progress))

        super().__init__(optimizer, share)


EXECUTION = ("foreach", "fused")
"""Options of an optimizer that say how it computes. They are no part of its state: a resumed run sets its own."""
# Where torch has fused kernels, and they are known to work here.
FUSED_DEVICES = ("cpu", "cuda")


def use_fused_kernel(optimizer: Optimizer) -> None:
    """Let an optimizer update each parameter in one pass over memory, if torch can and the user has not chosen.

    With many experts most parameters are theirs, and all of them are updated in every step, whatever was chosen: AdamW
    over 17 million parameters takes 30 ms instead of 109 ms on one CPU core. torch does this only when asked.

    Args:
        optimizer: changed in place, after its state was loaded.
    """
    options = optimizer.defaults
    chosen = any(options.get(name) is not None for name in EXECUTION) or options.get("differentiable")
    if "fused" in options and not chosen:
        _fuse(optimizer)
    if any(group.get("fused") for group in optimizer.param_groups):
        optimizer.register_step_post_hook(_bump_versions)


def _fuse(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        parameters: list[nn.Parameter] = group["params"]
        if not all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in parameters):
            continue
        group["fused"] = True
        for parameter in parameters:
            step = optimizer.state[parameter].get("step") if parameter in optimizer.state else None
            if isinstance(step, torch.Tensor):
                # An optimizer that is not fused keeps this number on the CPU.
                optimizer.state[parameter]["step"] = step.to(device=parameter.device, dtype=torch.float32)


def _bump_versions(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Tell autograd what a fused kernel has written, for what is kept until a parameter changes."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version([p for p in group["params"] if p.grad is not None])


def parameter_groups(model: nn.Module, *, routers: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Return the trainable parameters in two groups; norms, biases and embeddings have no weight decay.

    An embedding is a parameter of `torch.nn.Embedding`, or one whose name says so (`pos_embed`, `expert_embedding`);
    class and register tokens count as well.

    Args:
        model: any module.
        routers: options of the routers' parameters alone, such as `{"lr": 1e-4}`, which are then two groups of their
            own.
    """
    if routers is not None:
        own = {parameter for layer in moe_layers(model) for parameter in inner_router(layer).parameters()}
        groups = []
        for group in parameter_groups(model):
            split = [p for p in group["params"] if p in own], [p for p in group["params"] if p not in own]
            groups += [{**group, "params": split[1]}, {**group, "params": split[0], **routers}]
        return [group for group in groups if group["params"]]
    exempt: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            no_decay = (
                parameter.ndim < 2
                or name.endswith("bias")
                or "embed" in name
                or name.endswith("_token")
                or isinstance(module, nn.Embedding)
            )
            (exempt if no_decay else decayed).append(parameter)
    return [{"params": decayed}, {"params": exempt, "weight_decay": 0.0}]
