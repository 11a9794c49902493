"""The routers that assign jointly, by hand."""

import pytest
import torch
from routerzoo_assignment import (
    BaseLayerRouter,
    ExpertChoiceRouter,
    ExpertThresholdRouter,
    RLRouter,
    SBaseRouter,
    SelectiveSinkhornRouter,
    SinkhornRouter,
    log_sinkhorn,
)
from routerzoo_assignment.auction import balanced_assignment
from scipy.optimize import linear_sum_assignment
from timm.utils import ModelEmaV2, ModelEmaV3
from torch.testing import assert_close

from routerzoo import LayerSpec, MoE, RoutingContext, attach, auxiliary_loss, copy_router_state
from routerzoo.moe.layer import NonCausalRouterError


def sequences(*lengths):
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return RoutingContext(sequence_ids=ids)


def gate(router, logits_TE):
    """Let hidden states be logits."""
    router.weight.data = torch.eye(logits_TE.shape[1])
    return logits_TE


def chosen(routing, num_tokens, num_experts):
    pairs = routing.assignments()
    weights = torch.zeros(num_tokens, num_experts + 1)
    weights[pairs.token_N, pairs.expert_N] = pairs.weight_N
    return weights[:, :num_experts]


def test_expert_choice_by_hand():
    router = ExpertChoiceRouter(LayerSpec(2, 2), top_k=1)
    logits = gate(router, torch.tensor([[2.0, 0.0], [1.0, 0.0], [3.0, 0.0], [0.0, 0.5], [0.0, 0.1]]))
    # A sequence of 3 tokens, 2 for each expert; one of 2 tokens, 1 for each.
    weights = chosen(router(logits, sequences(3, 2)), 5, 2)
    expected = logits.softmax(-1) * torch.tensor([[1, 1], [0, 1], [1, 0], [0, 1], [1, 0]])
    assert_close(weights, expected)


def test_expert_choice_has_equal_loads_without_padding():
    router = ExpertChoiceRouter(LayerSpec(8, 4), top_k=2)
    mask = torch.arange(24) % 12 >= 8  # two sequences of 8 tokens and 4 of padding
    context = RoutingContext(sequence_ids=torch.arange(24) // 12, padding_mask=mask)
    routing = router(torch.randn(24, 8) * 9, context)
    assert routing.expert_load(4).tolist() == [8, 8, 8, 8]
    assert not chosen(routing, 24, 4)[mask].any()


def test_expert_choices_noise_moves_choices_and_weights_in_training():
    torch.manual_seed(0)
    router = ExpertChoiceRouter(LayerSpec(8, 4), top_k=2, noise=1.0)
    x_TD, context = torch.randn(4000, 8), sequences(*[10] * 400)
    routing = router(x_TD, context)
    assert 0.24 < (routing.logits_TE - routing.clean_logits_TE).std() < 0.26  # 1 / E
    weights = chosen(routing, 4000, 4)
    assert_close(weights, routing.logits_TE.softmax(-1) * (weights > 0))
    assert router.eval()(x_TD, context).clean_logits_TE is None
    assert ExpertChoiceRouter(LayerSpec(8, 4))(x_TD, context).clean_logits_TE is None


def test_sinkhorns_noise_moves_the_plan_alone():
    torch.manual_seed(0)
    router, context = SinkhornRouter(LayerSpec(8, 4), top_k=1), sequences(*[8] * 100)
    x_TD = torch.randn(800, 8)
    assert router.noise_std(x_TD) == 0.25  # 1 / E
    clean = router.eval()(x_TD, context)
    noisy = router.train()(x_TD, context)
    assert 0.05 < (noisy.experts_TK != clean.experts_TK).float().mean() < 0.95
    assert_close(noisy.logits_TE, clean.logits_TE)
    assert_close(noisy.weights_TK, clean.logits_TE.softmax(-1).gather(1, noisy.experts_TK))
    router = SinkhornRouter(LayerSpec(8, 4), top_k=1, noise=0.0)
    assert torch.equal(router(x_TD, context).experts_TK, router.eval()(x_TD, context).experts_TK)


def update(router, x_TD):
    """Take a step of training."""
    context = RoutingContext()
    router.update(router.statistics(router(x_TD, context), context))


def test_threshold_follows_the_batch_and_chooses_by_itself():
    router = ExpertThresholdRouter(LayerSpec(2, 2), top_k=1, speed=0.5)
    logits = gate(router, torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]))
    assert chosen(router(logits), 4, 2).gt(0).tolist() == [[True, False], [True, False], [False, True], [False, True]]
    update(router, logits)
    # Two tokens for each expert: the third-largest probability is sigmoid(-1).
    assert_close(router.thresholds_E, torch.sigmoid(torch.tensor([-1.0, -1.0])))
    update(router, logits * 2)
    assert_close(
        router.thresholds_E, (torch.sigmoid(torch.tensor(-1.0)) + torch.sigmoid(torch.tensor(-2.0))).div(2).expand(2)
    )
    router.eval()
    both = router(torch.tensor([[0.0, 0.0]]))
    assert both.assignments().expert_N.tolist() == [0, 1]
    before = router.thresholds_E.clone()
    update(router, logits[:0])  # nothing was seen
    assert torch.equal(router.thresholds_E, before)


def test_thresholds_leave_padding_out_and_average_over_accumulation():
    router = ExpertThresholdRouter(LayerSpec(2, 2), top_k=1)
    logits = gate(router, torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [9.0, 0.0]]))
    context = RoutingContext(padding_mask=torch.tensor([False, False, False, False, True]))
    first, second = (router.statistics(router(x, context), context) for x in (logits, 2 * logits))
    router.update({name: first[name] + second[name] for name in first})
    # Two tokens for each expert, in two passes: the third-largest probabilities are sigmoid(-1) and sigmoid(-2).
    expected = torch.sigmoid(torch.tensor([-1.0, -2.0])).mean()
    assert_close(router.thresholds_E, expected.expand(2))


def test_threshold_keeps_the_mean_number_of_experts():
    torch.manual_seed(0)
    router = ExpertThresholdRouter(LayerSpec(16, 8), top_k=2, init_std=1.0)
    for _ in range(60):
        update(router, torch.randn(256, 16))
    router.eval()
    assert 1.8 < len(router(torch.randn(4096, 16)).assignments().token_N) / 4096 < 2.2


def test_transport_plan_has_its_marginals_and_does_not_overflow():
    torch.manual_seed(0)
    scores = torch.randn(3, 12, 4)
    scores[0, 0, 0] = 1000.0
    real = torch.ones(3, 12, dtype=torch.bool)
    real[1, 7:] = False
    plan = log_sinkhorn(scores, real, iterations=5000).exp()  # the outlier alone takes so many
    assert plan.isfinite().all()
    assert_close(plan.sum(2), real.float(), atol=1e-4, rtol=0)  # float32 next to a logit of 1,000
    assert_close(plan.sum(1), (real.sum(1) / 4).unsqueeze(1).expand(3, 4), atol=1e-3, rtol=1e-3)
    assert not plan[1, 7:].any()


def test_small_entropy_gives_the_best_assignment():
    torch.manual_seed(0)
    scores = torch.randn(1, 12, 3)
    plan = log_sinkhorn(scores, torch.ones(1, 12, dtype=torch.bool), epsilon=0.01, iterations=5000).exp()
    rows, columns = linear_sum_assignment(-scores[0].repeat_interleave(4, 1).numpy())
    assert plan[0].argmax(1).tolist() == (columns // 4).tolist()
    assert rows.tolist() == list(range(12))


@pytest.mark.parametrize("router", [SinkhornRouter, SBaseRouter])
def test_transport_levels_the_load(router):
    torch.manual_seed(0)
    built = router(LayerSpec(8, 4), top_k=1, epsilon=0.05).train(router is SBaseRouter)  # without noise
    x_TD = gate_of_preferences(built)
    context = sequences(64)
    load = built(x_TD, context).expert_load(4)
    assert load.max() <= 24
    assert x_TD[:, :4].argmax(1).bincount(minlength=4).max() > 40  # without transport


def gate_of_preferences(router):
    x_TD = torch.randn(64, 8)
    x_TD[:, 0] += 3.0
    router.weight.data = torch.eye(4, 8)
    return x_TD


def test_s_base_weights_and_evaluation():
    router = SBaseRouter(LayerSpec(2, 2), top_k=1)
    logits = gate(router, torch.tensor([[2.0, 1.0], [3.0, 1.0]]))
    routing = router(logits)
    assert routing.experts_TK.flatten().tolist() == [1, 0]  # one each, though both prefer expert 0
    assert_close(routing.weights_TK.flatten(), torch.sigmoid(torch.tensor([1.0, 3.0])))
    assert router.eval()(logits).experts_TK.flatten().tolist() == [0, 0]
    router.top_k = 2
    assert_close(router(logits).weights_TK, logits.softmax(-1))


def test_selective_sinkhorn_is_rare_and_its_gradient_can_be_had():
    torch.manual_seed(0)
    router = SelectiveSinkhornRouter(LayerSpec(2, 2), top_k=1, probability=0.25, noise=0.0)
    logits = gate(router, torch.tensor([[2.0, 1.0], [3.0, 1.0]]))
    by_transport = sum(router(logits).experts_TK.flatten().tolist() == [1, 0] for _ in range(2000))
    assert 440 < by_transport < 560
    for detach in (False, True):
        router = SelectiveSinkhornRouter(LayerSpec(4, 4), top_k=2, probability=1.0, detach=detach)
        router(torch.randn(8, 4)).weights_TK[:, 0].sum().backward() if not detach else None
        assert detach or router.weight.grad.abs().sum() > 0
    assert not router(torch.randn(8, 4)).weights_TK.requires_grad


@pytest.mark.parametrize("shape", [(12, 3), (64, 8), (10, 4), (5, 1), (3, 8), (0, 4)])
def test_auction_is_within_epsilon_of_the_best_assignment(shape):
    torch.manual_seed(1)
    scores = torch.randn(shape)
    experts = balanced_assignment(scores, precision=0.01, max_rounds=10_000)
    capacity = -(-shape[0] // shape[1])
    if shape[0] == 0:
        assert experts.tolist() == []
        return
    assert experts.bincount(minlength=shape[1]).max() <= capacity
    rows, columns = linear_sum_assignment(-scores.repeat_interleave(capacity, 1).numpy())
    best = float(scores.repeat_interleave(capacity, 1)[torch.from_numpy(rows), torch.from_numpy(columns)].sum())
    ours = float(scores.gather(1, experts.unsqueeze(1)).sum())
    epsilon = 0.01 * float(scores.max() - scores.min())
    assert best - shape[0] * epsilon - 1e-4 <= ours <= best + 1e-4


def test_auction_that_is_cut_short_still_balances():
    scores = torch.randn(64, 8) + torch.arange(8)
    experts = balanced_assignment(scores, precision=1e-6, max_rounds=3)
    assert experts.bincount(minlength=8).tolist() == [8] * 8


def test_base_layer_weights_by_sigmoid_and_skips_padding():
    router = BaseLayerRouter(LayerSpec(2, 2))
    router.expert_embedding.data = torch.eye(2)
    x_TD = torch.tensor([[2.0, 1.0], [3.0, 1.0], [9.0, 0.0]])
    context = RoutingContext(padding_mask=torch.tensor([False, False, True]))
    routing = router(x_TD, context)
    assert routing.experts_TK.flatten().tolist() == [1, 0, 0]
    assert_close(routing.weights_TK[:2].flatten(), torch.sigmoid(torch.tensor([1.0, 3.0])))
    assert router.eval()(x_TD).experts_TK.flatten().tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "router", [ExpertChoiceRouter, SinkhornRouter, SBaseRouter, SelectiveSinkhornRouter, BaseLayerRouter]
)
def test_a_decoder_refuses_them_and_names_an_alternative(router):
    with pytest.raises(NonCausalRouterError, match=r"ExpertThresholdRouter|LinearRouter"):
        MoE(LayerSpec(8, 4, decoder=True), router)
    MoE(LayerSpec(8, 4, decoder=True), ExpertThresholdRouter)


@pytest.mark.parametrize(
    ("router", "arguments", "message"),
    [
        (ExpertThresholdRouter, {"speed": 0.0}, "speed must be above 0 and at most 1, got 0.0"),
        (SinkhornRouter, {"epsilon": 0.0}, "epsilon must be above 0, got 0.0"),
        (SinkhornRouter, {"noise": -1.0}, "noise must be at least 0, got -1.0"),
        (ExpertChoiceRouter, {"noise": -1.0}, "noise must be at least 0, got -1.0"),
        (SBaseRouter, {"iterations": 0}, "iterations must be at least 1, got 0"),
        (SelectiveSinkhornRouter, {"probability": 2.0}, "probability must be between 0 and 1, got 2.0"),
        (SelectiveSinkhornRouter, {"scores": "probs"}, "scores must be logits or softmax, got 'probs'"),
        (BaseLayerRouter, {"precision": 0.0}, "precision must be above 0, got 0.0"),
    ],
)
def test_bad_arguments(router, arguments, message):
    with pytest.raises(ValueError, match=message):
        router(LayerSpec(8, 8), **arguments)


def test_the_policy_is_rewarded_by_hand():
    torch.manual_seed(0)
    router, context = RLRouter(LayerSpec(4, 3)).train(), RoutingContext()
    x_TD, token_losses = torch.randn(5, 4), torch.rand(5)
    routing = router(x_TD, context)
    told = router.feedback(routing, context, token_losses)
    log_p = (x_TD @ router.weight.T).log_softmax(-1)
    value = router.baseline(x_TD).squeeze(-1)
    advantage = -token_losses - value
    chosen_log_p = log_p.gather(1, routing.experts_TK).squeeze(1)
    assert_close(told["policy"], (-advantage.detach() * chosen_log_p).mean())
    assert_close(told["value"], advantage.square().mean() / 2)
    assert_close(told["entropy"], (log_p.exp() * log_p).sum(-1).mean())
    assert routing.weights_TK.tolist() == [[1.0]] * 5
    (gradient,) = torch.autograd.grad(told["policy"], router.weight, retain_graph=True)
    onehot = torch.nn.functional.one_hot(routing.experts_TK.squeeze(1), 3).float()
    assert_close(gradient, -(advantage.detach().unsqueeze(1) * (onehot - log_p.exp())).T @ x_TD / 5)


def test_the_policy_finds_the_rewarded_expert():
    torch.manual_seed(0)
    router = RLRouter(LayerSpec(4, 4)).train()
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    for _ in range(300):
        x_TD, context = torch.randn(64, 4), RoutingContext()
        routing = router(x_TD, context)
        best_T = x_TD.argmax(-1)
        token_losses = (routing.experts_TK.squeeze(1) != best_T).float()
        told = router.feedback(routing, context, token_losses)
        optimizer.zero_grad()
        (told["policy"] + told["value"] + 0.01 * told["entropy"]).backward()
        optimizer.step()
    x_TD = torch.randn(512, 4)
    right = router.eval()(x_TD).experts_TK.squeeze(1) == x_TD.argmax(-1)
    assert right.float().mean() > 0.8


def test_draws_follow_the_policy():
    torch.manual_seed(0)
    router = RLRouter(LayerSpec(3, 3), top_k=1).train()
    logits_TE = gate(router, torch.tensor([[0.0, 1.0, 2.0]]).expand(20_000, -1))
    counts = torch.bincount(router(logits_TE).experts_TK.flatten(), minlength=3) / 20_000
    assert_close(counts, torch.tensor([0.0, 1.0, 2.0]).softmax(-1), atol=0.015, rtol=0)


def test_a_shared_layer_has_a_baseline_of_each_call():
    torch.manual_seed(0)
    layer = MoE(LayerSpec(4, 3), RLRouter)
    context, alone = RoutingContext(), RoutingContext()
    first, second, token_losses = torch.randn(5, 4), torch.randn(5, 4), torch.rand(5)
    layer(first, context)
    layer(second, context)
    layer(first, alone)
    values = [
        layer.router.feedback(published.routing, context, token_losses)["value"] for published in context.routings
    ]
    assert_close(values[0], layer.router.feedback(alone.routings[0].routing, alone, token_losses)["value"])
    assert values[0] != values[1]


def test_two_layers_have_a_baseline_each():
    layers, context = [MoE(LayerSpec(4, 3), RLRouter) for _ in range(2)], RoutingContext()
    x_TD, token_losses = torch.randn(5, 4), torch.rand(5)
    for layer in layers:
        layer(x_TD, context)
    for layer, published in zip(layers, context.routings, strict=True):
        value_T = layer.router.baseline(x_TD).squeeze(-1)
        loss = layer.router.feedback(published.routing, context, token_losses)["value"]
        assert_close(loss, (token_losses + value_T).square().mean() / 2)


def test_default_losses_of_the_policy_reach_the_loop():
    layer, context = MoE(LayerSpec(4, 3), RLRouter), RoutingContext()
    layer(torch.randn(5, 4), context)
    auxiliary_loss(layer, context, token_losses=torch.rand(5)).backward()
    assert all(parameter.grad is not None for parameter in layer.router.parameters())


@pytest.mark.parametrize("average", [ModelEmaV2, ModelEmaV3])
def test_averaged_thresholds_are_those_of_the_averaged_gate(average):
    torch.manual_seed(0)
    layer = MoE(d_model=16, num_experts=8, router=ExpertThresholdRouter)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    attach(layer, optimizer)
    averaged = average(layer, decay=0.9998)
    for _ in range(50):
        layer(torch.randn(64, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update(layer)
        copy_router_state(layer, averaged)
    context = RoutingContext()
    averaged.module.eval()(torch.randn(1000, 16), context)
    (routing,) = context.routings_of(averaged.module)
    assert 1.7 < routing.expert_load(8).sum() / 1000 < 2.3  # 8 where thresholds are averaged from 0


def test_a_threshold_that_no_batch_has_set_is_infinite_and_not_used():
    router = ExpertThresholdRouter(LayerSpec(4, 4), top_k=2).eval()
    assert router.thresholds_E.isinf().all()
    assert router(torch.randn(5, 4)).expert_load(4).sum() == 10
