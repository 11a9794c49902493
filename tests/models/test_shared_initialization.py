"""Two models of one seed that differ in their routers start equal in all else, and train on the same data."""

import pytest
import torch
from torch import nn

from routerzoo import ImageData, LogitRouter, TextData
from routerzoo.models.decoder import Decoder
from routerzoo.models.vit import ViTMoE
from tests.conftest import BUILT_IN, router_factory

# They draw many numbers, none, with layers of torch, by the layer, or wrap another router.
PLUGINS = ["TopKRouter", "RMoERouter", "OmniRouter", "RLRouter", "HashFirstRouter", "CapacityRouter"]
BACKBONE = {"embed_dim": 16, "depth": 2, "num_heads": 2}


def decoder(router, seed=0):
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "num_blocks": 2, "num_heads": 2, "num_experts": 4, "num_shared_experts": 1}
    return Decoder(40, router, **sizes, allow_non_causal=True)


def vit(router, seed=0):
    torch.manual_seed(seed)
    return ViTMoE(
        "vit_tiny_patch16_224",
        3,
        router,
        num_experts=4,
        moe_blocks="all",
        image_size=16,
        patch_size=4,
        in_channels=1,
        backbone_arguments=BACKBONE,
        patch_ids="lsh",
    )


def parts(model):
    """Return what does not belong to a router, and the next random number."""
    tensors = {name: t for name, t in model.state_dict().items() if ".router." not in name}
    return {**tensors, "next": torch.rand(1)}


@pytest.mark.parametrize("build", [decoder, vit])
def test_all_but_the_router_starts_equal(build):
    expected = parts(build(router_factory("LinearRouter")))
    assert len(expected) > 10
    for name in [*BUILT_IN, *PLUGINS]:
        found = parts(build(router_factory(name)))
        assert found.keys() == expected.keys(), name
        unequal = [key for key, tensor in found.items() if not torch.equal(tensor, expected[key])]
        assert not unequal, (name, unequal)
    other = parts(build(router_factory("LinearRouter"), seed=1))
    assert not torch.equal(other["next"], expected["next"])


def test_routers_follow_the_seed_and_differ_by_layer():
    for name, tensor in (("LinearRouter", "weight"), ("HashRouter", "table")):
        models = [decoder(router_factory(name), seed) for seed in (0, 1, 0)]
        first, *others, again, _ = (getattr(b.feed_forward.router, tensor) for model in models for b in model.blocks)
        assert torch.equal(first, again)
        assert not any(torch.equal(first, other) for other in others)
    # Not the numbers that another module gets next.
    model = decoder(router_factory("LinearRouter"))
    gate = model.blocks[0].feed_forward.router.weight.flatten()
    assert not any(torch.isin(gate / gate[0], t.flatten() / t.flatten()[0]).sum() > 1 for t in parts(model).values())


def test_a_layer_that_is_initialized_again_is_as_it_was_built():
    model = decoder(router_factory("HyperRouter"))
    layer = model.blocks[1].feed_forward
    torch.manual_seed(5)
    layer.reset_parameters()
    torch.manual_seed(5)
    again = type(layer)(layer.spec, "HyperRouter", num_shared_experts=1)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), again.parameters(), strict=True))


def test_a_decoder_leaves_a_routers_linear_layers_as_they_were_drawn():
    class Tens(LogitRouter):
        def __init__(self, spec):
            super().__init__(spec)
            self.gate_layer = nn.Linear(spec.d_model, spec.num_experts, bias=False)
            nn.init.constant_(self.gate_layer.weight, 10.0)

        def logits(self, x_TD, context):
            return self.gate_layer(x_TD)

    assert decoder(Tens).blocks[0].feed_forward.router.gate_layer.weight.unique().tolist() == [10.0]


def test_the_order_of_data_follows_torchs_seed_unless_given():
    def first(data):
        return next(iter(data.train_dataloader()))[0]

    def text(torch_seed, **arguments):
        torch.manual_seed(torch_seed)
        return first(TextData(sequence_length=16, batch_size=4, **arguments))

    assert torch.equal(text(3), text(0, seed=3))
    assert not torch.equal(text(3), text(0))
    assert torch.equal(text(0, seed=5), text(1, seed=5))
    torch.manual_seed(3)
    images = first(ImageData(batch_size=4))
    torch.manual_seed(0)
    assert torch.equal(images, first(ImageData(batch_size=4, seed=3)))
