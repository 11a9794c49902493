"""Wrappers around routers: conformance checks, numbers by hand, and what a batch-mate can do."""

import copy
import math
from functools import partial

import pytest
import torch
from routerzoo_policies import CapacityRouter, ReplayRouter, SteeredRouter, record, replay, steer
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from routerzoo import (
    HashRouter,
    HyperRouter,
    LayerSpec,
    LinearRouter,
    MoE,
    RandomFrozenRouter,
    Router,
    Routing,
    RoutingContext,
    StableMoERouter,
    XMoERouter,
    attach,
    moe_layers,
)
from routerzoo.models.decoder import Decoder
from routerzoo.moe.auxiliary_loss import loss_of
from routerzoo.moe.layer import NonCausalRouterError
from routerzoo.router import LoadedTopKWarning
from routerzoo.testing import check_router
from routerzoo.testing.attack import cross_batch_attack

TIGHT = partial(CapacityRouter, capacity_factor=0.5)
SWITCH = partial(LinearRouter, top_k=1, renormalize=False)
VARIANTS = {
    "capacity": TIGHT,
    "capacity in evaluation": partial(TIGHT, in_evaluation=True),
    "capacity of a Switch": partial(TIGHT, router=SWITCH),
    "capacity of a hash": partial(TIGHT, router=HashRouter),
    "capacity of StableMoE": partial(TIGHT, router=StableMoERouter),
    "by choice": partial(TIGHT, order="choice"),
    "by priority": partial(TIGHT, order="priority"),
    "by weight": partial(TIGHT, order="weight"),
    "over the batch": partial(TIGHT, scope="batch"),
    "over the batch, in evaluation": partial(TIGHT, scope="batch", in_evaluation=True),
    "next": partial(TIGHT, overflow="next", router=XMoERouter),
    "next, by choice": partial(TIGHT, overflow="next", order="choice"),
    "next, over the batch": partial(TIGHT, overflow="next", scope="batch", order="priority"),
    "local": partial(TIGHT, overflow="local"),
    "local, of two devices": partial(TIGHT, overflow="local", devices=2),
    "fill": partial(TIGHT, fill=True),
    "both rectifications": partial(TIGHT, overflow="local", fill=True, scope="batch", order="priority"),
    "steered": partial(SteeredRouter, offsets={0: 1.0}),
    "ruled out": partial(SteeredRouter, offsets={0: -math.inf}, router=HyperRouter),
    "learned offsets": partial(SteeredRouter, learn=True, router=partial(RandomFrozenRouter, init_std=1.0)),
    "not steered": partial(SteeredRouter, router=HashRouter),
    "replay": ReplayRouter,
    "capacity of a steered router": partial(TIGHT, overflow="next", router=partial(SteeredRouter, offsets={0: 0.5})),
}


QUICK = ("capacity", "next, by choice", "both rectifications", "learned offsets", "replay")


@pytest.mark.parametrize("variant", QUICK)
def test_what_they_declare(variant):
    check_router(VARIANTS[variant])


@pytest.mark.full
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_they_declare_in_every_variant(variant):
    check_router(VARIANTS[variant], examples=20)


def gate(policy, logits, num_experts=2, **options):
    """Build a policy around a linear router that gives tokens `one-hot` the rows of `logits`."""
    router = policy(LayerSpec(len(logits), num_experts), **options)
    inner = router.router
    inner.weight.data = torch.tensor(logits).T.contiguous()
    return router.train(), torch.eye(len(logits))


def context(*lengths):
    return RoutingContext(sequence_ids=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)))


# Four tokens, two experts, k = 1: room for one token each at half the capacity, for two at the full one.
ALL_WANT_0 = [[3.0, 0.0], [4.0, 1.0], [5.0, 0.0], [2.0, 1.0]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"capacity_factor": 0.5}, [0, -1, -1, -1]),
        ({"capacity_factor": 1.0}, [0, 0, -1, -1]),
        ({"capacity_factor": 0.51}, [0, 0, -1, -1]),  # rounded up
        ({"capacity_factor": 1.0, "order": "choice"}, [0, 0, -1, -1]),
        ({"capacity_factor": 0.5, "order": "priority"}, [-1, -1, 0, -1]),
        ({"capacity_factor": 0.5, "order": "weight"}, [-1, -1, 0, -1]),
        ({"capacity_factor": 1.0, "order": "weight"}, [0, -1, 0, -1]),
        ({"capacity_factor": 1.0, "overflow": "next"}, [0, 0, 1, 1]),
        ({"capacity_factor": 0.5, "overflow": "next"}, [0, 1, -1, -1]),
        ({"capacity_factor": 0.5, "overflow": "next", "order": "priority"}, [1, -1, 0, -1]),
    ],
)
def test_who_finds_room(options, expected):
    router, x_TD = gate(CapacityRouter, ALL_WANT_0, router=SWITCH, **options)
    routing = router(x_TD, context(4))
    assert routing.experts_TK.flatten().tolist() == expected
    probs_TE = torch.tensor(ALL_WANT_0).softmax(-1)
    weights = [0.0 if e < 0 else float(probs_TE[t, e]) for t, e in enumerate(expected)]
    assert_close(routing.weights_TK.flatten(), torch.tensor(weights))
    assert router.eval()(x_TD, context(4)).experts_TK.flatten().tolist() == [0, 0, 0, 0]


def test_sequences_have_room_of_their_own():
    router, x_TD = gate(CapacityRouter, ALL_WANT_0, router=SWITCH, capacity_factor=1.0)
    assert router(x_TD, context(2, 2)).experts_TK.flatten().tolist() == [0, -1, 0, -1]
    shared, x_TD = gate(CapacityRouter, ALL_WANT_0, router=SWITCH, capacity_factor=1.0, scope="batch")
    assert shared(x_TD, context(2, 2)).experts_TK.flatten().tolist() == [0, 0, -1, -1]


def test_padding_takes_no_place():
    router, x_TD = gate(CapacityRouter, ALL_WANT_0, router=SWITCH, capacity_factor=1.0)
    padded = RoutingContext(sequence_ids=torch.zeros(4).long(), padding_mask=torch.tensor([True, False, False, False]))
    # Three tokens: ceil(1.5) places.
    assert router(x_TD, padded).experts_TK.flatten().tolist() == [-1, 0, 0, -1]


# Two choices each of three experts: the first token's second choice is what the second token wants first.
FIRST_CHOICES_FIRST = [[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, 2.0, 1.0]]


@pytest.mark.parametrize(
    ("order", "expected"),
    [("token", [[0, 1], [-1, 2], [-1, -1]]), ("choice", [[0, -1], [1, 2], [-1, -1]])],
)
def test_the_order_of_service(order, expected):
    options = {"router": partial(LinearRouter, top_k=2), "capacity_factor": 0.5, "order": order}
    router, x_TD = gate(CapacityRouter, FIRST_CHOICES_FIRST, 3, **options)
    assert router(x_TD, context(3)).experts_TK.tolist() == expected


def test_lost_choices_fall_on_the_local_expert():
    logits = [[3.0, 2.0, 1.0, 0.0]] * 4
    options = {"router": partial(LinearRouter, top_k=2), "capacity_factor": 0.5, "overflow": "local"}
    router, x_TD = gate(CapacityRouter, logits, 4, devices=2, **options)
    routing = router(x_TD, context(4))
    # One place in each expert: the first token has it. The others lose both choices, to their device's best expert:
    # tokens 0 and 1 are on the device of experts 0 and 1, tokens 2 and 3 on that of 2 and 3.
    chosen = [set(row.tolist()) - {-1} for row in routing.experts_TK]
    assert chosen == [{0, 1}, {0}, {2}, {2}]
    assert_close(routing.weights_TK.sum(1), torch.ones(4))
    expected = torch.tensor([3.0, 2.0]).softmax(-1)
    assert_close(routing.weights_TK[0, :2], expected)


def test_a_local_expert_counts_as_often_as_choices_were_lost():
    # Token 1 keeps expert 2 (logit 1), and loses expert 0 (logit 3), which is also its device's best.
    logits = [[3.0, 2.0, 0.0, 0.0], [3.0, 0.0, 1.0, 0.0]]
    options = {"router": partial(LinearRouter, top_k=2), "capacity_factor": 1.0, "overflow": "local"}
    router, x_TD = gate(CapacityRouter, logits, 4, **options)
    routing = router(x_TD, context(2))
    weights = dict(zip(routing.experts_TK[1].tolist(), routing.weights_TK[1].tolist(), strict=True))
    total = math.exp(1.0) + math.exp(3.0)
    assert weights[2] == pytest.approx(math.exp(1.0) / total)
    assert weights[0] == pytest.approx(math.exp(3.0) / total)


def test_free_slots_go_to_the_largest_next_choices():
    # Room for two tokens each; expert 1 is free, and tokens 1 and 3 are those that score it highest.
    router, x_TD = gate(CapacityRouter, ALL_WANT_0, router=SWITCH, capacity_factor=1.0, fill=True)
    routing = router(x_TD, context(4))
    assert [row.tolist() for row in routing.experts_TK] == [[0, -1], [0, 1], [-1, -1], [-1, 1]]
    both = torch.tensor([4.0, 1.0]).softmax(-1)
    assert_close(routing.weights_TK[1], both)
    routing.weights_TK[1, 0].backward()
    # The denominator is a constant: the derivative of e^a / Z by its own logit is the weight itself.
    assert_close(router.router.weight.grad[0, 1], both[0])
    assert router.router.weight.grad[1, 1] == 0


def test_the_unsafe_orders_are_declared_and_caught():
    safe = partial(CapacityRouter, capacity_factor=0.5, in_evaluation=True)
    assert cross_batch_attack(safe).hidden_TD is None
    shared = partial(safe, scope="batch")
    assert not shared(LayerSpec(8, 8)).properties.batch_independent
    assert cross_batch_attack(shared).change > 0.1


def test_decoders_refuse_what_looks_ahead():
    spec = LayerSpec(8, 4, decoder=True)
    MoE(spec, CapacityRouter)
    with pytest.raises(NonCausalRouterError, match="CapacityRouter with its default order"):
        MoE(spec, partial(CapacityRouter, order="choice"))


def test_k_and_state_are_the_inner_routers():
    router = CapacityRouter(LayerSpec(8, 8), router=partial(LinearRouter, top_k=2))
    router.top_k = 4
    assert router.router.top_k == 4
    other = CapacityRouter(LayerSpec(8, 8))
    with pytest.warns(LoadedTopKWarning, match="built with top_k = 2 and routes with the checkpoint's, 4"):
        other.load_state_dict(router.state_dict())
    assert other.top_k == 4
    assert router.default_loss_weights == LinearRouter.default_loss_weights
    router.freeze()
    assert not any(p.requires_grad for p in router.parameters())
    assert router.router.is_frozen


def test_steering_by_hand():
    router, x_TD = gate(SteeredRouter, ALL_WANT_0, router=SWITCH, offsets={1: 3.5})
    routing = router(x_TD)
    steered = torch.tensor(ALL_WANT_0) + torch.tensor([0.0, 3.5])
    assert routing.experts_TK.flatten().tolist() == steered.argmax(-1).tolist() == [1, 1, 0, 1]
    assert_close(routing.weights_TK, steered.softmax(-1).amax(-1, keepdim=True))
    assert_close(routing.logits_TE, steered)


def test_steering_some_layers():
    routers = [SteeredRouter(LayerSpec(4, 4, layer=n, num_layers=2), offsets={2: 1.0}, layers=[1]) for n in range(2)]
    assert [float(router.offset_E.sum()) for router in routers] == [0.0, 1.0]


def model():
    return Decoder(40, partial(LinearRouter, top_k=2), num_experts=4, d_model=16, num_blocks=2, num_heads=2)


def test_a_model_is_steered_for_a_while():
    net, ids = model().eval(), torch.randint(40, (2, 8))
    before, routers = net(ids)[0], [layer.router for layer in moe_layers(net)]
    with steer(net, {1: torch.tensor([0.0, 0.0, 0.0, -math.inf])}):
        _, context = net(ids)
        assert (context.routings[1].routing.experts_TK != 3).all()
    assert [layer.router for layer in moe_layers(net)] == routers
    assert torch.equal(net(ids)[0], before)


def test_replay_gives_the_same_outputs_and_gradients_for_other_choices():
    net, ids = model(), torch.randint(40, (2, 8))
    with record(net) as recording:
        before = net(ids)[0]
    assert set(recording) == {0, 1}
    for layer in moe_layers(net):  # choices would now be others
        layer.router.weight.data = layer.router.weight.data.flip(0)
    with replay(net, recording.joined()):
        logits, context = net(ids)
        logits.sum().backward()
    for layer in moe_layers(net):
        (published,) = context.routings_of(layer)
        assert torch.equal(published.experts_TK, recording[layer.spec.layer][0][0].experts_TK)
        assert layer.router.weight.grad.abs().sum() > 0  # through the current weights
    with replay(net, recording.joined(), weights="recorded"):
        assert_close(net(ids)[0], before)
    assert type(next(moe_layers(net)).router) is LinearRouter


def test_a_generation_is_replayed_as_one_pass():
    net, ids = model().eval(), torch.randint(40, (2, 4))
    with record(net) as recording:
        stream = net.stream(ids, temperature=0.0)
        tokens = [next(stream) for _ in range(5)]
    # The last token was sampled, and not routed.
    whole = torch.cat([ids, torch.stack(tokens[:-1], 1)], dim=1)
    joined = recording.joined(num_sequences=2)
    assert torch.equal(joined[0][0].experts_TK, net(whole)[1].routings[0].routing.experts_TK)
    with replay(net, joined):
        assert torch.equal(net(whole)[1].routings[1].routing.experts_TK, joined[1][0].experts_TK)


def test_replay_says_what_does_not_fit():
    net, ids = model(), torch.randint(40, (2, 8))
    with record(net) as recording:
        net(ids)
    with (
        pytest.raises(ValueError, match="the recording is of 16 tokens, the call has 8"),
        replay(net, recording.joined()),
    ):
        net(ids[:1])
    with pytest.raises(ValueError, match="the model has no MoE layer 7; it has 2, from 0"), replay(net, {7: []}):
        pass
    with pytest.raises(ValueError, match="nothing was recorded"), record(net) as empty:
        empty.joined()
    hashed = ReplayRouter(LayerSpec(4, 4, layer=0, vocab_size=5), router=HashRouter)
    hashed.forced = [hashed(torch.randn(3, 4), RoutingContext(token_ids=torch.arange(3)))]
    with pytest.raises(NotImplementedError, match="HashRouter cannot weight experts that it did not select"):
        hashed(torch.randn(3, 4), RoutingContext(token_ids=torch.arange(3)))


class Twice(torch.nn.Module):
    """Calls one layer, without a number, two times."""

    def __init__(self):
        super().__init__()
        self.layer = MoE(LayerSpec(8, 4), partial(LinearRouter, top_k=1, renormalize=False, init_std=1.0))

    def forward(self, x, context=None):
        return self.layer(self.layer(x, context) + x, context)


def test_the_calls_of_a_layer_are_recorded_and_replayed_one_by_one():
    torch.manual_seed(0)
    net, x_TD, context = Twice(), torch.randn(40, 8), RoutingContext()
    with record(net) as recording:
        before = net(x_TD, context)
    published = [entry.routing.experts_TK for entry in context.routings]
    assert not torch.equal(*published)
    assert [len(passes) for passes in recording[0]] == [1, 1]
    with torch.no_grad():
        net.layer.router.weight.neg_()
    with replay(net, {net.layer: recording.joined()[0]}, weights="recorded"):
        again = RoutingContext()
        assert_close(net(x_TD, again), before)
        assert_close(net(x_TD, RoutingContext()), before)  # in every pass
        copied = copy.deepcopy(net)
        assert_close(copied(x_TD, RoutingContext()), before)
    assert [entry.routing.experts_TK.tolist() for entry in again.routings] == [e.tolist() for e in published]
    assert type(copied.layer.router) is ReplayRouter
    assert copied.layer.router.router is not net.layer.router
    with (
        replay(net, {0: recording.joined()[0][:1]}),
        pytest.raises(ValueError, match="the recording has 1 calls of the layer in a pass; this is one more"),
    ):
        net(x_TD, RoutingContext())


def test_a_replay_survives_activation_checkpointing():
    layer, x_TD = MoE(LayerSpec(8, 4), LinearRouter), torch.randn(6, 8)
    with record(layer) as recording:
        layer(x_TD)
    assert len(recording[0][0]) == 1
    routings = recording.joined()
    with torch.no_grad():
        layer.router.weight.neg_()
    gradients = []
    for repeated in (False, True):
        layer.zero_grad()
        with replay(layer, routings):
            y_TD = checkpoint(layer, x_TD, RoutingContext(), use_reentrant=False) if repeated else layer(x_TD)
            y_TD.square().sum().backward()
        gradients.append(layer.router.weight.grad.clone())
    assert_close(*gradients)
    assert gradients[0].abs().sum() > 0


def test_wrapped_layers_need_no_numbers_and_are_updated_all_the_same():
    net = torch.nn.Sequential(*(MoE(LayerSpec(8, 4, vocab_size=5), StableMoERouter) for _ in range(2)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attach(net, optimizer, total_steps=10)  # the second stage begins at a tenth
    assert [layer.router.stage for layer in net] == [1, 1]
    y_TD, context = torch.randn(5, 8), RoutingContext(torch.arange(5))
    forced = Routing(torch.full((5, 1), 3), torch.ones(5, 1))
    with replay(net, {1: [forced]}):
        for layer in net:
            assert layer.is_driven
            y_TD = layer(y_TD, context)
        y_TD.sum().backward()
        optimizer.step()
    assert [layer.router.stage for layer in net] == [2, 2]
    (routing,) = context.routings_of(net[1])
    assert (routing.experts_TK == 3).all()
    assert routing.selected.experts_TK.shape == (5, 1)
    assert routing.selected.selected is None
    assert [type(layer.router) for layer in net] == [StableMoERouter] * 2
    net[0].router.freeze()
    with replay(net, {0: [forced]}):
        assert net[0].router.is_frozen


def test_losses_are_of_what_the_inner_router_selected():
    router, x_TD = gate(CapacityRouter, ALL_WANT_0, router=SWITCH, capacity_factor=0.5)
    context_ = context(4)
    routing = router(x_TD, context_)
    assert routing.selected.experts_TK.flatten().tolist() == [0, 0, 0, 0]
    # All four choose expert 0: 2 * (1 * mean probability of it + 0).
    expected = 2 * torch.tensor(ALL_WANT_0).softmax(-1)[:, 0].mean()
    assert_close(loss_of("balance", routing, context_), expected)


@pytest.mark.parametrize(
    ("router", "options", "message"),
    [
        (CapacityRouter, {"capacity_factor": 0.0}, "capacity_factor must be above 0, got 0.0"),
        (CapacityRouter, {"order": "random"}, "order must be one of token, choice, priority, weight, got 'random'"),
        (CapacityRouter, {"overflow": "wait"}, "overflow must be one of drop, next, local, got 'wait'"),
        (CapacityRouter, {"scope": "world"}, "scope must be one of sequence, batch, got 'world'"),
        (CapacityRouter, {"devices": 3}, "devices must divide num_experts = 8, got 3"),
        (ReplayRouter, {"weights": "mine"}, "weights must be current or recorded, got 'mine'"),
        (SteeredRouter, {"offsets": {8: 1.0}}, "offsets names expert 8; there are 0 to 7"),
        (SteeredRouter, {"layers": [1]}, "layers names MoE layer 1; there are 0 to 0"),
        (
            SteeredRouter,
            {"layers": [0]},
            "SteeredRouter requires layer, which this model does not provide: number the MoE",
        ),
    ],
)
def test_bad_arguments(router, options, message):
    with pytest.raises(ValueError, match=message):
        router(LayerSpec(8, 8), **options)


class Flat(Router):
    """Gives the experts of a mask, in the flat form."""

    paper = "test"

    def __init__(self, spec):
        super().__init__(spec, top_k=1, max_top_k=1)

    def route(self, x_TD, context):
        token_N, expert_N = (x_TD[:, : self.spec.num_experts] > 0).nonzero().unbind(1)
        return Routing(token_N=token_N, expert_N=expert_N, weight_N=x_TD[token_N, expert_N], may_drop=False)


def test_a_capacity_around_choices_of_varying_number():
    # Four tokens, two experts: two places each, k counting as 1.
    x_TD = torch.tensor([[1.0, 2.0], [3.0, 0.0], [5.0, 4.0], [6.0, 7.0]])
    for order, kept in (("token", {(0, 0), (0, 1), (1, 0), (2, 1)}), ("weight", {(2, 0), (2, 1), (3, 0), (3, 1)})):
        router = CapacityRouter(LayerSpec(2, 2), router=Flat, capacity_factor=1.0, order=order).train()
        pairs = router(x_TD, context(4)).assignments()
        found = [(t, e, w) for t, e, w in zip(*(v.tolist() for v in pairs[:3]), strict=True) if e >= 0]
        assert {(t, e) for t, e, _ in found} == kept
        assert all(w == x_TD[t, e] for t, e, w in found)
        assert (pairs.weight_N[pairs.expert_N < 0] == 0).all()
    in_columns = CapacityRouter(LayerSpec(2, 2), router=Flat, order="choice").train()
    with pytest.raises(ValueError, match="the order choice needs choices in columns; take token or weight"):
        in_columns(x_TD, context(4))


class Mixing(Flat):
    """Mixes tokens into slots."""

    def route(self, x_TD, context):
        share_GSEP = torch.ones(1, len(x_TD), self.spec.num_experts, 1)
        return Routing(dispatch_GSEP=share_GSEP, combine_GSEP=share_GSEP)


def test_what_mixes_tokens_has_no_capacity():
    router = CapacityRouter(LayerSpec(2, 2), router=Mixing).train()
    with pytest.raises(ValueError, match="a capacity bounds assignments; Mixing mixes tokens or experts"):
        router(torch.randn(4, 2), context(4))
