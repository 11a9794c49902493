"""The gate's product as a GPU's tensor cores compute it: in bfloat16 parts, as exact as in float32."""

import pytest
import torch

from routerzoo.functional import gate, gate_linear
from routerzoo.functional.gate import three_part_product


def weights(kind):
    weight_ED = torch.randn(64, 512) * 0.02
    if kind == "nearly tied":
        weight_ED[1::2] = weight_ED[::2] * (1 + 1e-6)
    return weight_ED


@pytest.mark.parametrize("kind", ["random", "nearly tied"])
def test_three_parts_are_as_exact_as_float32(kind):
    x_TD, weight_ED = torch.randn(512, 512).bfloat16(), weights(kind)
    right_TE = x_TD.double() @ weight_ED.double().T
    error, usual, narrow = (
        float((product.double() - right_TE).abs().max())
        for product in (
            three_part_product(x_TD, weight_ED.T),
            x_TD.float() @ weight_ED.T,
            x_TD @ weight_ED.T.bfloat16(),
        )
    )
    assert error <= usual < 1e-2 * narrow


def test_gradients_in_parts(monkeypatch):
    monkeypatch.setattr(gate, "_on_tensor_cores", lambda x_TD, weight_ED: True)
    x_TD, weight_ED = torch.randn(128, 512).bfloat16().requires_grad_(), weights("random").requires_grad_()
    grad_TE, kept = torch.randn(128, 64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        logits_TE = gate_linear(x_TD, weight_ED)
    assert [(tensor.dtype, tensor.shape) for tensor in kept] == [
        (torch.bfloat16, x_TD.shape),
        (torch.float32, weight_ED.shape),
    ]
    grad_x, grad_weight = torch.autograd.grad(logits_TE, (x_TD, weight_ED), grad_TE)
    right_x = grad_TE.double() @ weight_ED.detach().double()
    right_weight = grad_TE.double().T @ x_TD.detach().double()
    assert float((grad_x - right_x).abs().max() / right_x.abs().max()) < 2**-8  # one rounding to bfloat16
    assert float((grad_weight - right_weight).abs().max() / right_weight.abs().max()) < 1e-6
