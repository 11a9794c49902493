"""Optimiser and learning-rate schedule of the tasks."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmupCosine(LambdaLR):
    """Learning rate that rises linearly, then falls along half a cosine.

    Args:
        optimizer: whose learning rate it sets.
        total_steps: optimiser steps of the run.
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


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return the trainable parameters in two groups; norms, biases and embeddings have no weight decay.

    An embedding is a parameter of `torch.nn.Embedding`, or one whose name says so (`pos_embed`, `expert_embedding`);
    class and register tokens count as well.
    """
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
