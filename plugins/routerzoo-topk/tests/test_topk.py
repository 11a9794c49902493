"""TopKRouter against the DeepSeek-V3 block of transformers 5.23, and by hand."""

from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from routerzoo_topk import TopKRouter
from torch.testing import assert_close

from routerzoo import LayerSpec, LossWeight, MoE, RoutingContext, SwiGLUExperts, attach, auxiliary_loss
from routerzoo.functional import apply_score_fn
from routerzoo.functional.losses import balance_loss, scope_of
from routerzoo.functional.topk import ScoreFunction
from routerzoo.moe.auxiliary_loss import loss_of
from routerzoo.moe.dispatch import dense_forward

TOLERANCE = 5e-6
"""About forty times the spacing of float32."""


def close(ours, theirs):
    """Compare relative to the largest value of the tensor: what rounding does to a small one is up to the processor."""
    assert ours.shape == theirs.shape
    error = ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12)).item()
    print(f"largest error {error:.1e} of the largest value, shape {list(theirs.shape)}")
    assert error < TOLERANCE


def test_deepseek_v3_block():
    print("golden deepseek_v3_moe_E16_k4")
    with np.load(Path(__file__).parent / "golden" / "deepseek_v3_moe_E16_k4.npz") as file:
        golden = {key: torch.from_numpy(value) for key, value in file.items()}
    num_experts, d_model = golden["gate_weight"].shape
    router = partial(
        TopKRouter,
        top_k=int(golden["top_k"]),
        score="sigmoid",
        num_groups=int(golden["num_groups"]),
        top_groups=int(golden["top_groups"]),
        scale=float(golden["scaling"]),
    )
    experts = partial(SwiGLUExperts, hidden_dim=golden["experts_down_proj"].shape[2])
    layer = MoE(LayerSpec(d_model, num_experts), router, experts, num_shared_experts=1)
    shared = {name: golden[f"shared_experts_{name}_proj_weight"] for name in ("gate", "up", "down")}
    layer.load_state_dict(
        {
            **layer.state_dict(),
            "router.weight": golden["gate_weight"],
            "router.selection_bias": golden["gate_e_score_correction_bias"],
            "experts.gate_up": golden["experts_gate_up_proj"],
            "experts.down": golden["experts_down_proj"],
            "shared_experts.gate_up": torch.cat([shared["gate"], shared["up"]]).unsqueeze(0),
            "shared_experts.down": shared["down"].unsqueeze(0),
        }
    )
    context = RoutingContext()
    output = layer(golden["hidden"], context)
    routing = context.routings[0].routing
    close(routing.logits_TE, golden["logits"])
    assert torch.equal(routing.experts_TK.sort(-1).values, golden["experts"].sort(-1).values)
    ours, theirs = (
        torch.zeros(len(e), num_experts).scatter(1, e, w)
        for e, w in ((routing.experts_TK, routing.weights_TK), (golden["experts"], golden["weights"]))
    )
    close(ours, theirs)
    close(output, golden["output"])
    shared_output = dense_forward(layer.shared_experts, golden["hidden"].flatten(0, 1), 1)
    close(shared_output.view_as(output), golden["shared_output"])


@pytest.mark.parametrize("score", get_args(ScoreFunction))
def test_scores_have_finite_gradients_where_they_underflow(score):
    """As in a hash layer, whose experts may have any score."""
    logits_TE = torch.tensor([[100.0, 0.0, -79.0, -80.0, -90.0, -200.0, -1e4, -torch.inf]], requires_grad=True)
    scores_TE = apply_score_fn(logits_TE, score)
    (gradient_TE,) = torch.autograd.grad(scores_TE[0, 1:].sum(), logits_TE)
    assert gradient_TE.isfinite().all()
    if score == "sqrt_softplus":
        # Of the root of exp(z).
        small = torch.tensor([-79.0, -80.0, -90.0])
        assert_close(scores_TE[0, 2:5], (small / 2).exp(), rtol=1e-5, atol=0)
        assert_close(gradient_TE[0, 2:5], (small / 2).exp() / 2, rtol=1e-5, atol=0)


def test_bias_selects_and_does_not_weight():
    router = TopKRouter(LayerSpec(2, 3), top_k=1, score="sigmoid", renormalize=False)
    router.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    router.selection_bias.copy_(torch.tensor([0.0, 0.0, 0.5]))
    routing = router(torch.tensor([[1.0, 0.0]]))  # scores .731, .5, .5 and .5 with the bias 1
    assert routing.experts_TK.tolist() == [[2]]
    assert_close(routing.weights_TK, torch.tensor([[0.5]]))


def test_bias_moves_against_the_load_once_per_step_without_padding():
    layer = MoE(LayerSpec(2, 2), partial(TopKRouter, top_k=1, renormalize=False, bias_speed=0.1))
    layer.router.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    attach(layer, optimizer)
    x_TD = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    # Gradient accumulation: loads 1, 2 and then, without padding, 1, 0, twice.
    layer(x_TD).sum().backward()
    layer(x_TD, RoutingContext(padding_mask=torch.tensor([False, True, True]))).sum().backward()
    layer(x_TD[:1]).sum().backward()
    optimizer.step()
    assert_close(layer.router.selection_bias, torch.tensor([-0.1, 0.1]))
    layer.eval()(x_TD).sum().backward()
    optimizer.step()  # balanced: nothing was counted
    assert_close(layer.router.selection_bias, torch.tensor([-0.1, 0.1]))


def test_a_bias_that_does_not_move_needs_no_updates():
    assert not TopKRouter(LayerSpec(2, 2)).needs_updates
    assert TopKRouter(LayerSpec(2, 2), bias_speed=1e-3).needs_updates


def test_groups_by_hand():
    router = TopKRouter(LayerSpec(4, 4), top_k=2, score="sigmoid", num_groups=2, top_groups=1)
    router.weight.data = torch.eye(4)
    # The best single expert is in group 0, the best pair in group 1.
    assert router(torch.tensor([[3.0, -9.0, 2.0, 2.5]])).experts_TK.tolist() == [[3, 2]]
    # Where the bias makes the scores of the best group negative, experts of the other group still never win.
    router.selection_bias.fill_(-2.0)
    assert router(torch.tensor([[3.0, -9.0, 2.0, 2.5]])).experts_TK.tolist() == [[3, 2]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_groups": 3}, "num_groups must divide num_experts = 8, got 3"),
        ({"num_groups": 4, "top_groups": 5}, "top_groups must be between 1 and num_groups = 4, got 5"),
        (
            {"num_groups": 4, "top_groups": 1, "top_k": 3},
            "top_k must be between 1 and the largest k of this router = 2, got 3",
        ),
        ({"score": "tanh"}, "the score function must be one of softmax, sigmoid, sqrt_softplus, got 'tanh'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TopKRouter(LayerSpec(8, 8), **arguments)


@pytest.mark.parametrize(("name", "length"), [("sequence_balance", 10), ("balance", 30)])
@pytest.mark.parametrize("groups", [{}, {"num_groups": 4, "top_groups": 2}])
def test_balance_losses_count_the_largest_unbiased_scores(name, length, groups):
    """DeepSeek-V3, equations 17 to 20, written out; Megatron-core counts so over the batch too."""
    torch.manual_seed(0)
    top_k, num_experts = 2, 8
    router = TopKRouter(
        LayerSpec(6, num_experts), top_k=top_k, score="sigmoid", bias_speed=1e-3, init_std=1.0, **groups
    )
    router.selection_bias.copy_(torch.randn(num_experts))
    x_TD, context = torch.randn(30, 6), RoutingContext(sequence_ids=torch.arange(30) // 10)
    routing = router(x_TD, context)
    loss = loss_of(name, routing, context)
    (gradient,) = torch.autograd.grad(loss, router.weight)

    weight = router.weight.detach().clone().requires_grad_()
    expected = 0.0
    for tokens in (x_TD @ weight.T).sigmoid().split(length):
        largest = tokens.topk(top_k, dim=-1).indices.flatten()
        f = num_experts / (top_k * length) * torch.bincount(largest, minlength=num_experts)
        P = (tokens / tokens.sum(-1, keepdim=True)).mean(0)
        expected += (f * P).sum() * length / 30
    (expected_gradient,) = torch.autograd.grad(expected, weight)
    assert_close(loss, expected, rtol=1e-5, atol=0)
    assert (gradient - expected_gradient).abs().max() < 1e-5 * expected_gradient.abs().max()
    # What was selected would have given something else.
    selected = balance_loss(routing.balance_scores(), routing.experts_TK, **scope_of("batch", context))
    assert (selected - expected).detach().abs() > 1e-3


def test_balance_losses_of_layers_with_and_without_a_bias_are_not_pooled():
    layers = [MoE(LayerSpec(2, 2), router) for router in (TopKRouter, "LinearRouter")]
    context = RoutingContext()
    for layer in layers:
        layer(torch.ones(3, 2), context)
    with pytest.raises(ValueError, match="with and without a selection bias, whose losses cannot be pooled"):
        auxiliary_loss(layers, context, {"balance": LossWeight(0.01, "pooled")})
