"""The balance loss and the z-loss in one pass: what they are one by one."""

import os

import pytest
import torch
from torch.testing import assert_close

from routerzoo import MoE, RoutingContext, auxiliary_loss
from routerzoo.functional.losses import balance_loss, z_loss
from routerzoo.moe import softmax_losses
from routerzoo.moe.low_memory import HAS_TRITON
from routerzoo.moe.softmax_losses import _losses

INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs triton's interpreter")


def one_by_one(logits_TE, experts_TK, padding_mask=None):
    balance = balance_loss(logits_TE.softmax(-1), experts_TK, padding_mask=padding_mask)
    return balance, z_loss(logits_TE, padding_mask=padding_mask)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(1, 1, 1), (7, 3, 2), (150, 5, 5), (70, 130, 4)])
def test_values_and_gradients(num_tokens, num_experts, top_k, share):
    """With a share of padding, whose tokens may have chosen all the same, and of choices that name no expert."""
    logits_TE = (3 * torch.randn(num_tokens, num_experts)).requires_grad_()
    experts_TK = logits_TE.detach().topk(top_k).indices
    padding_mask = torch.rand(num_tokens) < share if share else None
    if share:
        experts_TK = experts_TK.masked_fill(torch.rand(experts_TK.shape) < 0.3, -1)
        with torch.no_grad():  # nothing that padding holds may count
            poisoned_TE = logits_TE.masked_fill(padding_mask.unsqueeze(1), float("nan"))
    expected = one_by_one(logits_TE, experts_TK, padding_mask)
    found = _losses(logits_TE, experts_TK, padding_mask)[:2]
    if share:
        assert_close(_losses(poisoned_TE, experts_TK, padding_mask)[:2], found, rtol=0, atol=0)
    assert_close(torch.stack(found), torch.stack(expected), rtol=1e-5, atol=1e-7)
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.3, -2.0)):
        used = [number for number, weight in enumerate(weights) if weight]
        totals = [sum(weights[n] * losses[n] for n in used) for losses in (found, expected)]
        grad, right = (torch.autograd.grad(total, logits_TE, retain_graph=True)[0] for total in totals)
        assert_close(grad, right, rtol=1e-4, atol=1e-6 * float(right.abs().max()) + 1e-8)


def test_sums_of_many_blocks_of_tokens(monkeypatch):
    from routerzoo.moe import kernel_calls

    logits_TE = torch.randn(200, 3)
    experts_TK = logits_TE.topk(2).indices
    for most in (0, 1):  # by torch, or block by block
        monkeypatch.setattr(kernel_calls, "MOST_SUMMED_AT_ONCE", most * 2**15)
        assert_close(_losses(logits_TE, experts_TK, None)[:2], one_by_one(logits_TE, experts_TK))


def test_large_logits_stay_finite():
    logits_TE = torch.tensor([[1e4, -1e4, 0.0], [-3e4, -3e4, -3e4]], requires_grad=True)
    experts_TK = torch.tensor([[0], [1]])
    balance, z = _losses(logits_TE, experts_TK, None)[:2]
    expected = one_by_one(logits_TE, experts_TK)
    assert_close((balance, z), expected)
    (grad,) = torch.autograd.grad(balance + z, logits_TE)
    assert grad.isfinite().all()


@pytest.mark.parametrize("padding_mask", [None, torch.tensor([False, True, False, False])])
def test_gradients_of_gradients(padding_mask):
    logits_TE = torch.randn(4, 3, requires_grad=True)
    experts_TK = logits_TE.detach().topk(2).indices
    second = []
    for make in (_losses, one_by_one):
        losses = make(logits_TE, experts_TK, padding_mask)[:2]
        (grad,) = torch.autograd.grad(losses[0] + losses[1], logits_TE, create_graph=True)
        second.append(torch.autograd.grad(grad.square().sum(), logits_TE)[0])
    assert_close(*second)


def test_losses_that_were_logged_without_gradients_are_made_again(monkeypatch):
    monkeypatch.setattr(softmax_losses, "_on_gpu", lambda logits_TE: True)
    layer, context = MoE(d_model=8, num_experts=4), RoutingContext()
    layer(torch.randn(6, 8), context)
    with torch.no_grad():
        logged = auxiliary_loss(layer, context, {"balance": 1.0, "z": 1.0})
    loss = auxiliary_loss(layer, context, {"balance": 1.0, "z": 1.0})
    assert_close(loss, logged)
    loss.backward()
    assert layer.router.weight.grad.abs().max() > 0
