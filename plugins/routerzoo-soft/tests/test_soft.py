"""Soft MoE and SMEAR: conformance, numbers by hand, and merged experts against one expert of mean parameters."""

from functools import partial

import pytest
import torch
from routerzoo_soft import SMEARRouter, SoftMoERouter
from torch.testing import assert_close

from routerzoo import LayerSpec, MLPExperts, MoE, RoutingContext, SwiGLUExperts
from routerzoo.moe.dispatch import dense_forward
from routerzoo.moe.layer import NonCausalRouterError
from routerzoo.testing import check_router

VARIANTS = {
    "SoftMoE": SoftMoERouter,
    "SoftMoE, three slots": partial(SoftMoERouter, slots=3),
    "SMEAR": SMEARRouter,
    "SMEAR, expert dropout": partial(SMEARRouter, expert_dropout=0.3),
    "SMEAR, prefix": partial(SMEARRouter, scope="prefix"),
    "SMEAR, prefix of segments": partial(SMEARRouter, scope="prefix", stride=2),
}


# The first variant of each router; the full tier has all.
FIRST = {getattr(router, "func", router): name for name, router in reversed(VARIANTS.items())}.values()


@pytest.mark.parametrize("variant", FIRST)
def test_each_router(variant):
    check_router(VARIANTS[variant])


@pytest.mark.full
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(variant):
    check_router(VARIANTS[variant], examples=8)


def context(*lengths, **fields):
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return RoutingContext(sequence_ids=ids, **fields)


def test_soft_moe_by_the_paper():
    torch.manual_seed(0)
    router = SoftMoERouter(LayerSpec(4, 3), slots=2, init_scale=2.0)
    x_TD = torch.randn(10, 4)
    routing = router(x_TD, context(5, 5))
    x = x_TD.view(2, 5, 4)
    phi = router.phi.flatten(0, 1).T
    logits = 2.0 * (x / x.norm(dim=-1, keepdim=True)) @ (phi / phi.norm(dim=0, keepdim=True))
    assert_close(routing.dispatch_GSEP.flatten(2), logits.softmax(1))
    assert_close(routing.combine_GSEP.flatten(2), logits.softmax(2))


def test_soft_moe_through_a_layer():
    torch.manual_seed(0)
    layer = MoE(LayerSpec(4, 3), partial(SoftMoERouter, slots=1), partial(MLPExperts, hidden_dim=8))
    x_TD = torch.randn(5, 4)
    given = context(5)
    y_TD = layer(x_TD, given)
    routing = given.routings[0].routing
    slots = routing.dispatch_GSEP[0, :, :, 0].T @ x_TD
    outputs = torch.stack(
        [layer.experts(slots[e : e + 1], torch.tensor([0] * e + [1] * (3 - e), dtype=torch.int32))[0] for e in range(3)]
    )
    assert_close(y_TD, routing.combine_GSEP[0, :, :, 0] @ outputs)


@pytest.mark.parametrize("router", [SoftMoERouter, SMEARRouter])
def test_a_batch_of_nothing(router):
    layer, x = MoE(LayerSpec(4, 3), router), torch.zeros(0, 5, 4, requires_grad=True)
    y = layer(x, RoutingContext(sequence_ids=torch.zeros(0, dtype=torch.int64)))
    y.sum().backward()
    assert y.shape == x.shape


def test_soft_moe_leaves_padding_out():
    router = SoftMoERouter(LayerSpec(4, 3), slots=2)
    x_TD, mask = torch.randn(5, 4), torch.tensor([False, False, False, True, True])
    padded = router(x_TD, context(5, padding_mask=mask))
    alone = router(x_TD[:3], context(3))
    assert_close(padded.dispatch_GSEP[:, :3], alone.dispatch_GSEP)
    assert_close(padded.combine_GSEP[:, :3], alone.combine_GSEP)
    assert not padded.dispatch_GSEP[:, 3:].any()
    assert not padded.combine_GSEP[:, 3:].any()


@pytest.mark.parametrize("router", [SoftMoERouter, SMEARRouter])
def test_bfloat16_hidden_states_are_routed_as_their_values_in_float32(router):
    torch.manual_seed(0)
    router, x = router(LayerSpec(16, 8)), torch.randn(6, 16).bfloat16()
    narrow, wide = router(x, context(3, 3)), router(x.float(), context(3, 3))
    for name in ("dispatch_GSEP", "combine_GSEP", "merge_GE"):
        if getattr(wide, name) is not None:
            assert torch.equal(getattr(narrow, name), getattr(wide, name).bfloat16())


def test_soft_moe_has_as_many_slots_as_one_expert_per_token_costs():
    assert SoftMoERouter(LayerSpec(4, 8, num_positions=64)).phi.shape == (8, 8, 4)
    assert SoftMoERouter(LayerSpec(4, 8, num_positions=3)).phi.shape == (8, 1, 4)


def test_soft_moe_refuses_sequences_of_several_lengths():
    with pytest.raises(ValueError, match=r"sequences of one length with adjacent tokens; theirs are \[2, 3\]"):
        SoftMoERouter(LayerSpec(4, 3))(torch.randn(5, 4), context(2, 3))
    with pytest.raises(ValueError, match="adjacent tokens"):
        SoftMoERouter(LayerSpec(4, 3))(torch.randn(4, 4), RoutingContext(sequence_ids=torch.tensor([0, 1, 0, 1])))


@pytest.mark.parametrize("experts", [MLPExperts, SwiGLUExperts])
def test_merged_experts_are_one_expert_of_mean_parameters(experts):
    torch.manual_seed(0)
    spec = LayerSpec(4, 3)
    layer = MoE(spec, SMEARRouter, partial(experts, hidden_dim=8, bias=True))
    for parameter in layer.experts.parameters():
        torch.nn.init.normal_(parameter)
    x_TD, given = torch.randn(7, 4), context(4, 3)
    y_TD = layer(x_TD, given)
    weights = given.routings[0].routing.merge_GE
    single = experts(LayerSpec(4, 1), hidden_dim=8, bias=True)
    for group, rows in enumerate((slice(0, 4), slice(4, 7))):
        single.load_state_dict(
            {n: torch.einsum("e,e...->...", weights[group], p)[None] for n, p in layer.experts.named_parameters()}
        )
        assert_close(y_TD[rows], dense_forward(single, x_TD[rows], 1))
    y_TD.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_weights_by_the_paper():
    torch.manual_seed(0)
    router = SMEARRouter(LayerSpec(4, 3))
    x_TD = torch.randn(7, 4)
    routing = router(x_TD, context(4, 3))
    norm = partial(torch.nn.functional.layer_norm, normalized_shape=(4,))
    means = torch.stack([x_TD[:4].mean(0), x_TD[4:].mean(0)])
    assert_close(routing.merge_GE, (norm(means) @ (0.01 * norm(router.weight)).T).softmax(-1))
    assert routing.group_T.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_a_segment_is_merged_by_what_came_before():
    torch.manual_seed(0)
    spec, x_TD = LayerSpec(4, 3), torch.randn(5, 4)
    router = SMEARRouter(spec, scope="prefix", stride=2)
    routing = router(x_TD, context(5))
    assert routing.group_T.tolist() == [0, 0, 1, 1, 2]
    whole = SMEARRouter(spec)
    whole.load_state_dict(router.state_dict())
    for segment, seen in enumerate((1, 3, 5)):
        assert_close(routing.merge_GE[segment], whole(x_TD[:seen], context(seen)).merge_GE[0])


def test_padding_belongs_to_no_group_and_comes_out_as_zeros():
    mask = torch.tensor([False, True, False, True])
    layer = MoE(LayerSpec(4, 3), SMEARRouter, partial(MLPExperts, hidden_dim=8))
    x_TD = torch.randn(4, 4)
    given = context(4, padding_mask=mask)
    y_TD = layer(x_TD, given)
    assert given.routings[0].routing.group_T.tolist() == [0, -1, 0, -1]
    assert not y_TD[mask].any()
    assert_close(y_TD[~mask], layer(x_TD[~mask], context(2)))
    assert given.routings[0].routing.expert_load(3).sum().item() == pytest.approx(2.0)


def test_expert_dropout_leaves_experts_out_and_never_all():
    torch.manual_seed(0)
    router = SMEARRouter(LayerSpec(4, 3), scope="prefix", expert_dropout=0.5)
    weights = router(torch.randn(200, 4), context(200)).merge_GE
    assert 0.33 < (weights == 0).float().mean() < 0.42  # one half, less the eighth where all would be left out
    assert_close(weights.sum(1), torch.ones(200))
    assert 0.06 < (weights == 1 / 3).all(1).float().mean() < 0.2  # that eighth counts all the same
    assert (router.eval()(torch.randn(9, 4), context(9)).merge_GE > 0).all()


def test_a_decoder_takes_the_prefix_form_alone():
    decoder = LayerSpec(8, 4, decoder=True)
    with pytest.raises(NonCausalRouterError, match="SMEARRouter with scope='prefix'"):
        MoE(decoder, SMEARRouter)
    with pytest.raises(NonCausalRouterError, match="Choose a causal router"):
        MoE(decoder, SoftMoERouter)
    MoE(decoder, partial(SMEARRouter, scope="prefix"))


@pytest.mark.parametrize(
    ("router", "arguments", "message"),
    [
        (SoftMoERouter, {"slots": 0}, "slots must be at least 1, got 0"),
        (SMEARRouter, {"scope": "batch"}, "scope must be sequence or prefix, got 'batch'"),
        (SMEARRouter, {"stride": 0}, "stride must be at least 1, got 0"),
        (SMEARRouter, {"expert_dropout": 1.0}, "expert_dropout must be at least 0 and below 1, got 1.0"),
    ],
)
def test_bad_arguments(router, arguments, message):
    with pytest.raises(ValueError, match=message):
        router(LayerSpec(8, 8), **arguments)
