"""Balance over the micro-batches of an optimizer step, by hand and against one batch of all of them."""

import pytest
import torch
from torch.testing import assert_close

from routerzoo import LinearRouter, LossWeight, MoE, RoutingContext, attach, auxiliary_loss
from routerzoo.functional.losses import balance_loss

WEIGHTS = {"global_balance": 1.0}


def make(top_k=1):
    torch.manual_seed(0)
    layer = MoE(d_model=3, num_experts=3, router=lambda spec: LinearRouter(spec, top_k=top_k))
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(3))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    attach(layer, optimizer)
    return layer, optimizer


def tokens(*experts):
    """Return hidden states whose largest logit is that of these experts, with probabilities 1/2, 1/4 and 1/4."""
    return torch.log(1 + torch.eye(3)[list(experts)])


def loss_of(layer, batch, weights=WEIGHTS):
    context = RoutingContext()
    output = layer(batch, context)
    return auxiliary_loss(layer, context, weights) + 0.0 * output.sum()


def test_earlier_assignments_count_in_the_load_by_hand():
    # f = ((1 + 2) / 4, 1 / 4), P = (.6, .4): 2 * (3/4 * .6 + 1/4 * .4) = 1.1. Without the earlier two: 2 * .5 = 1.
    probs_TE, experts_TK = torch.tensor([[0.9, 0.1], [0.3, 0.7]]), torch.tensor([[0], [1]])
    assert_close(balance_loss(probs_TE, experts_TK, earlier_E=torch.tensor([2.0, 0.0])), torch.tensor(1.1))
    with pytest.raises(ValueError, match="earlier_E counts for the scope of a batch"):
        balance_loss(probs_TE, experts_TK, weighted=True, earlier_E=torch.zeros(2))


def test_micro_batches_of_one_expert_each_are_balanced_together():
    layer, optimizer = make()
    losses = []
    for expert in (0, 1, 2):
        loss = loss_of(layer, tokens(expert, expert))
        loss.backward()
        losses.append(loss.item())
    # f is one-hot, then (1/2, 1/2, 0), then 1/3 each; P is 1/2 at the expert of the micro-batch, 1/4 elsewhere.
    assert losses == pytest.approx([3 * 0.5, 3 * (0.5 * 0.25 + 0.5 * 0.5), 1.0])
    optimizer.step()
    optimizer.zero_grad()
    assert loss_of(layer, tokens(1)).item() == pytest.approx(1.5)  # another step begins
    assert loss_of(layer, tokens(1), {"balance": 1.0}).item() == pytest.approx(1.5)


def test_the_last_micro_batch_has_the_gradient_of_one_batch_of_all():
    """Its load is the whole batch's, so that only its own share of the mean probabilities is left."""
    layer, _ = make(top_k=2)
    torch.manual_seed(1)
    batch = torch.randn(12, 3)
    for part in batch[:8].split(4):
        loss_of(layer, part).backward()
    whole = loss_of(layer, batch, {"balance": 1.0})
    last = torch.autograd.grad(loss_of(layer, batch[8:]), layer.router.weight)[0]
    f_E = torch.bincount(batch.topk(2).indices.flatten(), minlength=3) / 24
    assert whole.item() == pytest.approx(3 * float((f_E * batch.softmax(-1).mean(0)).sum()))
    logits_TE = (batch[8:] @ torch.eye(3)).requires_grad_()
    (3 * (f_E * logits_TE.softmax(-1).mean(0)).sum()).backward()
    assert_close(last, logits_TE.grad.T @ batch[8:])


def test_only_passes_that_train_count_and_each_once():
    layer, _ = make()
    layer.eval()
    with torch.no_grad():
        loss_of(layer, tokens(1, 1, 1))
    layer.train()
    loss_of(layer, tokens(1, 1, 1))  # its gradient is never used
    context = RoutingContext()
    layer(tokens(0), context)
    for _ in range(2):  # logged, then trained
        loss = auxiliary_loss(layer, context, WEIGHTS)
    loss.backward(retain_graph=True)
    loss.backward()
    assert layer.step_load.earlier_E.tolist() == [1, 0, 0]
    (float("inf") * loss_of(layer, tokens(2))).backward()
    assert layer.step_load.earlier_E.tolist() == [1, 0, 0]


def test_it_needs_somebody_who_counts_steps():
    layer = MoE(d_model=3, num_experts=3)
    message = "'global_balance' of LinearRouter cannot be computed: it counts over the micro-batches of an optimizer "
    with pytest.raises(ValueError, match=message + "step: call routerzoo.attach"):
        loss_of(layer, tokens(0))
    attached, _ = make()
    with pytest.raises(ValueError, match="each layer counts its own load"):
        loss_of(attached, tokens(0), {"global_balance": LossWeight(1.0, "pooled")})


def test_a_local_balance_leaves_other_processes_out():
    layer, _ = make()
    context = RoutingContext(process_group=object())  # no group: whoever uses it fails
    layer(tokens(0, 1), context)
    assert_close(auxiliary_loss(layer, context, {"local_balance": 1.0}), loss_of(layer, tokens(0, 1), {"balance": 1.0}))
