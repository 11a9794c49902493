"""What a `LogitRouter` and a `RouterWrapper` declare by themselves, and what their class declares instead."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from routerzoo import ByMode, LayerSpec, LogitRouter, RouterWrapper
from routerzoo.testing import check_router


class Plain(LogitRouter):
    """A linear gate."""

    paper = "none"

    def __init__(self, spec, *, top_k: int = 2, renormalize: bool = True, scale: float = 1.0):
        super().__init__(spec, top_k=top_k, renormalize=renormalize, scale=scale)
        self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model))

    def logits(self, x_TD, context):
        return x_TD @ self.weight.T


class Doubled(Plain):
    """Doubles its weights in training, and declares it."""

    normalized = ByMode(training=False)
    trains_at_top_1 = False

    def combine_weights(self, logits_TE, experts_TK, *, may_drop=True):
        weights_TK = super().combine_weights(logits_TE, experts_TK, may_drop=may_drop)
        return weights_TK * 2 if self.training else weights_TK


class Learning(Plain):
    """Inherits from a class that declares."""

    normalized = False
    trains_at_top_1 = True


@pytest.mark.parametrize(
    ("arguments", "normalized", "trains_at_top_1"),
    [({}, True, False), ({"renormalize": False}, False, True), ({"scale": 2.0}, False, False)],
)
def test_properties_follow_from_renormalization_and_scale(arguments, normalized, trains_at_top_1):
    router = Plain(LayerSpec(4, 4), **arguments)
    assert router.properties.normalized == normalized
    assert router.properties.trains_at_top_1 == trains_at_top_1


def test_what_a_class_declares_stands():
    assert Doubled(LayerSpec(4, 4)).normalized == ByMode(training=False)
    assert type("Grandchild", (Doubled,), {})(LayerSpec(4, 4)).normalized == ByMode(training=False)
    learning = Learning(LayerSpec(4, 4))
    assert (learning.normalized, learning.trains_at_top_1) == (False, True)


class Unnormalized(RouterWrapper):
    """Halves the weights, and says so."""

    paper = "none"
    normalized = False

    def route(self, x_TD, context):
        routing = self.router.route(x_TD, context)
        return replace(routing, weights_TK=routing.weights_TK / 2)


def test_what_a_wrappers_class_declares_stands():
    wrapper = Unnormalized(LayerSpec(4, 4))
    assert not wrapper.normalized
    assert wrapper.trains_at_top_1 == wrapper.router.trains_at_top_1


def test_a_declaration_that_stands_is_checked():
    check_router(Doubled, only=["weights", "gradient_at_top_1"])
