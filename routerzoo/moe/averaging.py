"""Routers of averaged models: what is an index is copied, never averaged."""

from __future__ import annotations

import torch
from torch import nn

from routerzoo.router import Router


@torch.no_grad()
def copy_router_state(source: nn.Module, target: nn.Module) -> None:
    """Copy k, stages and index tables from the routers of a trained model to those of its averaged copy.

    For every loop that averages weights (`torch.optim.swa_utils.AveragedModel`, timm's `ModelEmaV2` and `V3`): once
    after each of its updates, and before the averaged model is saved. `routerzoo.RouterHooks` does it for Lightning's.

    Args:
        source: the trained model.
        target: its copy, or what holds the copy.

    Raises:
        ValueError: models whose routers do not correspond.
    """
    sources, targets = (
        [module for module in model.modules() if isinstance(module, Router)] for model in (source, target)
    )
    if [type(router) for router in sources] != [type(router) for router in targets]:
        raise ValueError(
            f"the averaged model has {len(targets)} routers, the trained one {len(sources)}, or of other classes: "
            "average a copy of the trained model"
        )
    for trained, averaged in zip(sources, targets, strict=True):
        for name, value in trained.named_buffers():
            if not value.is_floating_point():
                averaged.get_buffer(name).copy_(value)
        averaged._stored_ints.update(trained._stored_ints)
