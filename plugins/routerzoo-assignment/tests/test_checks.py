"""Every router that assigns jointly keeps the contract, also in bfloat16."""

from functools import partial

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
)
from torch.testing import assert_close

from routerzoo import LayerSpec, RoutingContext
from routerzoo.testing import check_router

VARIANTS = {
    "ExpertChoice": ExpertChoiceRouter,
    "ExpertChoice, with noise": partial(ExpertChoiceRouter, noise=1.0),
    "ExpertThreshold": ExpertThresholdRouter,
    "Sinkhorn": SinkhornRouter,
    "Sinkhorn, renormalized": partial(SinkhornRouter, renormalize=True, epsilon=0.1),
    "Sinkhorn, without noise": partial(SinkhornRouter, noise=0.0),
    "S-BASE": SBaseRouter,
    "S-BASE, per sequence": partial(SBaseRouter, scope="sequence"),
    "SSR, never": partial(SelectiveSinkhornRouter, probability=0.0),
    "SSR, always": partial(SelectiveSinkhornRouter, probability=1.0),
    "SSR-S, always, detached": partial(SelectiveSinkhornRouter, probability=1.0, scores="softmax"),
    "BASE": BaseLayerRouter,
    "RL-R": partial(RLRouter, value_dim=8),
    "RL-R, k = 2": partial(RLRouter, top_k=2, value_dim=8),
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


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_rounds_the_inputs_alone(variant, training):
    router = VARIANTS[variant](LayerSpec(16, 8)).train(training)
    x_TD = torch.randn(64, 16).bfloat16()

    def effect(x_TD):
        torch.manual_seed(0)
        pairs = router(x_TD, RoutingContext(sequence_ids=torch.arange(64) // 16)).assignments()
        weights_TE = torch.zeros(64, 9, dtype=x_TD.dtype)
        weights_TE[pairs.token_N, pairs.expert_N] = pairs.weight_N
        return weights_TE[:, :8]

    assert_close(effect(x_TD), effect(x_TD.float()).bfloat16())
    rounded = {n: v.bfloat16() if v.is_floating_point() else v for n, v in router.state_dict().items()}
    router.load_state_dict(rounded)
    wide = effect(x_TD.float())
    router.load_state_dict(rounded, assign=True)
    assert_close(effect(x_TD), wide.bfloat16())
