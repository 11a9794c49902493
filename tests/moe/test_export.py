"""`torch.export` in its default mode, with numbers of sequences and tokens that may change."""

import io

import pytest
import torch
from torch.export import Dim, export
from torch.testing import assert_close

import routerzoo
from routerzoo import LayerSpec, MoE, RoutingContext
from routerzoo.registry import router_class

SPEC = LayerSpec(32, 4, layer=0, num_layers=2, vocab_size=40, num_positions=64, num_tasks=2)
# How many sequences there are, and who is forced where, is read off values: no graph without them.
READ_VALUES = {"ExpertChoiceRouter", "SMEARRouter", "SimilarityRouter", "SinkhornRouter", "SoftMoERouter"} | {
    "SteeredRouter",
    "ThorRouter",
}
PROVIDED = {"token_ids", "positions", "sequence_ids"}
EXPORTABLE = [
    name
    for name in routerzoo.list_routers()
    if name not in READ_VALUES and router_class(name).requires <= PROVIDED | {"vocab_size", "num_positions"}
]


class Model(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, ids):
        batch, length = ids.shape
        sequences = torch.arange(batch).repeat_interleave(length, output_size=batch * length)
        context = RoutingContext(token_ids=ids, positions=torch.arange(length).repeat(batch), sequence_ids=sequences)
        return self.layer(x, context)


def check(layer, dtype=torch.float32, tolerance=None):
    model = Model(layer.to(dtype).eval())
    inputs = [(torch.randn(b, s, 32).to(dtype), torch.randint(40, (b, s))) for b, s in ((3, 7), (5, 9), (2, 2))]
    sizes = {0: Dim("sequences", min=2, max=64), 1: Dim("tokens", min=2, max=64)}
    exported = export(model, inputs[0], dynamic_shapes=(sizes, sizes)).module()
    for x, ids in inputs:
        assert_close(exported(x, ids), model(x, ids), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("experts", ["MLPExperts", "SwiGLUExperts"])
def test_a_layer_is_exported_with_dynamic_sizes(experts):
    check(MoE(SPEC, "LinearRouter", experts, num_shared_experts=1))


def test_what_was_exported_with_a_context_is_saved_and_loaded():
    layer = MoE(SPEC, "StableMoERouter").eval()
    x = torch.randn(6, 32)
    context = RoutingContext(token_ids=torch.arange(6), step=3, total_steps=10)
    file = io.BytesIO()
    torch.export.save(export(layer, (x, context)), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    other = context.new_pass(token_ids=torch.arange(6).flip(0))
    assert_close(loaded(2 * x, other), layer(2 * x, other))
    assert not torch.equal(loaded(2 * x, context.new_pass()), layer(2 * x, other))  # token ids are an input


def test_a_context_that_no_file_can_hold_is_refused_when_it_is_saved():
    context = RoutingContext(cache={"layer": 1})
    exported = export(MoE(SPEC, "LinearRouter").eval(), (torch.randn(6, 32), context))
    with pytest.raises(ValueError, match="a RoutingContext with a cache cannot be saved: export the model with cache"):
        torch.export.save(exported, io.BytesIO())


@pytest.mark.full
def test_a_layer_of_16_bits_is_exported_with_dynamic_sizes():
    check(MoE(SPEC, "LinearRouter"), torch.bfloat16, 2e-2)


@pytest.mark.full
@pytest.mark.parametrize("name", EXPORTABLE)
@pytest.mark.filterwarnings("ignore:.*is not batch independent")
def test_every_router_that_reads_no_values_is_exported_with_dynamic_sizes(name):
    check(MoE(SPEC, name))
