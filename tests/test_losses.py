"""Losses against values worked out by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from routerzoo import Routing, RoutingContext
from routerzoo.losses import (
    auxiliary_loss,
    balance_loss,
    distillation_loss,
    stablemoe_balance_loss,
    z_loss,
)


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
    loss = balance_loss(probs_TE, experts_TK, sequence_ids=torch.tensor([0, 0, 0, 1]))
    assert_close(loss, torch.tensor((3 * 16 / 15 + 1.6) / 4))


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


def test_an_unknown_loss_lists_those_that_the_router_has():
    routing = Routing(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), torch.zeros(2, 3))
    assert_close(auxiliary_loss("z", routing, RoutingContext()), torch.tensor(math.log(3) ** 2))
    with pytest.raises(ValueError, match="no loss 'importance'; it has balance, z"):
        auxiliary_loss("importance", routing, RoutingContext())
    with pytest.raises(ValueError, match="no loss 'balance'; it has none"):
        auxiliary_loss("balance", Routing(routing.experts_TK, routing.weights_TK), RoutingContext())
