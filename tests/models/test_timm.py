"""Models of timm with MoE layers: the substance of its model tests."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch.testing import assert_close

from routerzoo import auxiliary_loss, moe_layers, provide_context, sparsify

pytestmark = pytest.mark.full

VIT = {"depth": 3, "img_size": 32, "patch_size": 8}
SWIN = {"depths": (1, 2), "num_heads": (1, 2), "embed_dim": 24, "window_size": 4, "img_size": 32}
# Arguments, the size of images, and the number of MoE layers.
ARCHITECTURES = {
    "vit_tiny_patch16_224": (VIT, 32, 3),
    "deit_tiny_distilled_patch16_224": (VIT, 32, 3),
    "vit_wee_patch16_reg1_gap_256": ({"depth": 3, "img_size": 32}, 32, 3),
    "eva02_tiny_patch14_224": ({"depth": 3, "img_size": 28}, 28, 3),
    "beit_base_patch16_224": ({"depth": 2, "img_size": 32, "embed_dim": 48, "num_heads": 3}, 32, 2),
    "swin_tiny_patch4_window7_224": (SWIN, 32, 3),
    "swinv2_tiny_window8_256": (SWIN, 32, 3),
    "convnext_tiny": ({"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 40)}, 64, 5),
    "mixer_s32_224": ({"img_size": 64}, 64, 8),
    "cait_xxs24_224": ({"depth": 2, "img_size": 32}, 32, 2),
    "xcit_nano_12_p16_224": ({"depth": 2, "img_size": 32}, 32, 2),
    "mobilevit_xs": ({}, 64, 9),
    "tiny_vit_5m_224": ({}, 224, 10),
}


def build(name):
    """Return a model whose every parameter counts, and images for it."""
    arguments, size, _ = ARCHITECTURES[name]
    model = timm.create_model(name, num_classes=5, **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2 or not parameter.abs().sum():
                parameter.add_(0.3 * torch.randn_like(parameter))
            if parameter.abs().max() < 1e-3:  # layer scales start next to zero
                parameter.add_(0.5)
    return model, torch.randn(2, 3, size, size)


def sparse(name):
    model, images = build(name)
    return sparsify(model, num_experts=4, blocks="all", upcycle=True), images


def class_logits(output):
    return sum(output) if isinstance(output, tuple) else output  # of distilled models in training


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_upcycled_models_compute_what_they_did(name):
    model, images = build(name)
    expected, features = model(images), model.forward_features(images)
    intermediates = model.forward_intermediates(images, intermediates_only=True)
    sparsify(model, num_experts=4, blocks="all", upcycle=True)
    assert len(list(moe_layers(model))) == ARCHITECTURES[name][2]
    close = {"rtol": 1e-4, "atol": 1e-5 * expected.std().item()}
    assert_close(model(images), expected, **close)
    assert_close(model.forward_features(images), features, rtol=1e-4, atol=1e-4 * features.std().item())
    for got, value in zip(model.forward_intermediates(images, intermediates_only=True), intermediates, strict=True):
        assert_close(got, value, rtol=1e-4, atol=1e-4 * value.std().item())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_has_a_gradient(name):
    model, images = sparse(name)
    with provide_context(model.train()) as context:
        loss = class_logits(model(images)).square().mean() + auxiliary_loss(model, context)
        loss.backward()
    lacking = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert not lacking
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_classifier_is_replaced_and_left_out(name):
    model, images = sparse(name)
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    model.reset_classifier(0)
    assert model(images).shape == (2, model.num_features)
    assert model.get_classifier() is not None


# TinyViT keeps its position biases in evaluation, with the graph of its first pass.
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "tiny_vit_5m_224"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model, images = sparse(name)
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model(images).square().mean().backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
    for key, value in gradients[0].items():
        if value is not None:
            assert_close(gradients[1][key], value, rtol=1e-4, atol=1e-6)


# The first Swin's tables of position biases are resized in a way that torch deprecates.
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name.startswith(("vit", "deit", "eva", "swinv2"))])
def test_another_input_size_is_that_of_the_dense_model(name):
    model, images = build(name)
    twice = torch.randn(2, 3, 2 * images.shape[2], 2 * images.shape[3])
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.set_input_size(twice.shape[2:])
    expected = model(twice)
    model, _ = build(name)
    model.load_state_dict(state)
    sparsify(model, num_experts=4, blocks="all", upcycle=True)
    model.set_input_size(twice.shape[2:])
    assert_close(model(twice), expected, rtol=1e-4, atol=1e-5 * expected.std().item())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_decay_as_in_the_dense_model(name):
    def scales(model):
        names = {id(parameter): key for key, parameter in model.named_parameters()}
        exempt = getattr(model, "no_weight_decay", set)()
        groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.7, no_weight_decay_list=exempt)
        return {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}

    model, _ = build(name)
    dense = scales(model)
    sparsify(model, num_experts=4, blocks="all")
    ours = scales(model)
    assert all(ours[key] == value for key, value in dense.items() if key in ours)
    for key, (scale, decay) in ours.items():
        if ".experts." in key:
            before = next(value for name, value in dense.items() if name.startswith(key.partition(".experts.")[0]))
            assert scale == before[0]
            assert decay == (0.0 if key.endswith("bias") else 0.05)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_averages_and_state_dicts(name):
    model, images = sparse(name)
    average = ModelEmaV3(model)
    average.update(model)
    assert_close(average.module(images), model(images))
    other, _ = sparse(name)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images), model(images))
