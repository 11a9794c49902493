"""8-bit experts, and what quantizers must skip."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from routerzoo import HyperRouter, LayerSpec, LinearRouter, MLPExperts, MoE, RoutingContext, SwiGLUExperts
from routerzoo.moe.quantization import modules_to_skip, quantize_experts


class Block(nn.Module):
    def __init__(self, experts, router):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.moe = MoE(LayerSpec(16, 4), router, experts, num_shared_experts=1, gate_shared_experts=True)
        self.head = nn.Linear(16, 16)

    def forward(self, x_TD, context):
        return self.head(x_TD + self.moe(self.norm(x_TD), context))


@pytest.mark.parametrize("experts", [SwiGLUExperts, partial(MLPExperts, bias=True)], ids=["swiglu", "mlp"])
@torch.no_grad()
def test_eight_bits_keep_the_routing(experts):
    torch.manual_seed(0)
    block = Block(experts, partial(LinearRouter, top_k=2)).eval()
    x_TD = torch.randn(64, 16)
    before, after = RoutingContext(), RoutingContext()
    expected_TD = block(x_TD, before)
    gate = block.moe.router.weight.clone()
    size = sum(p.numel() * p.element_size() for p in block.moe.experts.parameters() if p.ndim == 3)
    wanted = {name: p.clone() for name, p in block.moe.experts.named_parameters() if p.ndim == 3}
    quantize_experts(block)
    assert torch.equal(block.moe.router.weight, gate)
    y_TD = block(x_TD, after)
    assert torch.equal(before.routings[0].routing.experts_TK, after.routings[0].routing.experts_TK)
    assert torch.equal(before.routings[0].routing.weights_TK, after.routings[0].routing.weights_TK)
    for name, weight in wanted.items():
        largest = weight.abs().amax(-1, keepdim=True)
        assert ((getattr(block.moe.experts, name) - weight).abs() <= largest / 127 * 0.5001).all()
    assert_close(y_TD, expected_TD, rtol=0, atol=0.02 * expected_TD.std().item())
    stored = block.moe.experts.parametrizations
    codes = sum(bank.original0.numel() * bank.original0.element_size() for bank in stored.values())
    assert codes * 4 == size


def test_weights_that_are_integers_times_a_scale_are_kept_exactly():
    layer = MoE(LayerSpec(2, 1), partial(LinearRouter, top_k=1), partial(MLPExperts, hidden_dim=2)).eval()
    with torch.no_grad():
        layer.experts.up.copy_(torch.tensor([[[127.0, -3.0], [0.0, 0.0]]]) * 0.5)
    quantize_experts(layer)
    assert layer.experts.up.tolist() == [[[63.5, -1.5], [0.0, 0.0]]]
    assert not any(p.requires_grad for p in layer.experts.parameters())


def test_quantizers_are_told_what_to_skip():
    block = Block(SwiGLUExperts, HyperRouter)
    assert modules_to_skip(block) == ["moe.router", "moe.shared_gate"]
    block.moe.shared_expert_gate = nn.Linear(16, 1)  # as Qwen2-MoE calls its own
    assert modules_to_skip(block) == ["moe.router", "moe.shared_expert_gate", "moe.shared_gate"]


def test_what_cannot_be_quantized_is_said():
    with pytest.raises(ValueError, match="Linear has no MoE layer"):
        quantize_experts(nn.Linear(2, 2))
    block = Block(SwiGLUExperts, LinearRouter)
    quantize_experts(block)
    with pytest.raises(ValueError, match="quantized already"):
        quantize_experts(block)
