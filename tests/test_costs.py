"""Costs against hand counts."""

from functools import partial

import pytest
import torch

from routerzoo import (
    HashRouter,
    HyperRouter,
    LanguageModeling,
    LayerSpec,
    LinearRouter,
    MoE,
    RoutingContext,
    StableMoERouter,
    moe_layers,
)
from routerzoo.costs import TrainedTokens, count_costs, short
from tests.tasks.test_tasks import vision


def test_costs_of_a_decoder_by_hand():
    d, length, experts, vocab, blocks = 64, 32, 8, 256, 2
    task = LanguageModeling(d_model=d, num_blocks=blocks, num_heads=4, num_experts=experts, max_length=length)
    costs = task.costs()
    router, expert = 2 * d * experts, 2 * 2 * (4 * d) * d
    attention = 2 * 4 * d * d + 2 * 2 * length * d
    assert costs.router_flops == blocks * router
    assert costs.flops == blocks * (attention + router + 2 * expert) + 2 * vocab * d
    sizes = (4 * d * d) * 2 + 4 * d + d
    assert costs.total - costs.active == blocks * (experts - 2) * sizes
    assert costs.total == costs.trainable == sum(p.numel() for p in task.parameters())


@pytest.mark.parametrize("low_memory", [False, True])
def test_experts_cost_the_same_as_one_operator(low_memory):
    """As they are computed on a GPU by default."""
    layer = MoE(d_model=16, num_experts=4, router=partial(LinearRouter, top_k=1), low_memory=low_memory)
    costs = count_costs(layer, lambda: len(layer(torch.randn(5, 16))))
    assert (costs.router_flops, costs.flops) == (2 * 16 * 4, 2 * 16 * 4 + 2 * 2 * 16 * 64)


@pytest.mark.parametrize("moe_blocks", ["all", [1], "none"])
def test_a_dense_model_of_equal_active_parameters_costs_less_by_the_router_alone(moe_blocks):
    sizes = {"d_model": 16, "num_blocks": 2, "num_heads": 2, "num_experts": 4, "max_length": 8}
    router = partial(LinearRouter, top_k=1)
    dense = LanguageModeling(**sizes, dense_width=1, moe_blocks="none", router=router).costs()
    moe = LanguageModeling(**sizes, dense_width=1, moe_blocks=moe_blocks, router=router).costs()
    layers = {"all": 2, "none": 0}.get(str(moe_blocks), 1)
    assert dense.router_flops == 0
    assert moe.router_flops == layers * 2 * 16 * 4
    assert moe.flops - moe.router_flops == dense.flops
    assert moe.active - dense.active == layers * 16 * 4


def test_what_stablemoes_record_says_is_what_its_models_cost():
    sizes = {"d_model": 128, "num_blocks": 4, "num_heads": 4, "num_experts": 16, "dense_width": 1, "max_length": 256}
    routers = [LinearRouter, HashRouter]
    models = [LanguageModeling(**sizes, moe_blocks="none")]
    models += [LanguageModeling(**sizes, moe_blocks=[2], router=partial(router, top_k=1)) for router in routers]
    costs = [model.costs() for model in models]
    assert [c.flops for c in costs] == [2_162_688, 2_166_784, 2_162_688]
    assert [c.active for c in costs] == [822_912, 824_960, 822_912]


def test_counting_leaves_everything_as_it_was():
    task = LanguageModeling(d_model=16, num_blocks=2, num_heads=2, num_experts=4, max_length=8, dropout=0.5)
    next(iter(moe_layers(task))).eval()
    modes = [module.training for module in task.modules()]
    state = torch.get_rng_state()
    task.costs()
    assert [module.training for module in task.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(layer.router._forward_hooks or layer.router._forward_pre_hooks for layer in moe_layers(task))


@pytest.mark.parametrize(
    ("router", "expected"),
    [
        (LinearRouter, 2 * 16 * 8),
        # Each pass, here of 5 tokens, generates the gate: 16 to 256 hidden units, and 8 * 17 numbers of these.
        (HyperRouter, 2 * 16 * 8 + 2 * (16 * 256 + 256 * 8 * 17) / 5),
        (StableMoERouter, 2 * 16 * 8 + 2 * 50 * 8),  # stage 1: gate and distilled router
    ],
)
def test_router_operations(router, expected):
    from routerzoo import RoutingContext

    layer = MoE(LayerSpec(16, 8, vocab_size=10), router)
    x_TD, context = torch.randn(5, 16), RoutingContext(token_ids=torch.arange(5))

    def run():
        layer(x_TD, context)
        return 5

    assert count_costs(layer, run).router_flops == expected


def test_costs_of_a_vision_transformer_grow_with_k_by_its_experts():
    task = vision("LinearRouter", eval_top_k=[1, 3])
    one, three = task.costs(0), task.costs(1)
    (layer,) = list(moe_layers(task))
    expert = sum(2 * p[0].numel() for name, p in layer.experts.named_parameters() if "bias" not in name)
    assert three.flops - one.flops == pytest.approx(2 * expert)
    assert three.active - one.active == 2 * sum(p[0].numel() for p in layer.experts.parameters())
    assert next(iter(moe_layers(task))).router.top_k == 2


def test_numbers_are_written_with_units():
    assert [short(n) for n in (12, 1200, 3_400_000, 5e9)] == ["12", "1.2 k", "3.4 M", "5.0 G"]


def test_what_training_takes_follows_k_by_hand():
    d, length, experts = 64, 32, 8
    sizes = {"d_model": d, "num_blocks": 2, "num_heads": 4, "num_experts": experts, "max_length": length}
    costs = LanguageModeling(**sizes, num_shared_experts=1).costs()
    assert costs.experts_per_token == 2
    assert costs.expert_flops == 2 * (2 * 2 * (4 * d) * d)
    router = partial(LinearRouter, top_k=5)
    at_5 = LanguageModeling(**sizes, num_shared_experts=1, router=router).costs()
    assert costs.training_flops(1000, 5.0) == at_5.training_flops(1000) == 3 * 1000 * at_5.flops
    dense = LanguageModeling(**sizes, moe_blocks="none").costs()
    assert (dense.experts_per_token, dense.expert_flops) == (None, 0.0)
    assert dense.training_flops(10) == 30 * dense.flops


def test_tokens_are_counted_without_padding_and_with_the_experts_that_they_chose():
    layer, trained = MoE(d_model=4, num_experts=4, router=partial(LinearRouter, top_k=3)), TrainedTokens()
    assert trained.k is None
    for mask in (None, torch.tensor([False, False, False, True])):
        context = RoutingContext(positions=torch.arange(4), padding_mask=mask)
        layer(torch.randn(4, 4), context)
        trained.add(context, processes=2)
    assert trained.numbers() == [14, 7.0, 21.0]
    assert trained.k == 3.0


def test_what_a_pass_computes_once_is_shared_by_the_examples_of_a_batch():
    sizes = {"d_model": 16, "num_blocks": 2, "num_heads": 2, "num_experts": 4, "max_length": 8}
    costs = LanguageModeling(**sizes, router=partial(HyperRouter, hidden_dim=32)).costs()
    generated = (
        2 * 2 * (16 * 32 + 32 * (4 * 16 + 4))
    )  # gates and biases of two layers, from an embedding by two matrices
    assert costs.once_flops * 8 == generated
    assert costs.training_flops(8 * 5, examples=5) == 3 * (5 * (8 * costs.flops - generated) + generated)
    assert LanguageModeling(**sizes).costs().once_flops == 0
