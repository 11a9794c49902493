"""Losses against values worked out by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from routerzoo import LayerSpec, LinearRouter, Routing, RoutingContext, XMoERouter, create_router
from routerzoo.functional.losses import (
    balance_loss,
    distillation_loss,
    importance_loss,
    load_loss,
    stablemoe_balance_loss,
    z_loss,
)
from routerzoo.moe.auxiliary_loss import ROUTING_LOSSES, loss_of


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_balance_loss_is_one_at_perfect_balance_whatever_k_is(top_k):
    probs_TE = torch.full((4, 4), 0.25)
    experts_TK = torch.stack([torch.arange(4).roll(-shift) for shift in range(top_k)], dim=1)
    assert_close(balance_loss(probs_TE, experts_TK), torch.tensor(1.0))


def test_balance_loss_is_the_number_of_experts_at_collapse():
    probs_TE = torch.tensor([[1.0, 0.0, 0.0]] * 5)
    assert_close(balance_loss(probs_TE, torch.zeros(5, 1, dtype=torch.int64)), torch.tensor(3.0))


def test_balance_loss_by_hand():
    # f = (2/3, 1/3), P = ((.9 + .6 + .3) / 3, (.1 + .4 + .7) / 3) = (.6, .4): 2 * (2/3 * .6 + 1/3 * .4) = 16/15.
    probs_TE = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])
    assert_close(balance_loss(probs_TE, torch.tensor([[0], [0], [1]])), torch.tensor(16 / 15))


def test_balance_loss_normalises_sigmoid_scores():
    probs_TE = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])
    experts_TK = torch.tensor([[0], [0], [1]])
    assert_close(balance_loss(probs_TE * 0.5, experts_TK), balance_loss(probs_TE, experts_TK))


def test_balance_loss_leaves_padding_out():
    probs_TE = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [1.0, 0.0]])
    experts_TK = torch.tensor([[0], [0], [1], [0]])
    mask = torch.tensor([False, False, False, True])
    assert_close(balance_loss(probs_TE, experts_TK, padding_mask=mask), torch.tensor(16 / 15))


def test_balance_loss_by_sequence_by_hand():
    # Sequence 0 as above; sequence 1 is one token, balanced neither way: 2 * 1 * .8. Weighted 3 and 1.
    probs_TE = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.8, 0.2]])
    experts_TK = torch.tensor([[0], [0], [1], [0]])
    loss = balance_loss(probs_TE, experts_TK, scope="sequence", sequence_ids=torch.tensor([0, 0, 0, 1]))
    assert_close(loss, torch.tensor((3 * 16 / 15 + 1.6) / 4))


@pytest.mark.parametrize("wrong", [-1, 4])
def test_sequences_are_numbered_from_0_but_for_padding(wrong):
    probs_TE, ids = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.8, 0.2]]), torch.tensor([0, 0, 0, wrong])
    experts_TK, mask = torch.tensor([[0], [0], [1], [0]]), torch.tensor([False, False, False, True])
    loss = balance_loss(probs_TE, experts_TK, scope="sequence", sequence_ids=ids, padding_mask=mask)
    assert_close(loss, torch.tensor(16 / 15))
    message = f"groups tokens by sequence_ids, and token 3 has {wrong}, not one of 0 to 3: number the sequences from 0"
    with pytest.raises(ValueError, match=message):
        balance_loss(probs_TE, experts_TK, scope="sequence", sequence_ids=ids)


def test_balance_loss_of_no_token_is_zero():
    assert balance_loss(torch.empty(0, 3), torch.empty(0, 1, dtype=torch.int64)) == 0


def test_z_loss_by_hand():
    logits_TE = torch.log(torch.tensor([[1.0, 1.0], [1.0, 3.0]]))
    assert_close(z_loss(logits_TE), torch.tensor((math.log(2) ** 2 + math.log(4) ** 2) / 2))
    assert_close(z_loss(logits_TE, padding_mask=torch.tensor([True, False])), torch.tensor(math.log(4) ** 2))


def test_stablemoe_balance_loss_by_hand():
    # Three tokens for expert 0, one for expert 1, mean 2: (1/2 * (.5 + .6 + .7) - 1/2 * .2) / 4 tokens.
    gates_T = torch.tensor([0.5, 0.6, 0.7, 0.2])
    assert_close(stablemoe_balance_loss(gates_T, torch.tensor([0, 0, 0, 1]), 2), torch.tensor(0.8 / 4))


def test_distillation_loss_by_hand():
    student_TE = torch.log(torch.tensor([[0.5, 0.5], [0.25, 0.75]]))
    expected = -(math.log(0.5) + math.log(0.75)) / 2
    assert_close(distillation_loss(student_TE, torch.tensor([0, 1])), torch.tensor(expected))


def test_stablemoe_balance_loss_by_sequence_by_hand():
    # Sequence 0: both tokens to expert 0, mean 1: (1 * (.5 + .6)) / 2 tokens; sequence 1: one each, balanced: 0.
    gates_T = torch.tensor([0.5, 0.6, 0.7, 0.2])
    loss = stablemoe_balance_loss(
        gates_T, torch.tensor([0, 0, 0, 1]), 2, scope="sequence", sequence_ids=torch.tensor([0, 0, 1, 1])
    )
    assert_close(loss, torch.tensor((2 * 1.1 / 2 + 2 * 0.0) / 4))


def test_importance_loss_by_hand():
    # Means (.6, .4) of mean .5: variance .01 over .25.
    gates_TE = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]])
    assert_close(importance_loss(gates_TE), torch.tensor(0.04))
    # Sequences {.9 .1}: (.4 / .5)^2 = .64; {.6 .4, .3 .7}: (.05 / .5)^2 = .01. Weighted 1 and 2.
    by_sequence = importance_loss(gates_TE, scope="sequence", sequence_ids=torch.tensor([0, 1, 1]))
    assert_close(by_sequence, torch.tensor((0.64 + 2 * 0.01) / 3))
    masked = importance_loss(gates_TE, padding_mask=torch.tensor([False, True, True]))
    assert_close(masked, torch.tensor(0.64))


def test_importance_and_load_at_collapse_are_experts_less_one():
    assert_close(importance_loss(torch.tensor([[1.0, 0, 0, 0]] * 5)), torch.tensor(3.0))
    logits_TE = torch.tensor([[0.0, -100, -100, -100]] * 5)
    assert_close(load_loss(logits_TE, 1), torch.tensor(3.0))


def phi(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def squared_variation(values):
    values = np.asarray(values)
    return float(values.var() / values.mean() ** 2)


def test_load_loss_as_v_moe_by_hand():
    # k = 1, std 1/3: thresholds 2 and 1. Expert by expert the chance that its noise lifts it above the threshold.
    logits_TE = torch.tensor([[2.0, 1.5, 1.0], [1.0, 1.0, 0.5]])
    loads = [phi(0) + phi(0), phi(-1.5) + phi(0), phi(-3) + phi(-1.5)]
    assert_close(load_loss(logits_TE, 1), torch.tensor(squared_variation(loads)))


def test_load_loss_as_shazeer_by_hand():
    # k = 1, std 2, chosen by noisy logits: the best is compared with the second, the others with the best.
    clean_TE, noisy_TE = torch.tensor([[2.0, 1.5, 1.0]]), torch.tensor([[1.0, 3.0, 0.0]])
    chances = [phi((2 - 3) / 2), phi((1.5 - 1) / 2), phi((1 - 3) / 2)]
    loss = load_loss(clean_TE, 1, noisy_logits_TE=noisy_TE, noise_std=torch.full((1, 3), 2.0), exclude_itself=True)
    assert_close(loss, torch.tensor(squared_variation(chances)))
    assert load_loss(clean_TE, 3, exclude_itself=True) == 0


def test_losses_of_no_token_are_zero():
    nothing, ids = torch.empty(0, 3), torch.empty(0, dtype=torch.int64)
    for scope in ("batch", "sequence"):
        assert importance_loss(nothing, scope=scope, sequence_ids=ids) == 0
        assert load_loss(nothing, 1, scope=scope, sequence_ids=ids) == 0
        assert stablemoe_balance_loss(torch.empty(0), ids, 3, scope=scope, sequence_ids=ids) == 0


def test_a_scope_that_does_not_exist_or_has_no_sequences_is_refused():
    with pytest.raises(ValueError, match="scope must be batch or sequence, got 'image'"):
        importance_loss(torch.ones(2, 2), scope="image")
    with pytest.raises(ValueError, match="needs sequence_ids; the context has none"):
        importance_loss(torch.ones(2, 2), scope="sequence")


@pytest.mark.parametrize("name", ["LinearRouter", "XMoERouter", "StableMoERouter"])
def test_every_router_with_logits_can_be_balanced_in_each_sequence(name):
    router, x_TD, ids = create_router(name, LayerSpec(8, 4, vocab_size=10)), torch.randn(6, 8), torch.arange(6)
    sequence_ids = torch.tensor([0, 0, 0, 0, 1, 1])

    def loss(loss_name, part):
        context = RoutingContext(token_ids=ids[part], sequence_ids=sequence_ids[part] - sequence_ids[part].min())
        routing = router(x_TD[part], context)
        # StableMoE has a balance loss of its own; these are of its routing.
        return loss_of(loss_name, replace(routing, losses={}), context)

    parts = [loss("balance", slice(4)), loss("balance", slice(4, 6))]
    assert_close(loss("sequence_balance", slice(6)), (4 * parts[0] + 2 * parts[1]) / 6)
    assert not torch.equal(loss("sequence_balance", slice(6)), loss("balance", slice(6)))


def test_noisy_gate_has_the_losses_of_its_paper():
    router, x_TD, context = LinearRouter(LayerSpec(8, 4), noisy=True), torch.randn(20, 8), RoutingContext()
    torch.nn.init.normal_(router.noise_weight)
    routing = router(x_TD, context)
    gates_TE = torch.zeros(20, 4).scatter(1, routing.experts_TK, routing.weights_TK)
    assert_close(loss_of("importance", routing, context), importance_loss(gates_TE))
    std_TE = torch.nn.functional.softplus(x_TD @ router.noise_weight.T) + 0.01
    clean_TE = x_TD @ router.weight.T
    expected = load_loss(clean_TE, 2, noisy_logits_TE=routing.logits_TE, noise_std=std_TE, exclude_itself=True)
    assert_close(loss_of("load", routing, context), expected)
    assert_close(loss_of("z", routing, context), z_loss(clean_TE))
    loss_of("load", routing, context).backward()
    assert router.noise_weight.grad.abs().sum() > 0


def test_generic_losses_of_any_router_with_logits():
    router = XMoERouter(LayerSpec(8, 4), temperature=0.05)
    context = RoutingContext(sequence_ids=torch.tensor([0, 0, 0, 1, 1, 1]))
    routing = router(torch.randn(6, 8), context)
    for name in ROUTING_LOSSES:
        assert loss_of(name, routing, context).isfinite()
    # X-MoE's balance is that of its fixed temperature in every scope.
    expected = balance_loss(
        routing.balance_probs_TE, routing.experts_TK, scope="sequence", sequence_ids=context.sequence_ids
    )
    assert_close(loss_of("sequence_balance", routing, context), expected)


def test_an_unknown_loss_lists_those_that_the_router_has():
    routing = Routing(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), torch.zeros(2, 3))
    assert_close(loss_of("z", routing, RoutingContext()), torch.tensor(math.log(3) ** 2))
    with pytest.raises(ValueError, match="no loss 'entropy'; it has balance, global_balance, importance, load"):
        loss_of("entropy", routing, RoutingContext())
    with pytest.raises(ValueError, match="no loss 'balance'; it has none"):
        loss_of("balance", Routing(routing.experts_TK, routing.weights_TK), RoutingContext())
