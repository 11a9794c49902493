"""Presets: their configs, and their coefficients beside their sources' formulas at any depth."""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from routerzoo_topk import PRESETS
from torch.testing import assert_close

from routerzoo import LayerSpec, LossWeight, MLPExperts, MoE, RoutingContext, auxiliary_loss
from routerzoo.functional.losses import balance_loss

CONFIGS = Path(__file__).parents[1] / "configs"
DEPTHS = [1, 4, 16]


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_its_config(name):
    preset = PRESETS[name]
    options = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]["init_args"]
    weights = {n: asdict(w) if isinstance(w, LossWeight) else w for n, w in preset.loss_weights.items()}
    assert options.get("loss_weights", dict(preset.router.default_loss_weights)) == weights
    smaller = {"deepseek-v3": {"top_k": 2, "num_groups": 4, "top_groups": 2}}.get(name, {})
    assert options["router"] == {
        "class_path": preset.router.__name__,
        "init_args": {**preset.arguments, **smaller},
    }
    router = preset.build()(LayerSpec(preset.num_experts, preset.num_experts))
    assert router.top_k == preset.arguments["top_k"]


def run(name, depth, num_experts):
    """Return the weighted auxiliary loss of a model with the preset's routers, and its routings."""
    torch.manual_seed(0)
    preset, sequences = PRESETS[name], torch.arange(24) // 8
    spec = LayerSpec(num_experts, num_experts)
    layers = [MoE(spec, preset.build(), partial(MLPExperts, hidden_dim=1)) for _ in range(depth)]
    context = RoutingContext(sequence_ids=sequences)
    for layer in layers:
        layer.router.weight.data *= 20
        layer(torch.randn(24, num_experts), context)
    loss = auxiliary_loss(layers, context, preset.loss_weights)
    return loss, [published.routing for published in context.routings]


def transformers_loss(logits, num_experts, top_k):
    """transformers' `load_balancing_loss_func`: the tokens of all layers together."""
    probs = torch.cat(logits).softmax(-1)
    mask = F.one_hot(probs.topk(top_k, dim=-1).indices, num_experts).float()
    return num_experts * (mask.mean(0) * probs.mean(0)).sum()


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(("name", "num_experts"), [("mixtral", 8), ("qwen3", 16)])
def test_transformers_coefficients(name, num_experts, depth):
    loss, routings = run(name, depth, num_experts)
    top_k = PRESETS[name].arguments["top_k"]
    expected = 0.001 * transformers_loss([r.logits_TE for r in routings], num_experts, top_k)
    assert_close(loss, expected)


@pytest.mark.parametrize("depth", DEPTHS)
def test_megablocks_coefficients(depth):
    loss, routings = run("olmoe", depth, 64)
    counts = torch.cat([r.expert_load(64) for r in routings])
    scores = torch.cat([r.logits_TE.softmax(-1) for r in routings], dim=1).mean(0)
    balance = 64 * 0.01 / (depth * 24 * 8) * torch.dot(counts, scores)
    z = 0.001 * torch.stack([r.logits_TE.logsumexp(-1).square().mean() for r in routings]).mean()
    assert_close(loss, balance + z)


@pytest.mark.parametrize("depth", DEPTHS)
def test_summed_coefficients(depth):
    loss, routings = run("switch", depth, 8)
    each = [balance_loss(r.logits_TE.softmax(-1), r.experts_TK) for r in routings]
    assert_close(loss, 0.01 * sum(each))
    loss, routings = run("v-moe", depth, 8)
    importance = [r.clean_logits_TE.softmax(-1).sum(0) for r in routings]
    kth = [r.logits_TE.topk(2, dim=-1).values[:, 1:] for r in routings]
    normal = torch.distributions.Normal(0.0, 1 / 8)
    load = [normal.cdf(r.clean_logits_TE - k).sum(0) for r, k in zip(routings, kth, strict=True)]
    expected = sum(0.005 * v.var(correction=0) / v.mean().square() for v in [*importance, *load])
    assert_close(loss, expected)
    loss, routings = run("deepseek-v3", depth, 256)
    expected = 0.0
    for scores in (r.logits_TE.sigmoid().view(3, 8, 256) for r in routings):  # in each of three sequences
        counts = torch.zeros_like(scores).scatter(2, scores.topk(8, dim=-1).indices, 1.0).sum(1)
        probs = (scores / scores.sum(-1, keepdim=True)).mean(1)
        expected += 0.0001 * (256 / (8 * 8) * counts * probs).sum(-1).mean()
    assert_close(loss, expected)


@pytest.mark.parametrize(("over_layers", "expected"), [("pooled", 0.01), ("mean", 0.02), ("sum", 0.04)])
def test_two_collapsed_layers_by_hand(over_layers, expected):
    # All tokens go to expert 0 in one layer, and to expert 1 in the other: 2 in each, but 1 of the tokens together.
    layers = [MoE(LayerSpec(1, 2), partial(PRESETS["switch"].build(), jitter=0.0)) for _ in range(2)]
    context = RoutingContext()
    for layer, sign in zip(layers, (50.0, -50.0), strict=True):
        layer.router.weight.data = torch.tensor([[sign], [-sign]])
        layer(torch.ones(4, 1), context)
    loss = auxiliary_loss(layers, context, {"balance": LossWeight(0.01, over_layers)})
    assert_close(loss, torch.tensor(expected))
