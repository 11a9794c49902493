"""Routers against numbers recorded from reference implementations; `tests/golden/README.md` says which.

`pytest -rP tests/routers/test_golden.py` shows the error of each comparison.
"""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from routerzoo import (
    Experts,
    HyperRouter,
    LayerSpec,
    LinearRouter,
    MoE,
    RandomFrozenRouter,
    RoutingContext,
    StableMoERouter,
    SwiGLUExperts,
    XMoERouter,
    grouped_linear,
)
from routerzoo.moe.auxiliary_loss import loss_of

FOLDER = Path(__file__).parents[1] / "golden"
TOLERANCE = 5e-6
"""About forty times the spacing of float32; what was seen is at most 8e-7."""


def close(ours, theirs):
    """Compare relative to the largest value of the tensor: what rounding does to a small one is up to the processor."""
    assert ours.shape == theirs.shape
    error = ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12)).item()
    print(f"largest error {error:.1e} of the largest value, shape {list(theirs.shape)}")
    assert error < TOLERANCE


def load(name):
    print(f"golden {name}")
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: torch.from_numpy(value.copy(order="C")) for key, value in file.items()}


def scattered(experts_TK, values_TK, num_experts):
    """Values by expert, so that the order of the choices does not matter."""
    return torch.zeros(len(experts_TK), num_experts).scatter(1, experts_TK, values_TK)


def check_topk_gate(router, golden):
    """Compare logits, experts, weights and the gradients of `sum(weights * probe)`."""
    num_experts = golden["logits"].shape[1]
    hidden = golden["hidden"].clone().requires_grad_()
    routing = router(hidden)
    close(routing.logits_TE, golden["logits"])
    assert torch.equal(routing.experts_TK.sort(-1).values, golden["experts"].sort(-1).values)
    weights = scattered(routing.experts_TK, routing.weights_TK, num_experts)
    close(weights, scattered(golden["experts"], golden["weights"], num_experts))
    (weights * scattered(golden["experts"], golden["probe"], num_experts)).sum().backward()
    close(hidden.grad, golden["grad_hidden"])


@pytest.mark.parametrize("name", ["hyperrouter_E8_k2", "hyperrouter_E16_k4"])
def test_hyperrouter(name):
    golden = load(name)
    spec = LayerSpec(golden["hidden"].shape[1], golden["logits"].shape[1])
    router = HyperRouter(spec, top_k=int(golden["top_k"]))
    own = {key: golden[key] for key in ("embedding", "hypernet_w1", "hypernet_b1", "hypernet_w2", "hypernet_b2")}
    router.load_state_dict({**router.state_dict(), **own})
    check_topk_gate(router, golden)
    close(router.embedding.grad, golden["grad_embedding"])


@pytest.mark.parametrize("name", ["smoe_dropout_E8_k2", "smoe_dropout_E16_k4"])
def test_random_frozen_router(name):
    golden = load(name)
    spec = LayerSpec(golden["hidden"].shape[1], golden["logits"].shape[1])
    router = RandomFrozenRouter(spec, top_k=int(golden["top_k"]))
    router.load_state_dict({**router.state_dict(), "weight": golden["weight"], "bias": golden["bias"]})
    check_topk_gate(router, golden)


@pytest.mark.parametrize("name", ["xmoe_cosine_E8_de4", "xmoe_cosine_E16_de8"])
def test_xmoe_router(name):
    golden = load(name)
    num_experts, routing_dim = golden["expert_embedding"].shape
    router = XMoERouter(LayerSpec(golden["hidden"].shape[1], num_experts), routing_dim=routing_dim)
    own = {"projection": golden["projection"], "expert_embedding": golden["expert_embedding"]}
    router.load_state_dict({**router.state_dict(), **own, "temperature": golden["temperature"].float()})
    hidden = golden["hidden"].clone().requires_grad_()
    logits = router(hidden).logits_TE
    close(logits, golden["logits"])
    (logits * golden["probe"]).sum().backward()
    close(hidden.grad, golden["grad_hidden"])
    close(router.projection.grad, golden["grad_projection"])
    close(router.expert_embedding.grad, golden["grad_expert_embedding"])


class NormedReLUExperts(Experts):
    """The experts of StableMoE's code, without their residual path: `W_2 relu(W_1 layernorm(x) + b_1) + b_2`."""

    def __init__(self, spec, golden):
        super().__init__(spec)
        for name in ("ff1_w", "ff1_b", "ff2_w", "ff2_b", "norm_w", "norm_b"):
            self.register_parameter(name, nn.Parameter(golden[name]))

    def forward(self, x_ND, ends_E):
        expert_N = torch.searchsorted(ends_E, torch.arange(len(x_ND), dtype=ends_E.dtype), right=True)
        normed = nn.functional.layer_norm(x_ND, x_ND.shape[1:]) * self.norm_w[expert_N] + self.norm_b[expert_N]
        hidden = grouped_linear(normed, self.ff1_w, ends_E, self.ff1_b, self.backend).relu()
        return grouped_linear(hidden, self.ff2_w, ends_E, self.ff2_b, self.backend)


@pytest.fixture
def stablemoe():
    golden = load("stablemoe_E4")
    spec = LayerSpec(golden["hidden"].shape[1], 4, vocab_size=len(golden["routing_embedding"]))
    layer = MoE(spec, StableMoERouter, lambda spec: NormedReLUExperts(spec, golden))
    names = {
        "expert_centroids": "expert_centroids",
        "routing_embedding": "routing_embedding",
        "distilled_centroids": "distill_centroids",
    }
    state = {**layer.router.state_dict(), **{ours: golden[theirs] for ours, theirs in names.items()}}
    layer.router.load_state_dict(state)
    return layer, golden


def run_stablemoe(layer, golden):
    """Return the hidden states, the layer's output with the residual path around it, and its routing."""
    hidden = golden["hidden"].clone().requires_grad_()
    context = RoutingContext(token_ids=golden["token_ids"])
    # `g * (x + F(x)) + (1 - g) * x` of the authors' code is `x + g * F(x)`.
    output = hidden + layer(hidden, context)
    return hidden, output, context.routings_of(layer)[0]


def test_stablemoe_stage_1_in_training(stablemoe):
    layer, golden = stablemoe
    hidden, output, routing = run_stablemoe(layer, golden)
    close(output, golden["stage1_train_output"])
    # The authors sum over tokens, without their factor of 0.3.
    close(routing.losses["balance"] * len(hidden), golden["stage1_train_balance"])
    close(routing.losses["distillation"] * len(hidden), golden["stage1_train_distill"])
    (output * golden["probe"]).sum().backward()
    close(hidden.grad, golden["stage1_train_grad_hidden"])
    close(layer.router.expert_centroids.grad, golden["stage1_train_grad_centroids"])
    assert layer.router.routing_embedding.grad is None


def test_stablemoe_stage_1_in_evaluation_routes_by_the_distilled_router(stablemoe):
    layer, golden = stablemoe
    layer.eval()
    _, output, _ = run_stablemoe(layer, golden)
    close(output, golden["stage1_eval_output"])


def test_stablemoe_stage_2(stablemoe):
    layer, golden = stablemoe
    layer.router.freeze_choices()
    hidden, output, routing = run_stablemoe(layer, golden)
    close(output, golden["stage2_train_output"])
    close(routing.losses["balance"], golden["stage2_train_balance"])
    close(routing.losses["distillation"], golden["stage2_train_distill"])
    (output * golden["probe"]).sum().backward()
    close(hidden.grad, golden["stage2_train_grad_hidden"])
    close(layer.router.expert_centroids.grad, golden["stage2_train_grad_centroids"])


def test_mixtral_block():
    golden = load("mixtral_block_E8_k2")
    num_experts, _, d_model = golden["experts_gate_up_proj"].shape
    hidden_dim = golden["experts_down_proj"].shape[2]
    spec = LayerSpec(d_model, num_experts)
    top_k = int(golden["top_k"])
    layer = MoE(spec, partial(LinearRouter, top_k=top_k), partial(SwiGLUExperts, hidden_dim=hidden_dim))
    layer.load_state_dict(
        {
            **layer.state_dict(),
            "router.weight": golden["gate_weight"],
            "experts.gate_up": golden["experts_gate_up_proj"],
            "experts.down": golden["experts_down_proj"],
        }
    )
    hidden = golden["hidden"].clone().requires_grad_()
    context = RoutingContext()
    output = layer(hidden, context)
    (routing,) = context.routings_of(layer)
    close(routing.logits_TE, golden["router_logits"])
    close(output, golden["output"])
    # transformers counts every one of the k choices: its minimum is k, ours 1.
    close(loss_of("balance", routing, context) * top_k, golden["load_balancing_loss"])
    (output * golden["probe"]).sum().backward()
    close(hidden.grad, golden["grad_hidden"])
    close(layer.router.weight.grad, golden["grad_gate_weight"])
