"""Routers with a varying number of experts per token: conformance, and numbers by hand."""

from functools import partial

import pytest
import torch
from routerzoo_dynamic import BlockFFNRouter, DAMoERouter, DynMoLERouter, TopPRouter
from routerzoo_dynamic.dyn_mole import normalized_tsallis_entropy
from torch.testing import assert_close

from routerzoo import LayerSpec, MLPExperts, MoE, RoutingContext, auxiliary_loss
from routerzoo.moe.auxiliary_loss import loss_of
from routerzoo.testing import check_router

VARIANTS = {
    "top-p": TopPRouter,
    "top-p, high": partial(TopPRouter, threshold=0.9),
    "DynMoLE": DynMoLERouter,
    "DynMoLE, one expert is enough": partial(DynMoLERouter, min_experts=1, entropy_threshold=0.5, q=2.0),
    "BlockFFN": BlockFFNRouter,
    "BlockFFN, short chunks": partial(BlockFFNRouter, chunk_length=2),
    "DA-MoE": DAMoERouter,
    "DA-MoE, causal": partial(DAMoERouter, importance="spread"),
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


def with_logits(router, logits_TE):
    """Let hidden states be logits."""
    router.weight.data = torch.eye(logits_TE.shape[1])
    return logits_TE


def weights_of(routing):
    weights = torch.zeros_like(routing.logits_TE)
    weights[routing.token_N, routing.expert_N] = routing.weight_N
    return weights


def test_top_p_by_hand():
    router = TopPRouter(LayerSpec(4, 4), threshold=0.6)
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]])
    routing = router(with_logits(router, probs.log()))
    # The crossing expert is in; the weights are not renormalized; ties go to the first.
    expected = probs * torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]])
    assert_close(weights_of(routing), expected)
    assert_close(routing.losses["entropy"], torch.special.entr(probs).sum(1).mean())
    # f = 3/6, 2/6, 1/6, 0 of the choices; P = means of the columns.
    share = torch.tensor([3.0, 2.0, 1.0, 0.0]) / 6
    assert_close(loss_of("balance", routing, RoutingContext()), 4 * (share * probs.mean(0)).sum())


def test_a_threshold_of_one_takes_all_that_have_a_probability():
    router = TopPRouter(LayerSpec(4, 4), threshold=1.0)
    assert (weights_of(router(with_logits(router, torch.randn(5, 4)))) > 0).all()


def test_dyn_mole_by_hand():
    router = DynMoLERouter(LayerSpec(4, 4), threshold=0.8, entropy_threshold=0.95)
    probs = torch.tensor([[0.5, 0.25, 0.2, 0.05], [0.85, 0.05, 0.05, 0.05], [0.25, 0.25, 0.25, 0.25]])
    routing = router(with_logits(router, probs.log()))
    # The crossing expert is out; at least two; all at high entropy.
    expected = probs * torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    assert_close(weights_of(routing), expected)
    # Mean weights .533, .183, .083 and .083; mean probabilities .533, .183, .167 and .117.
    balance = 4 * (1.6 * 1.6 + 0.55 * 0.55 + 0.25 * 0.5 + 0.25 * 0.35) / 9
    assert_close(loss_of("weighted_balance", routing, RoutingContext()), torch.tensor(balance))


def test_tsallis_entropy_by_hand():
    uniform, certain = torch.full((1, 4), 0.25), torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    assert_close(normalized_tsallis_entropy(uniform, 1.1), torch.ones(1), atol=1e-3, rtol=0)
    assert_close(normalized_tsallis_entropy(certain, 1.1), torch.zeros(1), atol=1e-3, rtol=0)
    # q = 2 is the Gini impurity, 1 - sum p^2, over its largest value 3/4.
    half = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    assert_close(normalized_tsallis_entropy(half, 2.0), torch.tensor([0.5 / 0.75]), atol=1e-4, rtol=0)


def test_block_ffn_by_hand():
    router = BlockFFNRouter(LayerSpec(4, 4))
    router.gamma.data = torch.tensor([1.0, 2.0, 1.0, 1.0])
    logits = with_logits(router, torch.tensor([[3.0, 4.0, -1.0, 0.0], [-1.0, -1.0, -1.0, -1.0]]))
    routing = router(logits, RoutingContext(sequence_ids=torch.zeros(2, dtype=torch.int64)))
    # The root mean square of 3, 4, 0, 0 is 2.5.
    assert_close(weights_of(routing), torch.tensor([[1.2, 3.2, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    assert routing.token_N.tolist() == [0, 0]  # the other token has no expert


def test_block_ffn_losses_by_hand():
    router = BlockFFNRouter(LayerSpec(2, 2), chunk_length=2)
    logits = with_logits(router, torch.tensor([[1.0, -1.0], [1.0, 1.0], [1.0, -1.0], [-1.0, 0.0]]))
    ids = torch.tensor([0, 0, 0, 1])
    losses = router(logits, RoutingContext(sequence_ids=ids)).losses
    # Of the four pairs within a sequence two agree; the others cost 100 each.
    assert_close(losses["locality"], torch.tensor(50.0), atol=1e-3, rtol=0)
    # Chunks: tokens 0 and 1 need expert 0 surely and expert 1 by half; token 2 needs expert 0; token 3 none.
    assert_close(losses["chunk"], torch.tensor([1.0, 0.5, 1.0, 0.0, 0.0, 0.0]).sum() / 6)


def layers_of(router, **fields):
    """Route through three layers, and return them with their context."""
    torch.manual_seed(0)
    spec, context = LayerSpec(4, 4, num_layers=3), RoutingContext(**fields)
    layers = [MoE(spec, router, partial(MLPExperts, hidden_dim=4)) for _ in range(3)]
    for layer in layers:
        torch.nn.init.normal_(layer.router.weight)
        layer(torch.randn(6, 4), context)
    return layers, context


def test_block_ffn_averages_its_losses_over_layers():
    layers, context = layers_of(BlockFFNRouter, sequence_ids=torch.zeros(6, dtype=torch.int64))
    total = sum(1e-3 * p.routing.losses["locality"] + 5e-2 * p.routing.losses["chunk"] for p in context.routings)
    assert_close(auxiliary_loss(layers, context), total / 3)


def test_dyn_mole_takes_its_losses_over_the_tokens_of_all_layers():
    layers, context = layers_of(DynMoLERouter)
    probs = torch.cat([p.routing.logits_TE for p in context.routings]).softmax(-1)
    weights = torch.cat([weights_of(p.routing) for p in context.routings])
    balance = 4 * (weights.mean(0) * probs.mean(0)).sum()
    entropy = normalized_tsallis_entropy(probs, 1.1).mean()
    assert_close(auxiliary_loss(layers, context), 1e-3 * balance + 1e-2 * entropy)


def test_top_p_has_finite_gradients_where_probabilities_underflow():
    router = TopPRouter(LayerSpec(4, 4))
    logits = with_logits(router, torch.tensor([[200.0, 0.0, -200.0, 199.0]])).requires_grad_()
    entropy = router(logits).losses["entropy"]
    (gradient,) = torch.autograd.grad(entropy, logits)
    assert gradient.isfinite().all()
    # -p log p of the two that are left, sigmoid(1) and sigmoid(-1).
    assert_close(entropy, torch.tensor(0.582203), atol=1e-5, rtol=0)


@pytest.mark.parametrize("router", [TopPRouter, DynMoLERouter, BlockFFNRouter])
def test_bfloat16_hidden_states_are_routed_as_their_values_in_float32(router):
    router, x = router(LayerSpec(16, 8)), torch.randn(9, 16).bfloat16()
    context = RoutingContext(sequence_ids=torch.zeros(9, dtype=torch.int64))
    narrow, wide = router(x, context), router(x.float(), context)
    assert narrow.weight_N.dtype == torch.bfloat16
    assert torch.equal(narrow.logits_TE, wide.logits_TE)
    assert torch.equal(narrow.expert_N, wide.expert_N)


def test_hidden_states_that_are_nan_give_nan_weights():
    x = torch.randn(3, 8)
    x[1, 2] = torch.nan
    context = RoutingContext(sequence_ids=torch.zeros(3, dtype=torch.int64))
    for router in (TopPRouter, DynMoLERouter, BlockFFNRouter):
        routing = router(LayerSpec(8, 4))(x, context)
        assert routing.expert_N[routing.token_N == 1].tolist() == [0]
        assert routing.weight_N[routing.token_N == 1].isnan().all()


def test_losses_leave_padding_out():
    router = BlockFFNRouter(LayerSpec(4, 4), chunk_length=4)
    x_TD = torch.randn(6, 4)
    ids, mask = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([False, False, False, True, False, True])
    padded = router(x_TD, RoutingContext(sequence_ids=ids, padding_mask=mask)).losses
    alone = router(x_TD[~mask], RoutingContext(sequence_ids=ids[~mask])).losses
    for name, loss in padded.items():
        assert_close(loss, alone[name])


@pytest.mark.parametrize(
    ("router", "arguments", "message"),
    [
        (TopPRouter, {"threshold": 0.0}, "threshold must be above 0 and at most 1, got 0.0"),
        (DynMoLERouter, {"threshold": 1.5}, "threshold must be above 0 and at most 1, got 1.5"),
        (DynMoLERouter, {"min_experts": 0}, "min_experts must be at least 1, got 0"),
        (DynMoLERouter, {"q": 1.0}, "q must be above 0 and not 1, got 1.0"),
        (BlockFFNRouter, {"chunk_length": 0}, "chunk_length must be at least 1, got 0"),
    ],
)
def test_bad_arguments(router, arguments, message):
    with pytest.raises(ValueError, match=message):
        router(LayerSpec(8, 8), **arguments)


def attention_of(rows):
    attention = torch.tensor(rows).unsqueeze(1)
    tokens = torch.arange(len(rows))
    return RoutingContext(attention=attention, positions=tokens, sequence_ids=torch.zeros(len(rows)).long())


def test_tokens_that_get_attention_get_experts():
    router = DAMoERouter(LayerSpec(4, 4), top_k=4)
    logits_TE = with_logits(router, torch.tensor([[4.0, 3.0, 2.0, 1.0]] * 3))
    # Column sums 2.0, 0.9 and 0.1: shares of the largest are 1, 0.45 and 0.05.
    context = attention_of([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.4, 0.1]])
    routing = router(logits_TE, context)
    assert (routing.experts_TK >= 0).sum(1).tolist() == [4, 2, 1]
    assert_close(routing.weights_TK[1, :2], torch.tensor([4.0, 3.0]).softmax(-1))
    assert not router.causal


def test_tokens_that_attend_widely_get_experts():
    router = DAMoERouter(LayerSpec(4, 4), top_k=4, importance="spread")
    logits_TE = with_logits(router, torch.tensor([[4.0, 3.0, 2.0, 1.0]] * 3))
    # All attention to one token, half and half of two, and one token of three.
    context = attention_of([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
    assert (router(logits_TE, context).experts_TK >= 0).sum(1).tolist() == [1, 4, 1]


def test_an_unknown_importance_is_refused():
    with pytest.raises(ValueError, match="importance must be received or spread, got 'none'"):
        DAMoERouter(LayerSpec(4, 4), importance="none")
