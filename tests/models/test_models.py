import warnings
from functools import partial

import pytest
import timm
import torch
from torch import nn
from torch.testing import assert_close

from routerzoo import (
    HyperRouter,
    LinearRouter,
    MLPExperts,
    SwiGLUExperts,
    XMoERouter,
    auxiliary_loss,
    list_routers,
    moe_layers,
    provide_context,
    sparsify,
)
from routerzoo.models.blocks import moe_block_indices
from routerzoo.models.decoder import Decoder
from routerzoo.models.patch_ids import create_patch_ids
from routerzoo.models.vit import ViTMoE
from routerzoo.router import UnmetRequirementError
from routerzoo.routing import CONTEXT_FIELDS
from tests.conftest import router_factory


def decoder(router="LinearRouter", **options):
    sizes = {"d_model": 16, "num_blocks": 3, "num_heads": 2, "num_experts": 4, "max_length": 12}
    return Decoder(40, router_factory(router, top_k=2), **{**sizes, **options}).eval()


def vit(router="LinearRouter", **options):
    arguments = {"patch_size": 7, "embed_dim": 24, "depth": 4, "num_heads": 3}
    sizes = {"num_experts": 4, "image_size": 28, "in_channels": 1, "backbone_arguments": arguments}
    return ViTMoE("vit_tiny_patch16_224", 10, router_factory(router, top_k=2), **{**sizes, **options}).eval()


def test_blocks_are_chosen_by_name_or_index():
    assert moe_block_indices("every-other", 5) == [1, 3]
    assert moe_block_indices("all", 3) == [0, 1, 2]
    assert moe_block_indices([-1, 0], 4) == [0, 3]
    with pytest.raises(ValueError, match="names block 4; the model has 4, from 0 to 3"):
        moe_block_indices([4], 4)
    with pytest.raises(ValueError, match="names a block twice"):
        moe_block_indices([3, -1], 4)


def test_decoder_predicts_no_token_from_later_ones(router_name):
    model = decoder(router_name)
    ids = torch.randint(40, (2, 12))
    logits, context = model(ids)
    assert logits.shape == (2, 12, 40)
    assert [len(context.routings_of(layer)) for layer in moe_layers(model)] == [1, 1, 1]
    changed = ids.clone()
    changed[:, 7:] = torch.randint(40, (2, 5))
    assert_close(model(changed)[0][:, :7], logits[:, :7])


def test_decoder_with_kept_keys_and_values_gives_the_same_hidden_states(router_name):
    model, ids = decoder(router_name).double(), torch.randint(40, (2, 12))  # where rounding hides nothing
    expected = model.hidden(ids)[0]
    assert_close(model.head(expected), model(ids)[0])
    hidden, _, past = model._run(ids[:, :5], None)
    parts = [hidden]
    for chunk in (ids[:, 5:8], ids[:, 8:9], ids[:, 9:12]):
        hidden, _, past = model._run(chunk, past, seen=past[0].keys.shape[2])
        parts.append(hidden)
    assert_close(torch.cat(parts, 1), expected, atol=1e-10, rtol=0)


def test_decoder_streams_beyond_its_length_and_repeats_with_a_seed():
    model, ids = decoder(), torch.randint(40, (2, 30))

    def sample(**options):
        stream = model.stream(ids, generator=torch.Generator().manual_seed(1), **options)
        return torch.stack([next(stream) for _ in range(20)])

    assert torch.equal(sample(), sample())
    assert torch.equal(sample(temperature=0), sample(top_p=1e-9))
    with pytest.raises(ValueError, match="temperature must be >= 0"):
        sample(temperature=-1.0)
    with pytest.raises(ValueError, match="at least one token"):
        next(model.stream(ids[:, :0]))


def test_dense_decoder_has_no_router():
    model = decoder(moe_blocks="none", dense_width=2)
    assert list(moe_layers(model)) == []
    assert model(torch.randint(40, (2, 12)))[0].shape == (2, 12, 40)


@pytest.mark.parametrize("options", [{"tie_weights": False}, {"num_shared_experts": 1}, {"experts": SwiGLUExperts}])
def test_decoder_options(options):
    assert decoder(**options)(torch.randint(40, (1, 4)))[0].isfinite().all()


def test_decoder_refuses_a_width_that_heads_do_not_divide():
    with pytest.raises(ValueError, match="d_model must be an even multiple of num_heads"):
        decoder(num_heads=3)


def test_decoder_gives_the_same_gradients_with_activation_checkpointing(router_name):
    ids, gradients = torch.randint(40, (2, 12)), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = decoder(router_name, activation_checkpointing=checkpointing).train()
        logits, context = model(ids)
        (logits.square().mean() + auxiliary_loss(model, context)).backward()
        assert [entry.call for entry in context.routings] == [0, 0, 0]  # what is computed again publishes nothing
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("kind", ["position", "lsh", "codebook"])
def test_vit_trains_with_every_router_given_patch_ids(router_name, kind):
    model = vit(router_name, patch_ids=kind, num_patch_ids=16).train()
    logits, context = model(torch.randn(3, 1, 28, 28))
    assert logits.shape == (3, 10)
    assert [len(context.routings_of(layer)) for layer in moe_layers(model)] == [1, 1]
    logits.sum().backward()


def test_vit_without_patch_ids_refuses_routers_that_need_them():
    for router in ("HashRouter", "StableMoERouter"):
        with pytest.raises(UnmetRequirementError, match=f"{router} requires token_ids.*set patch_ids to position, lsh"):
            vit(router)


def test_vit_refuses_sizes_that_patches_do_not_divide_and_models_that_are_no_vit():
    with pytest.raises(ValueError, match="patches of 7 x 7 pixels do not divide images of 30 x 30"):
        vit(image_size=30)
    with pytest.raises(ValueError, match="timm has no model 'vit_huge_patch99'"):
        ViTMoE("vit_huge_patch99", 10, LinearRouter)
    with pytest.raises(ValueError, match="resnet18 is not a vision transformer"):
        ViTMoE("resnet18", 10, LinearRouter)
    with pytest.raises(ValueError, match="images are 14 x 14, the model takes 28 x 28"):
        vit()(torch.randn(1, 1, 14, 14))


def test_patch_ids_come_from_the_pixels_and_survive_the_state_dict():
    images = torch.randn(8, 1, 28, 28)
    for kind in ("lsh", "codebook"):
        ids = create_patch_ids(kind, (7, 7), 1, 16, 16)
        ids.fit_token_counts(images, torch.Generator().manual_seed(0))
        given = ids(images)
        assert given.shape == (8, 16)
        assert given.max() < 16
        assert len(given.unique()) > 8
        other = create_patch_ids(kind, (7, 7), 1, 16, 16)
        other.load_state_dict(ids.state_dict())
        assert torch.equal(other(images), given)
    with pytest.raises(ValueError, match="must be a power of 2 for lsh, got 12"):
        create_patch_ids("lsh", (7, 7), 1, 16, 12)


def test_patches_are_numbered_row_by_row():
    images = torch.zeros(1, 1, 4, 4)
    images[0, 0, :2, 2:] = 1  # upper right
    patches = create_patch_ids("position", (2, 2), 1, 4, 0).patches(images)
    assert patches[0].sum(-1).tolist() == [0, 4, 0, 0]


@pytest.mark.parametrize("router", [partial(LinearRouter, top_k=2), partial(HyperRouter, top_k=3)])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_upcycling_keeps_the_output_where_weights_sum_to_one(name, router):
    sizes = {"img_size": 28, "patch_size": 14, "depth": 4, "num_classes": 5}
    model = timm.create_model(name, **sizes).eval()
    images = torch.randn(2, 3, 28, 28)
    expected = model(images)
    sparsify(model, num_experts=4, router=router, upcycle=True)
    assert len(list(moe_layers(model))) == 2
    assert_close(model(images), expected)


@pytest.mark.parametrize("name", [name for name in list_routers() if name != "TaskRouter"])  # a timm model has no tasks
def test_upcycling_warns_exactly_where_the_output_changes(name, make_context):
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=16, depth=2, class_token=False, global_pool="avg"
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    context = make_context(8).replace(attention=torch.full((8, 1, 8), 1 / 8))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = {"provides": CONTEXT_FIELDS, "vocab_size": 40, "num_positions": 8}
        sparsify(model, num_experts=4, router=name, upcycle=True, **options)
    told = any("does not compute what the dense one did" in str(warning.message) for warning in caught)
    with provide_context(model, context):
        off = (model(images) - expected).abs().max() / expected.abs().max()
    assert (off > 1e-4) == told, f"{off}"


def test_upcycling_says_why_the_output_changes():
    def changed(**options):
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
        sparsify(model, num_experts=4, blocks="all", upcycle=True, **options)

    def by_layer(spec):
        return LinearRouter(spec, top_k=2 - spec.layer)

    with pytest.warns(UserWarning, match="dense one did: the weights of XMoERouter do not sum to 1"):
        changed(router=XMoERouter)
    with pytest.warns(UserWarning, match="dense one did: the weights of LinearRouter do not sum to 1"):
        changed(router=by_layer)
    with pytest.warns(UserWarning, match="dense one did: shared experts start at random"):
        changed(num_shared_experts=1)


def test_pretrained_weights_are_upcycled(tmp_path):
    small = {"patch_size": 7, "embed_dim": 24, "depth": 4, "num_heads": 3}
    dense = timm.create_model("vit_tiny_patch16_224", img_size=28, in_chans=1, num_classes=10, **small).eval()
    torch.save(dense.state_dict(), tmp_path / "dense.pth")
    overlay = {"file": str(tmp_path / "dense.pth"), "num_classes": 10, "input_size": (1, 28, 28), "custom_load": False}
    model = vit(pretrained=True, backbone_arguments={**small, "pretrained_cfg_overlay": overlay})
    images = torch.randn(2, 1, 28, 28)
    assert_close(model(images)[0], dense(images))


def test_sparsify_finds_gated_networks_and_says_when_it_finds_none():
    class LlamaMLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(8, 20, bias=False), nn.Linear(8, 20, bias=False)
            self.down_proj, self.act_fn = nn.Linear(20, 8, bias=False), nn.SiLU()

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    model = nn.Sequential(LlamaMLP(), LlamaMLP())
    x = torch.randn(3, 8)
    expected = model(x)
    sparsify(model, num_experts=4, blocks="all", upcycle=True)
    assert all(isinstance(layer.experts, SwiGLUExperts) for layer in moe_layers(model))
    assert_close(model(x), expected)
    with pytest.raises(ValueError, match="no feed-forward network found in Sequential"):
        sparsify(nn.Sequential(nn.Linear(2, 2)), num_experts=2)


def test_upcycling_refuses_experts_of_another_shape():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    with pytest.raises(ValueError, match="leave hidden_dim to it"):
        sparsify(model, num_experts=2, experts=partial(MLPExperts, hidden_dim=8), upcycle=True)
    with pytest.raises(ValueError, match="give the experts bias=True"):
        sparsify(model, num_experts=2, experts=partial(MLPExperts, bias=False), upcycle=True)
    with pytest.raises(ValueError, match="set activation"):
        sparsify(model, num_experts=2, experts=partial(MLPExperts, activation="relu"), upcycle=True)
