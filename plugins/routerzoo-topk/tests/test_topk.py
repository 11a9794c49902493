"""TopKRouter against the DeepSeek-V3 block of transformers 5.23, and by hand."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from routerzoo_topk import TopKRouter
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
}


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
    close(layer.shared_experts.all_experts(golden["hidden"].flatten(0, 1)).view_as(output), golden["shared_output"])


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
        ({"score": "tanh"}, "score must be one of softmax, sigmoid, sqrt_softplus, got 'tanh'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TopKRouter(LayerSpec(8, 8), **arguments)
