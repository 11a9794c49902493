"""Activation checkpointing changes nothing: not what is learned, and not what is counted."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import routerzoo
from routerzoo import attach, auxiliary_loss
from routerzoo.models.decoder import Decoder
from routerzoo.models.vit import ViTMoE
from routerzoo.registry import router_class
from routerzoo.router import UnmetRequirementError

STEPS = 6
VARIANTS = {"TopKRouter-loss-free": partial(router_class("TopKRouter"), bias_speed=0.01)}
ROUTERS = {name: router_class(name) for name in routerzoo.list_routers()} | VARIANTS


def language(router, checkpointing):
    sizes = {"num_experts": 4, "d_model": 16, "num_blocks": 2, "num_heads": 2, "max_length": 8, "num_tasks": 2}
    options = {"activation_checkpointing": checkpointing, "allow_non_causal": True, "dropout": 0.1}
    model = Decoder(20, router, **sizes, **options)

    def loss(step):
        ids_BS = torch.randint(20, (4, 8))
        padding_mask_BS = torch.arange(8).expand(4, -1) >= torch.tensor([8, 8, 6, 3]).unsqueeze(1)
        progress = {"step": step, "total_steps": STEPS}
        logits, context = model(
            ids_BS, padding_mask_BS=padding_mask_BS, task_ids_B=torch.tensor([0, 1, 0, 1]), **progress
        )
        losses_T = F.cross_entropy(logits.flatten(0, 1), ids_BS.flatten(), reduction="none")
        return losses_T, context

    return model, loss


def vision(router, checkpointing):
    backbone = {"patch_size": 14, "embed_dim": 12, "depth": 2, "num_heads": 2, "drop_path_rate": 0.1}
    sizes = {"num_experts": 4, "moe_blocks": "all", "image_size": 28, "in_channels": 1, "patch_ids": "position"}
    model = ViTMoE(
        "vit_tiny_patch16_224",
        3,
        router,
        **sizes,
        backbone_arguments=backbone,
        activation_checkpointing=checkpointing,
    )

    def loss(step):
        logits, context = model(torch.randn(4, 1, 28, 28), step=step, total_steps=STEPS)
        losses_B = F.cross_entropy(logits, torch.tensor([0, 1, 2, 0]), reduction="none")
        # An image's tokens share its loss.
        return losses_B.repeat_interleave(len(context.sequence_ids) // 4), context

    return model, loss


def trained(build, router, checkpointing):
    """Return the whole state after a few steps, of which each is two micro-batches."""
    torch.manual_seed(0)
    model, loss = build(router, checkpointing)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    vocabulary = next(layer.spec.vocab_size for layer in routerzoo.moe_layers(model))
    attach(model, optimizer, STEPS, token_counts=torch.arange(vocabulary) + 1)
    for step in range(STEPS):
        for _ in range(2):
            losses_T, context = loss(step)
            (losses_T.mean() + auxiliary_loss(model, context, token_losses=losses_T)).backward()
            assert len(context.routings) == 2
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.full
@pytest.mark.parametrize("build", [language, vision])
@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_trains_alike_bit_for_bit(build, name):
    if build is vision and name == "TaskRouter":
        with pytest.raises(UnmetRequirementError, match="TaskRouter requires"):
            build(ROUTERS[name], checkpointing=False)
        return
    plain, recomputed = (trained(build, ROUTERS[name], checkpointing) for checkpointing in (False, True))
    assert plain.keys() == recomputed.keys()
    for key, value in plain.items():
        assert torch.equal(value, recomputed[key]), key
