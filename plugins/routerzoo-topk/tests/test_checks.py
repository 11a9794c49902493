"""Every gate keeps the contract, also in bfloat16."""

from functools import partial

import pytest
import torch
from routerzoo_topk import (
    Gemma4Router,
    GShardRouter,
    HashFirstRouter,
    QuantileBalancingRouter,
    SimBalRouter,
    SparseMixerRouter,
    SwitchRouter,
    TopKRouter,
    VMoERouter,
)
from torch.testing import assert_close

from routerzoo import LayerSpec, RoutingContext
from routerzoo.testing import check_router

VARIANTS = {
    "softmax": TopKRouter,
    "DeepSeek-V3": partial(TopKRouter, score="sigmoid", bias_speed=1e-3, num_groups=4, top_groups=2, scale=2.5),
    "sqrt-softplus": partial(TopKRouter, score="sqrt_softplus", renormalize=False, bias=True),
    "Switch": partial(SwitchRouter, jitter=0.1),
    "GShard": GShardRouter,
    "V-MoE": VMoERouter,
    "quantile": QuantileBalancingRouter,
    "SimBal": SimBalRouter,
    "Gemma 4": Gemma4Router,
    "SparseMixer": SparseMixerRouter,
    "hash layer": HashFirstRouter,
    "after the hash layers": partial(HashFirstRouter, hash_layers=0),
}


# The first variant of each router but those of single models; the full tier has all.
FIRST = {getattr(router, "func", router): name for name, router in reversed(VARIANTS.items())}
FIRST = [name for router, name in FIRST.items() if router not in (Gemma4Router, SparseMixerRouter)]


@pytest.mark.parametrize("variant", FIRST)
def test_each_router(variant):
    check_router(VARIANTS[variant])


@pytest.mark.full
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(variant):
    check_router(VARIANTS[variant], examples=8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_rounds_the_inputs_alone(variant):
    router = VARIANTS[variant](LayerSpec(16, 8, layer=0, vocab_size=5)).eval()
    context = RoutingContext(token_ids=torch.arange(64) % 5)
    x_TD = torch.randn(64, 16).bfloat16()
    narrow, wide = router(x_TD, context), router(x_TD.float(), context)
    assert torch.equal(narrow.experts_TK, wide.experts_TK)
    assert narrow.weights_TK.dtype == torch.bfloat16
    assert_close(narrow.weights_TK, wide.weights_TK.bfloat16())
    rounded = {n: v.bfloat16() if v.is_floating_point() else v for n, v in router.state_dict().items()}
    router.load_state_dict(rounded)
    wide = router(x_TD.float(), context)
    router.load_state_dict(rounded, assign=True)
    narrow = router(x_TD, context)
    assert torch.equal(narrow.experts_TK, wide.experts_TK)
    assert_close(narrow.weights_TK, wide.weights_TK.bfloat16())
