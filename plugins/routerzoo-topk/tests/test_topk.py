"""TopKRouter against the DeepSeek-V3 block of transformers 5.23, and by hand."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from routerzoo_topk import PRESETS, HashFirstRouter, TopKRouter
from torch.testing import assert_close

from routerzoo import LayerSpec, MoE, RoutingContext, SwiGLUExperts
from routerzoo.testing import CHECKS, check_router


def close(ours, theirs):
    """Compare, and print the largest difference relative to the largest value."""
    assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    error = (ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12)
    print(f"largest relative error {error:.1e}, shape {list(theirs.shape)}")


VARIANTS = {
    "softmax": partial(TopKRouter),
    "DeepSeek-V3": partial(TopKRouter, score="sigmoid", bias_speed=1e-3, num_groups=4, top_groups=2, scale=2.5),
    "sqrt-softplus": partial(TopKRouter, score="sqrt_softplus", renormalize=False, bias=True),
    "jitter": partial(TopKRouter, renormalize=False, input_jitter=0.1),
    "V-MoE": partial(TopKRouter, renormalize=False, noise=True),
    "GShard": partial(TopKRouter, sample_choices=True),
    "quantile": partial(TopKRouter, score="sigmoid", quantile_balancing=True),
    "SimBal": partial(TopKRouter, orthogonal=True),
    "hash layer": partial(HashFirstRouter),
    "after the hash layers": partial(HashFirstRouter, hash_layers=0),
}
CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(variant, check):
    check_router(VARIANTS[variant], only=[check], examples=8)


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
    routing = context.routings[0]
    close(routing.logits_TE, golden["logits"])
    assert torch.equal(routing.experts_TK.sort(-1).values, golden["experts"].sort(-1).values)
    ours, theirs = (
        torch.zeros(len(e), num_experts).scatter(1, e, w)
        for e, w in ((routing.experts_TK, routing.weights_TK), (golden["experts"], golden["weights"]))
    )
    close(ours, theirs)
    close(output, golden["output"])
    close(layer.shared_experts.dense_forward(golden["hidden"].flatten(0, 1)).view_as(output), golden["shared_output"])


def test_bias_chooses_and_does_not_weigh():
    router = TopKRouter(LayerSpec(2, 3), top_k=1, score="sigmoid", renormalize=False)
    router.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    router.selection_bias.copy_(torch.tensor([0.0, 0.0, 0.5]))
    routing = router(torch.tensor([[1.0, 0.0]]))  # scores .731, .5, .5 and .5 with the bias 1
    assert routing.experts_TK.tolist() == [[2]]
    close(routing.weights_TK, torch.tensor([[0.5]]))


def test_bias_moves_against_the_load_once_per_step_without_padding():
    router = TopKRouter(LayerSpec(2, 2), top_k=1, bias_speed=0.1)
    router.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    x_TD = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    router(x_TD)  # two passes of gradient accumulation: loads 1, 2 and then, without padding, 1, 0
    router(x_TD, RoutingContext(padding_mask=torch.tensor([False, True, True])))
    router(x_TD[:1])
    assert router.load_E.tolist() == [3, 2]
    router.before_optimizer_step()
    close(router.selection_bias, torch.tensor([-0.1, 0.1]))
    router.eval()(x_TD)
    assert router.load_E.tolist() == [0, 0]


def test_groups_by_hand():
    router = TopKRouter(LayerSpec(4, 4), top_k=2, score="sigmoid", num_groups=2, top_groups=1)
    router.weight.data = torch.eye(4)
    # The best single expert is in group 0, the best pair in group 1.
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
        ({"quantile_balancing": True, "bias_speed": 0.1}, "quantile_balancing sets the bias by itself"),
        ({"input_jitter": 1.0}, "input_jitter must be at least 0 and below 1, got 1.0"),
        ({"score": "tanh"}, "score must be one of softmax, sigmoid, sqrt_softplus, got 'tanh'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TopKRouter(LayerSpec(8, 8), **arguments)


def test_quantile_balancing_by_hand():
    router = TopKRouter(LayerSpec(2, 2), top_k=1, quantile_balancing=True)
    router.weight.data = torch.eye(2)
    # Every token prefers expert 0, by 1, 2, 3 and 4: with alpha the second-best logit, expert 0's margins are those.
    x_TD = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0]])
    assert router(x_TD).experts_TK.flatten().tolist() == [0, 0, 0, 0]
    router.before_optimizer_step()
    close(router.selection_bias, torch.tensor([-2.0, 0.0]))  # the third largest margins: 2, and 0
    assert router(x_TD).experts_TK.flatten().tolist() in ([1, 0, 0, 0], [1, 1, 0, 0])  # the second is a tie
    router.before_optimizer_step()
    assert router.num_quantiles.item() == 0


def test_quantile_balancing_levels_the_load_and_leaves_padding_out():
    torch.manual_seed(0)
    router = TopKRouter(LayerSpec(16, 8), top_k=2, score="sigmoid", quantile_balancing=True, init_std=1.0)
    x_TD = torch.randn(512, 16) + torch.randn(16)
    mask = torch.arange(512) >= 256
    before = router(x_TD[:256]).expert_load(8)
    for _ in range(30):
        router.zero_grad()
        router(x_TD, RoutingContext(padding_mask=mask))
        router.before_optimizer_step()
    after = router.eval()(x_TD[:256]).expert_load(8)
    assert after.max() < 1.3 * 64 < before.max()
    bias = router.selection_bias.clone()
    router.train()(x_TD[:0])  # no token tells nothing
    router(x_TD, RoutingContext(padding_mask=torch.ones(512, dtype=torch.bool)))
    router.before_optimizer_step()
    assert torch.equal(router.selection_bias, bias)


def test_second_choice_is_kept_with_twice_its_weight():
    torch.manual_seed(0)
    router = TopKRouter(LayerSpec(2, 2), sample_choices=True)
    router.weight.data = torch.eye(2)
    x_TD = torch.tensor([[0.0, -1.0986]]).expand(4000, 2)  # weights 3/4 and 1/4
    routing = router(x_TD)
    assert (routing.experts_TK[:, 0] == 0).all()
    assert 0.46 < (routing.experts_TK[:, 1] == 1).float().mean() < 0.54
    assert (router.eval()(x_TD).experts_TK[:, 1] == 1).all()


def test_noise_and_losses_of_v_moe():
    torch.manual_seed(0)
    router = TopKRouter(LayerSpec(4, 2), top_k=1, renormalize=False, noise=True)
    router.weight.data.zero_()
    routing = router(torch.randn(4000, 4))
    assert 0.45 < (routing.experts_TK == 0).float().mean() < 0.55  # chosen by noise alone
    assert (routing.logits_TE == 0).all()
    assert routing.losses["importance"] == 0
    assert {"balance", "z", "importance", "load"} == set(routing.losses)


def test_orthogonality_by_hand():
    router = TopKRouter(LayerSpec(2, 2), orthogonal=True)
    close(router(torch.ones(1, 2)).losses["orthogonality"], torch.tensor(0.0))
    router.weight.data = torch.tensor([[1.0, 0.0], [1.0, 1.0]])  # W W^T = [[1, 1], [1, 2]]
    close(router(torch.ones(1, 2)).losses["orthogonality"], torch.tensor(3.0))


def test_hash_layers_come_first_and_are_scaled():
    spec = LayerSpec(4, 8, num_layers=4, vocab_size=5)
    routers = [HashFirstRouter(replace(spec, layer=layer)) for layer in range(4)]
    assert [router.trainable for router in routers] == [False, False, False, True]
    assert [router.requires for router in routers] == [frozenset({"token_ids"})] * 3 + [frozenset()]
    routing = routers[0](torch.randn(5, 4), RoutingContext(token_ids=torch.arange(5)))
    close(routing.weights_TK, torch.full((5, 2), 1.25))
    assert routers[3].router.score == "sqrt_softplus"


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_its_config(name):
    preset = PRESETS[name]
    options = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]["init_args"]
    assert options.get("loss_weights", {}) == preset.loss_weights
    smaller = {"deepseek-v3": {"top_k": 2, "num_groups": 4, "top_groups": 2}}.get(name, {})
    assert options["router"] == {"class_path": "TopKRouter", "init_args": {**preset.router, **smaller}}
    router = preset.build()(LayerSpec(preset.num_experts, preset.num_experts))
    assert router.top_k == preset.router["top_k"]


def test_more_experts_than_channels_cannot_be_orthogonal():
    with pytest.raises(ValueError, match="9 experts cannot be orthogonal in d_model = 8"):
        TopKRouter(LayerSpec(8, 9), orthogonal=True)
