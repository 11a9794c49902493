"""Vision transformers: what they start from, other image sizes, and tokens that the context describes."""

from functools import partial

import pytest
import timm
import torch
from lightning import Trainer
from timm.layers.pos_embed import resample_abs_pos_embed
from torch.testing import assert_close

from routerzoo import FineTune, HashRouter, ImageClassification, ImageData, LinearRouter, MLPExperts, moe_layers
from routerzoo.models.vit import ViTMoE

SMALL = {"patch_size": 7, "embed_dim": 24, "depth": 2, "num_heads": 3}


def vit(router=LinearRouter, backbone="vit_tiny_patch16_224", arguments=SMALL, **options):
    sizes = {"num_experts": 4, "image_size": 28, "in_channels": 1, "moe_blocks": "all"}
    return ViTMoE(backbone, 10, partial(router, top_k=2), backbone_arguments=arguments, **{**sizes, **options}).eval()


def test_experts_start_from_the_file_at_checkpoint_path(tmp_path):
    dense = timm.create_model("vit_tiny_patch16_224", img_size=28, in_chans=1, num_classes=10, **SMALL).eval()
    torch.save(dense.state_dict(), tmp_path / "dense.pth")
    model = vit(arguments={**SMALL, "checkpoint_path": str(tmp_path / "dense.pth")})
    for layer, block in zip(moe_layers(model), dense.blocks, strict=True):
        assert all(torch.equal(up, block.mlp.fc1.weight) for up in layer.experts.up)
    images = torch.randn(2, 1, 28, 28)
    assert_close(model(images)[0], dense(images))


@pytest.mark.parametrize("arguments", [{}, {"class_token": False, "global_pool": "avg"}, {"no_embed_class": True}])
def test_positions_are_resampled_to_another_grid_as_timm_does_it(arguments):
    small, large = (vit(arguments={**SMALL, **arguments}, image_size=size) for size in (28, 56))
    state = large.resample_positions({f"net.{name}": value for name, value in small.state_dict().items()}, "net.")
    large.load_state_dict({name.removeprefix("net."): value for name, value in state.items()})
    prefix = 0 if "no_embed_class" in arguments or "class_token" in arguments else 1
    expected = resample_abs_pos_embed(small.vit.pos_embed, [8, 8], [4, 4], prefix)
    assert_close(large.vit.pos_embed, expected)
    assert torch.equal(large.vit.pos_embed[:, :prefix], small.vit.pos_embed[:, :prefix])
    same = vit(arguments={**SMALL, **arguments})
    assert same.resample_positions(small.state_dict()).keys() == small.state_dict().keys()


def test_tables_of_positions_follow_the_nearest_patch():
    small, large = (vit(HashRouter, image_size=size, patch_ids="position") for size in (28, 56))
    large.load_state_dict(large.resample_positions(small.state_dict()))
    before, after = (next(moe_layers(model)).router.table for model in (small, large))
    grids = [table[:-1].unflatten(0, (side, side)) for table, side in ((before, 4), (after, 8))]
    for row, column in ((0, 0), (3, 6), (7, 7)):
        assert torch.equal(grids[1][row, column], grids[0][row // 2, column // 2])
    assert torch.equal(after[-1], before[-1])  # the class token


def test_fine_tuning_at_another_image_size_keeps_the_learned_positions(tmp_path):
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}

    def fit(task, size, callbacks):
        trainer = Trainer(**quiet, max_steps=1, limit_val_batches=0, enable_checkpointing=False, callbacks=callbacks)
        trainer.fit(task, ImageData(image_size=size, batch_size=8))
        return trainer

    def task(size):
        return ImageClassification(
            10,
            size,
            1,
            patch_size=ImageData(image_size=size).patch_size,
            num_experts=2,
            backbone_arguments={"depth": 2},
        )

    first = task(28)
    fit(first, 28, []).save_checkpoint(tmp_path / "first.ckpt")
    second = task(56)
    before = resample_abs_pos_embed(first.net.vit.pos_embed, [8, 8], [4, 4], 1)
    fit(second, 56, [FineTune(str(tmp_path / "first.ckpt"))])
    assert (second.net.vit.pos_embed - before).abs().max() < 1.1e-3  # a step of AdamW with the rate 1e-3


@pytest.mark.parametrize("option", [{"patch_drop_rate": 0.5}, {"dynamic_img_size": True}])
def test_what_changes_the_tokens_is_refused(option):
    with pytest.raises(
        ValueError, match=f"MoE layers are given all patches of images of one size: leave {next(iter(option))}"
    ):
        vit(arguments={**SMALL, **option})


@pytest.mark.parametrize("backbone", ["cait_xxs24_224", "convit_tiny"])
def test_backbones_whose_tokens_are_others_are_refused(backbone):
    with pytest.raises(ValueError, match=rf"{backbone} hands its MLPs tokens of the shape \[196\] .* are 197: routers"):
        vit(backbone=backbone, arguments={}, image_size=224, in_channels=3)


@pytest.mark.parametrize(
    "backbone", ["deit_tiny_distilled_patch16_224", "vit_tiny_patch16_224", "beit_base_patch16_224"]
)
def test_backbones_whose_tokens_are_described_are_built_without_a_trace(backbone):
    state = torch.get_rng_state()
    timm.create_model(backbone, depth=1, num_classes=10, in_chans=1, img_size=32)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    vit(backbone=backbone, arguments={"depth": 1}, image_size=32, moe_blocks="none")
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.full
@pytest.mark.parametrize(
    "backbone", ["hiera_tiny_224", "samvit_base_patch16", "xcit_nano_12_p16_224", "hieradet_small"]
)
def test_backbones_of_another_build_are_refused(backbone):
    with torch.device("meta"), pytest.raises(ValueError, match=f"{backbone} is not a vision transformer with blocks"):
        ViTMoE(backbone, 10, LinearRouter)


def test_dense_baselines_need_no_networks_that_experts_can_replace():
    sizes = {"depth": 1, "embed_dim": 48, "num_heads": 3}
    assert not list(moe_layers(vit(backbone="eva02_base_patch14_224", arguments=sizes, moe_blocks="none")))
    with pytest.raises(ValueError, match=r"blocks.0.mlp \(SwiGLU\) cannot become a MoE layer: it holds norm"):
        vit(backbone="eva02_base_patch14_224", arguments=sizes)


def test_patch_ids_need_patches_of_pixels():
    with torch.device("meta"), pytest.raises(ValueError, match="patch_ids are those of patches of pixels, and the"):
        ViTMoE("vit_tiny_r_s16_p8_224", 10, LinearRouter, patch_ids="lsh", backbone_arguments={"depth": 1})


def test_the_patch_size_is_the_datas_unless_one_is_given():
    def patch(size, **options):
        return vit(image_size=size, arguments={"depth": 1, **options}, patch_size=size // 4).vit.patch_embed.patch_size

    assert patch(28) == (7, 7)
    assert patch(32) == (8, 8)  # 16 would leave 2 x 2
    assert patch(64) == (16, 16)  # the backbone's own
    assert patch(32, patch_size=4) == (4, 4)
    with pytest.raises(ValueError, match="patches of 16 x 16 pixels do not divide images of 28 x 28"):
        vit(image_size=28, arguments={"depth": 1})


def test_a_dropout_of_the_mlps_stays():
    arguments = {**SMALL, "proj_drop_rate": 0.5}
    with pytest.raises(ValueError, match=r"drops hidden units with a probability of 0\.5, the experts drop none"):
        vit(arguments=arguments)
    model = vit(arguments=arguments, experts=partial(MLPExperts, dropout=0.5), activation_checkpointing=True)
    assert model.vit.blocks[0].mlp[1].p == 0.5
    logits, context = model.train()(torch.randn(2, 1, 28, 28))
    logits.sum().backward()
    assert len(context.routings) == 2
