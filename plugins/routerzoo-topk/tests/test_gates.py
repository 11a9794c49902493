"""The gates of Switch, GShard, V-MoE and SimBal, hash layers and quantile balancing, by hand."""

from dataclasses import replace

import pytest
import torch
from routerzoo_topk import (
    GShardRouter,
    HashFirstRouter,
    QuantileBalancingRouter,
    SimBalRouter,
    SwitchRouter,
    VMoERouter,
)
from torch.testing import assert_close

from routerzoo import LayerSpec, RoutingContext
from routerzoo.functional.losses import balance_loss
from routerzoo.moe.auxiliary_loss import loss_of
from routerzoo.router import UnmetRequirementError


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_jitter_moves_the_input_of_the_gate_in_training(dtype):
    router = SwitchRouter(LayerSpec(1, 2), jitter=0.1)
    router.weight.data = torch.tensor([[1.0], [0.0]])
    logits_T = router(torch.full((4000, 1), 2.0, dtype=dtype)).logits_TE[:, 0]
    assert 1.8 <= logits_T.min() < 1.81
    assert 2.19 < logits_T.max() <= 2.2
    assert len(logits_T.unique()) > 3000  # not rounded to bfloat16
    assert (router.eval()(torch.full((4, 1), 2.0, dtype=dtype)).logits_TE[:, 0] == 2.0).all()


def test_switch_weights_by_the_probability():
    router = SwitchRouter(LayerSpec(2, 2)).eval()
    router.weight.data = torch.eye(2)
    assert_close(router(torch.tensor([[1.0, 3.0]])).weights_TK, torch.sigmoid(torch.tensor([[2.0]])))


def test_second_choice_is_kept_with_twice_its_weight():
    router = GShardRouter(LayerSpec(2, 2))
    router.weight.data = torch.eye(2)
    x_TD = torch.tensor([[0.0, -1.0986]]).expand(4000, 2)  # weights 3/4 and 1/4
    routing = router(x_TD)
    assert (routing.experts_TK[:, 0] == 0).all()
    assert 0.46 < (routing.experts_TK[:, 1] == 1).float().mean() < 0.54
    assert_close(routing.weights_TK[:, 0], torch.full((4000,), 0.75), atol=1e-4, rtol=0)
    assert (routing.weights_TK[:, 1][routing.experts_TK[:, 1] < 0] == 0).all()
    # Losses count what was selected: both experts for each token.
    assert_close(loss_of("balance", routing, RoutingContext()), torch.tensor(1.0))
    assert (router.eval()(x_TD).experts_TK[:, 1] == 1).all()
    assert router.properties.normalized
    assert not router.train().properties.normalized


def test_noise_and_losses_of_v_moe():
    router = VMoERouter(LayerSpec(4, 2), top_k=1)
    router.weight.data.zero_()
    context = RoutingContext()
    routing = router(torch.randn(4000, 4), context)
    assert 0.45 < (routing.experts_TK == 0).float().mean() < 0.55  # selected by noise alone
    assert (routing.clean_logits_TE == 0).all()
    assert 0.48 < routing.logits_TE.std() < 0.52
    assert loss_of("importance", routing, context) == 0
    # Phi(-threshold / std) of two independent draws: the same for both experts.
    assert loss_of("load", routing, context) == 0
    expected = balance_loss(routing.logits_TE.softmax(-1), routing.experts_TK)
    assert_close(loss_of("balance", routing, context), expected)
    assert router.eval()(torch.randn(4, 4)).clean_logits_TE is None


def test_orthogonality_by_hand():
    router, context = SimBalRouter(LayerSpec(2, 2)), RoutingContext()
    assert_close(router(torch.ones(1, 2)).losses["orthogonality"], torch.tensor(0.0), atol=1e-6, rtol=0)
    router.weight.data = torch.tensor([[1.0, 0.0], [1.0, 1.0]])  # W W^T = [[1, 1], [1, 2]]
    assert_close(loss_of("orthogonality", router(torch.ones(1, 2)), context), torch.tensor(3.0))


def test_more_experts_than_channels_cannot_be_orthogonal():
    with pytest.raises(ValueError, match="9 experts cannot be orthogonal in d_model = 8"):
        SimBalRouter(LayerSpec(8, 9))


def test_a_jitter_of_everything_is_refused():
    with pytest.raises(ValueError, match=r"jitter must be at least 0 and below 1, got 1\.0"):
        SwitchRouter(LayerSpec(8, 8), jitter=1.0)


def test_hash_layers_come_first_and_weight_by_a_gate():
    spec = LayerSpec(4, 8, num_layers=4, vocab_size=5)
    routers = [HashFirstRouter(replace(spec, layer=layer)) for layer in range(4)]
    assert [router.trainable for router in routers] == [True] * 4
    assert [router.normalized for router in routers] == [False] * 4
    assert [router.needs_updates for router in routers] == [False, False, False, True]
    assert [router.requires for router in routers] == [frozenset({"token_ids"})] * 3 + [frozenset()]
    assert not torch.equal(routers[0].table, routers[1].table)
    routing = routers[0](torch.randn(5, 4), RoutingContext(token_ids=torch.arange(5)))
    assert torch.equal(routing.experts_TK, routers[0].table[:, :2])
    scores_TK = torch.nn.functional.softplus(routing.logits_TE).sqrt().gather(1, routing.experts_TK)
    assert_close(routing.weights_TK, 1.5 * scores_TK / scores_TK.sum(-1, keepdim=True))
    assert routers[3].router.score_fn == "sqrt_softplus"
    with pytest.raises(NotImplementedError, match="select experts by token ids"):
        routers[0].select_experts(routing.logits_TE)
    assert torch.equal(routers[3].select_experts(routing.logits_TE), routing.logits_TE.topk(2).indices)


def test_hash_layers_need_the_index_of_their_layer():
    spec = LayerSpec(4, 8, vocab_size=5)
    with pytest.raises(UnmetRequirementError, match="requires layer"):
        HashFirstRouter(spec)
    assert HashFirstRouter(spec, hash_layers=0).trainable


def update(router, x_TD, context=None):
    """Take a step of training."""
    context = RoutingContext() if context is None else context
    router.update(router.statistics(router(x_TD, context), context))


def test_quantile_balancing_by_hand():
    router = QuantileBalancingRouter(LayerSpec(2, 2), top_k=1)
    router.weight.data = torch.eye(2)
    # Every token prefers expert 0, by 1, 2, 3 and 4: with alpha the second-best logit, expert 0's margins are those.
    x_TD = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0]])
    assert router(x_TD).experts_TK.flatten().tolist() == [0, 0, 0, 0]
    update(router, x_TD)
    # The third largest margins, 2 and 0, without their mean.
    assert_close(router.selection_bias, torch.tensor([-1.0, 1.0]))
    assert router(x_TD).experts_TK.flatten().tolist() in ([1, 0, 0, 0], [1, 1, 0, 0])  # the second is a tie


def test_quantiles_are_averaged_over_gradient_accumulation():
    router = QuantileBalancingRouter(LayerSpec(2, 2), top_k=1)
    router.weight.data = torch.eye(2)
    x_TD = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0]])
    first, second = (router.statistics(router(x), RoutingContext()) for x in (x_TD, 2 * x_TD))
    router.update({name: first[name] + second[name] for name in first})
    assert_close(router.selection_bias, torch.tensor([-1.5, 1.5]))  # 3, between 2 and 4, and 0


@torch.no_grad()
def test_the_bias_of_quantile_balancing_does_not_drift():
    router = QuantileBalancingRouter(LayerSpec(16, 8), top_k=2, init_std=1.0)
    for _ in range(200):
        update(router, torch.randn(64, 16))
        assert abs(float(router.selection_bias.mean())) < 1e-5
    assert router.selection_bias.abs().max() < 10  # without re-centering 58, and growing


def test_quantile_balancing_levels_the_load_and_leaves_padding_out():
    router = QuantileBalancingRouter(LayerSpec(16, 8), top_k=2, init_std=1.0)
    x_TD = torch.randn(512, 16) + torch.randn(16)
    mask = torch.arange(512) >= 256
    before = router(x_TD[:256]).expert_load(8)
    for _ in range(30):
        update(router, x_TD, RoutingContext(padding_mask=mask))
    after = router.eval()(x_TD[:256]).expert_load(8)
    assert after.max() < 1.3 * 64 < before.max()
    bias = router.selection_bias.clone()
    update(router, x_TD[:0])  # no token tells nothing
    update(router, x_TD, RoutingContext(padding_mask=torch.ones(512, dtype=torch.bool)))
    assert torch.equal(router.selection_bias, bias)


def test_where_all_experts_are_selected_there_is_nothing_to_balance():
    router = QuantileBalancingRouter(LayerSpec(4, 2), top_k=2)
    update(router, torch.randn(8, 4))
    assert not router.selection_bias.any()
