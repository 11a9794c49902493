"""The routers that look beyond a token's hidden state: laws, numbers by hand, and several layers together."""

from functools import partial

import pytest
import torch
from routerzoo_context import OmniRouter, RMoERouter, SimilarityRouter, YuanRouter
from torch.testing import assert_close

from routerzoo import LayerSpec, MoE, RoutingContext
from routerzoo.losses import balance_loss
from routerzoo.models.decoder import Decoder
from routerzoo.moe import NonCausalRouterError, moe_layers
from routerzoo.testing import CHECKS, check_router

VARIANTS = {
    "Omni": OmniRouter,
    "RMoE": partial(RMoERouter, recurrent_dim=8),
    "Yuan": YuanRouter,
    "similarity": SimilarityRouter,
    "similarity, both ways": partial(SimilarityRouter, causal=False),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(variant, check):
    check_router(VARIANTS[variant], only=[check], examples=8)


def layers(router, **arguments):
    return [router(LayerSpec(8, 4, layer=layer, num_layers=3), **arguments) for layer in range(3)]


def decoder(router, **options):
    sizes = {"num_experts": 4, "d_model": 16, "num_blocks": 3, "num_heads": 2, "max_length": 16}
    return Decoder(40, router, **sizes, **options)


def test_omni_has_one_gate_for_all_layers():
    torch.manual_seed(0)
    routers, context = layers(OmniRouter, top_k=2), RoutingContext()
    assert [len(list(router.parameters())) for router in routers] == [1, 0, 0]
    inputs = [torch.randn(5, 8) for _ in range(3)]
    routings = [router(x, context) for router, x in zip(routers, inputs, strict=True)]
    for x, routing in zip(inputs, routings, strict=True):
        assert_close(routing.logits_TE, x @ routers[0].weight.T)
        assert_close(routing.losses["balance"], balance_loss(routing.logits_TE.softmax(-1), routing.experts_TK))
    sum(routing.weights_TK.sum() for routing in routings).backward()
    assert routers[0].weight.grad.abs().sum() > 0


def test_omni_says_what_is_missing():
    first, second, _ = layers(OmniRouter)
    with pytest.raises(ValueError, match="MoE layer 1 uses the gate of layer 0: run that one before"):
        second(torch.randn(2, 8))
    context = RoutingContext()
    first(torch.randn(2, 8), context)
    wider = OmniRouter(LayerSpec(8, 6, layer=1, num_layers=3))
    with pytest.raises(ValueError, match="layer 0's gate is for 4 experts and d_model 8, layer 1 has 6 and 8"):
        wider(torch.randn(2, 8), context)


def test_rmoe_carries_the_state_through_one_cell():
    torch.manual_seed(0)
    routers, context = layers(RMoERouter, recurrent_dim=6), RoutingContext()
    torch.nn.init.normal_(routers[0].input_bias)
    cell = torch.nn.GRUCell(6, 6)
    weights = {
        "weight_ih": routers[0].input_cell.weight,
        "bias_ih": routers[0].input_cell.bias,
        "weight_hh": routers[1].state_cell.weight,
        "bias_hh": routers[0].input_bias,
    }
    cell.load_state_dict(weights)
    assert len(list(routers[2].parameters())) == 2  # its own maps alone
    inputs, state = [torch.randn(5, 8) for _ in range(3)], torch.zeros(5, 6)
    for router, x in zip(routers, inputs, strict=True):
        state = cell(x @ router.down.T, state)
        assert_close(router(x, context).logits_TE, state @ router.up.T)
    with pytest.raises(ValueError, match="MoE layer 2 continues from layer 1: run that one before"):
        routers[2](inputs[2])


@pytest.mark.parametrize("router", [OmniRouter, partial(RMoERouter, recurrent_dim=8)])
def test_activation_checkpointing_gives_the_same_gradients(router):
    torch.manual_seed(0)
    model = decoder(router).train()
    ids = torch.randint(40, (2, 8))

    def gradients(checkpointing):
        model.activation_checkpointing = checkpointing
        model.zero_grad()
        logits, context = model(ids)
        (logits.square().mean() + sum(r.losses["balance"] for r in context.routings.values())).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain, again = gradients(False), gradients(True)
    for name, gradient in plain.items():
        assert_close(again[name], gradient, msg=name)


def test_yuan_by_hand():
    router = YuanRouter(LayerSpec(1, 2), top_k=1)
    router.weight.data = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]])
    # q = 1, 2; k = 3, 4; v = 5, 6: rows of q k^T are 3, 4 and 6, 8.
    expected = torch.stack([torch.tensor([3.0, 4.0]).softmax(0), torch.tensor([6.0, 8.0]).softmax(0)]) @ torch.tensor(
        [5.0, 6.0]
    )
    routing = router(torch.ones(1, 1))
    assert_close(routing.logits_TE[0], expected)
    assert routing.experts_TK.tolist() == [[1]]


def test_similarity_averages_what_came_before():
    torch.manual_seed(0)
    router = SimilarityRouter(LayerSpec(4, 3), temperature=0.5)
    x_TD = torch.randn(5, 4)
    context = RoutingContext(sequence_ids=torch.tensor([0, 0, 0, 1, 1]))
    logits_TE = router(x_TD, context).logits_TE
    for sequence in (slice(0, 3), slice(3, 5)):
        x = x_TD[sequence]
        likeness = (x @ x.T / (0.5 * 4**0.5)).masked_fill(~torch.ones(len(x), len(x)).tril().bool(), -torch.inf)
        assert_close(logits_TE[sequence], likeness.softmax(-1) @ (x @ router.weight.T))
    with pytest.raises(NonCausalRouterError, match="SimilarityRouter with causal=True"):
        MoE(LayerSpec(4, 3, decoder=True), partial(SimilarityRouter, causal=False))


@pytest.mark.parametrize("router", [OmniRouter, partial(RMoERouter, recurrent_dim=8), YuanRouter, SimilarityRouter])
def test_generation_routes_as_the_whole_sequence_does(router):
    torch.manual_seed(0)
    model = decoder(router).eval()
    for layer in moe_layers(model):
        layer.router.scale_initial_logits(30.0)
    ids = torch.randint(40, (2, 4))
    stream = model.stream(ids, temperature=0.0)
    for _ in range(8):
        expected = model(ids)[0][:, -1].argmax(-1)
        token = next(stream)
        assert torch.equal(token, expected)
        ids = torch.cat([ids, token.unsqueeze(1)], 1)


@pytest.mark.parametrize(
    ("router", "arguments", "message"),
    [
        (RMoERouter, {"recurrent_dim": 0}, "recurrent_dim must be at least 1, got 0"),
        (SimilarityRouter, {"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ],
)
def test_bad_arguments(router, arguments, message):
    with pytest.raises(ValueError, match=message):
        router(LayerSpec(8, 8), **arguments)
