"""Routers compared from the same initial scale of their logits."""

import math

import pytest
import torch

from routerzoo import (
    HashRouter,
    HyperRouter,
    LanguageModeling,
    LayerSpec,
    LinearRouter,
    LogitRouter,
    RandomFrozenRouter,
    XMoERouter,
    moe_layers,
)
from routerzoo.errors import UserError
from routerzoo.routers.logit_scale import initial_logit_std, initial_logit_stds, match_logit_std
from tests.conftest import build_router

SPEC = LayerSpec(256, 16, layer=0, vocab_size=40)


@torch.no_grad()
def entropy(router):
    """Normalised entropy of the softmax over all experts, of hidden states N(0, 1)."""
    probs_TE = router.eval()(torch.randn(4000, router.spec.d_model)).logits_TE.softmax(-1)
    return float(torch.special.entr(probs_TE).sum(-1).mean()) / math.log(router.spec.num_experts)


def test_the_scale_of_initialisations_is_what_the_literature_review_found():
    # 0.02 * sqrt(256) = 0.32, and 1.21 with an entropy of 0.79 for the generated gate.
    assert initial_logit_std(RandomFrozenRouter(SPEC)) == pytest.approx(0.32, rel=0.05)
    assert entropy(RandomFrozenRouter(SPEC)) == pytest.approx(0.98, abs=0.01)
    hyper = HyperRouter(SPEC)
    assert initial_logit_std(hyper) == pytest.approx(1.21, rel=0.2)
    assert entropy(hyper) == pytest.approx(0.79, abs=0.08)


def test_every_router_with_logits_can_be_matched(router_name):
    router = build_router(router_name, SPEC)
    state = torch.get_rng_state()
    if initial_logit_std(router) is None:
        match_logit_std(router, 0.3)
        return
    for std in (0.3, 1.0):
        match_logit_std(router, std)
        assert initial_logit_std(router) == pytest.approx(std, rel=1e-3)
    assert torch.equal(torch.get_rng_state(), state)
    assert router.training


def test_matched_routers_start_with_the_same_entropy():
    routers = [cls(SPEC) for cls in (LinearRouter, RandomFrozenRouter, HyperRouter, XMoERouter)]
    for router in routers:
        match_logit_std(router, 0.8)
    entropies = [entropy(router) for router in routers]
    assert max(entropies) - min(entropies) < 0.02


def test_a_single_expert_and_a_router_without_logits_have_nothing_to_match():
    match_logit_std(LinearRouter(LayerSpec(8, 1), top_k=1), 0.3)
    assert initial_logit_std(HashRouter(SPEC)) is None


class Following(LogitRouter):
    """Takes its gate from the layer before, at half its scale."""

    def __init__(self, spec):
        super().__init__(spec)
        self.weight = torch.nn.Parameter(torch.randn(spec.num_experts, spec.d_model)) if spec.layer == 0 else None

    def logits(self, x_TD, context):
        gate = context.carry[self.spec.layer - 1] / 2 if self.weight is None else self.weight
        context.carry[self.spec.layer] = gate
        return x_TD @ gate.T

    def scale_initial_logits(self, factor):
        if self.weight is not None:
            super().scale_initial_logits(factor)


class Holding(LogitRouter):
    """Has a module named as gates are."""

    gate_name = "gate.weight"

    def __init__(self, spec):
        super().__init__(spec)
        self.gate = torch.nn.Linear(spec.d_model, spec.num_experts, bias=False)

    def logits(self, x_TD, context):
        return self.gate(x_TD)


def test_the_gate_of_a_module_is_scaled_and_one_that_is_not_named_is_asked_for(monkeypatch):
    router = Holding(SPEC)
    match_logit_std(router, 0.7)
    assert initial_logit_std(router) == pytest.approx(0.7, rel=1e-3)
    monkeypatch.setattr(Holding, "gate_name", LogitRouter.gate_name)
    with pytest.raises(NotImplementedError, match="Holding has no weight: set its class's gate_name"):
        match_logit_std(router, 0.7)


def test_later_layers_are_measured_after_the_earlier_ones_were_scaled():
    routers = [Following(LayerSpec(8, 4, layer=layer, num_layers=3)) for layer in range(3)]
    match_logit_std(routers, 0.8)
    assert initial_logit_stds(routers) == pytest.approx([0.8, 0.4, 0.2], rel=0.1)
    assert all(router.training for router in routers)


def test_tasks_match_every_layer():
    task = LanguageModeling(
        d_model=32, num_blocks=2, num_heads=2, num_experts=4, router=HyperRouter, initial_logit_std=0.5
    )
    assert [initial_logit_std(layer.router) for layer in moe_layers(task)] == pytest.approx([0.5, 0.5], rel=1e-3)


@pytest.mark.parametrize(
    ("std", "message"), [(0.0, "must be above 0, got 0.0"), (1e4, "the temperature would have to be")]
)
def test_what_cannot_be_reached_is_refused(std, message):
    with pytest.raises(ValueError, match=message):
        match_logit_std(XMoERouter(SPEC), std)
    with pytest.raises((UserError, ValueError), match=message):
        LanguageModeling(d_model=32, num_blocks=1, num_heads=2, router=XMoERouter, initial_logit_std=std)
