"""Routers of averaged models: what is an index or a flag is copied, never averaged."""

from __future__ import annotations

import torch
from torch import nn

from routerzoo.router import Router


@torch.no_grad()
def copy_router_state(source: nn.Module, target: nn.Module) -> None:
    """Copy k, stages, tables and flags from the routers of a trained model to those of its averaged copy.

    Selection biases and thresholds are averaged with the weights, as they fit them: of a gate that lags behind, the
    trained model's make a few experts the choice of most tokens. So average buffers: timm does, and
    `torch.optim.swa_utils.AveragedModel` with `use_buffers=True`. What is not known before training is infinite until
    then (see `Router.trained_buffers`); where an average is not finite, it starts from the trained value.

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
            average = averaged.get_buffer(name)
            if not value.is_floating_point():
                average.copy_(value)
            elif name in trained.trained_buffers:
                average.copy_(torch.where(average.isfinite(), average, value.to(average)))
        averaged._stored_ints.update(trained._stored_ints)
