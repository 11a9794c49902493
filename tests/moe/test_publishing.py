"""What the layer publishes: each routing once, under the layer and the call that made it."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from routerzoo import LayerSpec, MoE, Routing, RoutingContext, auxiliary_loss, moe_layers, sparsify
from routerzoo.functional.losses import balance_loss
from routerzoo.moe.layer import MissingUpdatesWarning


def layer(**arguments):
    return MoE(d_model=8, num_experts=4, **arguments)


def test_layers_without_numbers_are_all_published():
    model = nn.Sequential(layer(), layer())
    context, x = RoutingContext(), torch.randn(5, 8)
    y = x
    for moe in model:
        y = moe(y, context)
    assert [entry.layer for entry in context.routings] == list(model)
    assert [entry.call for entry in context.routings] == [0, 0]
    one, other = (balance_loss(r.routing.logits_TE.softmax(-1), r.routing.experts_TK) for r in context.routings)
    assert auxiliary_loss(model, context, {"balance": 0.5}).item() == pytest.approx(0.5 * (one + other).item())


def test_every_call_of_a_shared_layer_is_published():
    shared, context, x = layer(), RoutingContext(), torch.randn(5, 8)
    y = shared(shared(shared(x, context), context), context)
    assert y.shape == x.shape
    assert [(entry.layer is shared, entry.call) for entry in context.routings] == [(True, 0), (True, 1), (True, 2)]
    each = [balance_loss(r.logits_TE.softmax(-1), r.experts_TK).item() for r in context.routings_of(shared)]
    assert auxiliary_loss(shared, context, {"balance": 1.0}).item() == pytest.approx(sum(each))


def test_deep_copies_are_layers_of_their_own():
    first = layer()
    second = copy.deepcopy(first)
    context, x = RoutingContext(), torch.randn(5, 8)
    second(first(x, context), context)
    assert len(context.routings_of(first)) == len(context.routings_of(second)) == 1


def test_sparsify_twice_numbers_on():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

        def forward(self, x):
            return self.fc2(self.act(self.fc1(x)))

    model = nn.Sequential(Block(), Block(), Block())
    sparsify(model, num_experts=4, blocks=[0])
    sparsify(model, num_experts=8, blocks=[0, 1])
    assert sorted(moe.spec.layer for moe in moe_layers(model)) == [0, 1, 2]
    assert [moe.num_experts for moe in moe_layers(model)] == [4, 8, 8]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_pass_publishes_nothing(reentrant):
    moe, context, seen = layer(), RoutingContext(), []
    moe.register_routing_hook(lambda published, context: seen.append(published.call))
    x = torch.randn(5, 8, requires_grad=True)
    expected = pytest.warns(UserWarning, match="reentrant") if reentrant else nullcontext()
    with expected:
        y = checkpoint(moe, x, context, use_reentrant=reentrant)
    y.square().sum().backward()
    assert seen == [0]
    assert len(context.routings) == 1


def test_padding_is_removed_before_a_routing_is_published():
    moe, seen = layer(), []
    moe.register_routing_hook(lambda published, context: seen.append(published.routing))
    mask = torch.tensor([[False, True], [False, False]])
    moe(torch.randn(2, 2, 8), RoutingContext(padding_mask=mask))
    assert seen[0].expert_load(4).sum() == 3 * 2
    assert (seen[0].experts_TK[1] == -1).all()


def test_a_hook_ends_when_its_handle_is_removed_and_is_not_copied():
    moe, seen = layer(), []
    handle = moe.register_routing_hook(lambda published, context: seen.append(published))
    moe(torch.randn(1, 8))
    copy.deepcopy(moe)(torch.randn(1, 8))
    assert len(seen) == 1
    handle.remove()
    moe(torch.randn(1, 8))
    assert len(seen) == 1


def test_fields_of_tokens_come_by_sequence_or_flat():
    by_sequence = RoutingContext(token_ids=torch.arange(6).view(2, 3), attention=torch.rand(2, 3, 4, 3))
    assert by_sequence.token_ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert by_sequence.attention.shape == (6, 4, 3)
    moe = MoE(LayerSpec(8, 4, layer=0, vocab_size=6), "HashRouter")
    x = torch.randn(2, 3, 8)
    flat = moe(x, RoutingContext(token_ids=torch.arange(6)))
    assert torch.equal(moe(x, by_sequence), flat)


def test_one_context_through_a_compiled_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = layer(), layer()

        def forward(self, x, context):
            return self.second(self.first(x, context), context)

    model, x = Model(), torch.randn(6, 8)
    eager = RoutingContext()
    y = model(x, eager)
    context = RoutingContext()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x, context), y, atol=1e-6)
    assert [entry.layer for entry in context.routings] == [model.first, model.second]
    loss = auxiliary_loss(model, context)
    assert loss.item() == pytest.approx(auxiliary_loss(model, eager).item())
    loss.backward()
    assert model.first.router.weight.grad.abs().sum() > 0


def test_a_context_is_exported():
    moe = MoE(LayerSpec(8, 4, layer=0, vocab_size=6), "HashRouter").eval()
    context = RoutingContext(token_ids=torch.arange(5))
    x = torch.randn(5, 8)
    exported = torch.export.export(moe, (x, context)).module()
    other = RoutingContext(token_ids=torch.tensor([5, 4, 3, 2, 1]))
    assert torch.allclose(exported(x, other), moe(x, other), atol=1e-6)


def test_a_context_moves_and_copies():
    context = RoutingContext(token_ids=torch.arange(3), step=4)
    MoE(d_model=8, num_experts=4)(torch.randn(3, 8), context)
    moved = context.to(torch.device("cpu"))
    assert moved.step == 4
    assert moved.routings is context.routings
    routing = context.routings[0].routing
    assert isinstance(routing.to("cpu"), Routing)


def test_what_does_not_fit_is_refused_in_one_sentence():
    with pytest.raises(TypeError, match=r"the first argument of MoE is a LayerSpec, got 64: MoE\(d_model="):
        MoE(64, 8)
    with pytest.raises(TypeError, match="router is a LinearRouter that is built already"):
        MoE(d_model=8, num_experts=4, router=layer().router)
    with pytest.raises(ValueError, match="unknown experts 'SwigluExperts'; did you mean 'SwiGLUExperts'"):
        layer(experts="SwigluExperts")
    assert type(layer(experts="SwiGLUExperts").experts).__name__ == "SwiGLUExperts"
    with pytest.raises(TypeError, match=r"returned None; it must return routerzoo\.Router"):
        layer(router=lambda spec: None)
    with pytest.raises(TypeError, match="the context of a MoE layer is a RoutingContext, got dict"):
        layer()(torch.randn(2, 8), {"token_ids": 1})
    with pytest.raises(ValueError, match="no MoE layer of the model was called with this context"):
        auxiliary_loss(layer(), RoutingContext())
    with pytest.raises(ValueError, match="HashRouter requires layer"):
        MoE(LayerSpec(8, 4, vocab_size=6), "HashRouter")


def test_a_router_that_is_not_updated_warns_once():
    moe = MoE(LayerSpec(8, 4, vocab_size=6), "StableMoERouter")
    ids = RoutingContext(torch.zeros(2, dtype=torch.int64))
    with pytest.warns(MissingUpdatesWarning, match=r"StableMoERouter must be updated .* call routerzoo.attach\(model"):
        moe(torch.randn(2, 8), ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moe(torch.randn(2, 8), ids)
        moe.eval()(torch.randn(2, 8), ids)
