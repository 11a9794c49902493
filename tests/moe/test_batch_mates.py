"""What a served sequence has of the others in its batch: no routing, and its outputs to rounding."""

import pytest
import torch

from routerzoo import MoE
from tests.conftest import SPEC

SEQUENCES, LENGTH = 3, 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_mates_change_the_last_bits_of_outputs_and_nothing_of_the_routing(router_name, make_context, dtype):
    layer = MoE(SPEC, router=router_name).to(dtype).eval()
    assert layer.router.properties.batch_independent
    first_SD, ids_S = torch.randn(LENGTH, SPEC.d_model, dtype=dtype), torch.randint(SPEC.vocab_size, (LENGTH,))
    seen = []
    for scale in (0.1, 1.0, 10.0, 100.0):
        x_TD = torch.cat([first_SD, torch.randn((SEQUENCES - 1) * LENGTH, SPEC.d_model, dtype=dtype) * scale])
        context = make_context(SEQUENCES * LENGTH)
        context.token_ids[:LENGTH] = ids_S
        with torch.no_grad():
            y_SD = layer(x_TD, context)[:LENGTH]
        routing = context.routings[0].routing
        seen.append((y_SD, routing.experts_TK[:LENGTH], routing.weights_TK[:LENGTH]))
    alone_SD, experts_SK, weights_SK = seen[0]
    rounding = 2 * torch.finfo(dtype).eps
    for y_SD, experts, weights in seen[1:]:
        assert torch.equal(experts, experts_SK)
        assert torch.equal(weights, weights_SK)
        torch.testing.assert_close(y_SD, alone_SD, rtol=rounding, atol=rounding * float(alone_SD.abs().max()))
