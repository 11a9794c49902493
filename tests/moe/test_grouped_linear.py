from functools import partial

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from routerzoo import MLPExperts, MoE, SwiGLUExperts, grouped_linear
from routerzoo.moe import experts
from routerzoo.moe import grouped_linear as grouped
from routerzoo.moe.grouped_linear import BACKENDS, _BiasByRow, _expert_of_row

LOADS = {
    "even": [4, 4, 4, 4],
    "uneven": [1, 9, 0, 6],
    "one expert takes all": [0, 0, 16, 0],
    "empty at both ends": [0, 8, 8, 0],
}


def ends(loads):
    return torch.tensor(loads).cumsum(0).to(torch.int32)


def run(backend, loads, dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(loads), 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(len(loads), 24, 16, generator=generator).to(dtype).requires_grad_()
    b = torch.randn(len(loads), 24, generator=generator).to(dtype).requires_grad_() if bias else None
    y = grouped_linear(x, weight, ends(loads), b, backend)
    probe = torch.randn(y.shape, generator=generator).to(dtype)
    (y * probe).sum().backward()
    return [y.detach(), x.grad, weight.grad, *([b.grad] if bias else [])]


@pytest.mark.parametrize("loads", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "reference"])
@pytest.mark.parametrize("bias", [True, False])
def test_backends_agree_with_the_reference(backend, loads, bias):
    for got, expected in zip(run(backend, loads, bias=bias), run("reference", loads, bias=bias), strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("backend", ["grouped", "loop"])
def test_backends_agree_in_bfloat16(backend):
    expected = run("reference", LOADS["uneven"], torch.bfloat16)
    for got, value in zip(run(backend, LOADS["uneven"], torch.bfloat16), expected, strict=True):
        assert_close(got, value, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("loads", LOADS.values(), ids=LOADS)
def test_loop_passes_gradcheck(loads):
    x = torch.randn(sum(loads), 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(loads), 2, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(len(loads), 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: grouped_linear(a[0], a[1], ends(loads), a[2], "loop"), (x, weight, bias))


def test_no_rows_give_no_rows_and_zero_gradients():
    weight = torch.randn(4, 24, 16, requires_grad=True)
    y = grouped_linear(torch.empty(0, 16), weight, ends([0, 0, 0, 0]))
    assert y.shape == (0, 24)
    y.sum().backward()
    assert weight.grad.abs().sum() == 0


def test_auto_takes_widths_that_torch_does_not():
    x, weight = torch.randn(5, 7), torch.randn(2, 3, 7)
    assert_close(grouped_linear(x, weight, ends([2, 3])), grouped_linear(x, weight, ends([2, 3]), backend="reference"))
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        grouped_linear(x, weight, ends([2, 3]), backend="grouped")


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend must be one of"):
        grouped_linear(torch.randn(2, 4), torch.randn(1, 4, 4), ends([2]), backend="fast")


def test_autocast_reaches_the_grouped_product():
    x, weight = torch.randn(4, 16), torch.randn(2, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert grouped_linear(x, weight, ends([2, 2])).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("rows", "experts", "dtype", "chosen"),
    [
        (8, 64, torch.float32, "loop"),  # a row for every eighth expert
        (9, 64, torch.float32, "grouped"),
        (1, 8, torch.float32, "loop"),
        (2, 8, torch.bfloat16, "grouped"),
        (64, 8, torch.float64, "loop"),
    ],
)
def test_the_backend_is_chosen_by_shape_and_dtype(rows, experts, dtype, chosen):
    assert grouped._choose(torch.empty(rows, 16, dtype=dtype), torch.empty(experts, 32, 16, dtype=dtype)) == chosen


@pytest.mark.parametrize("backend", BACKENDS)
def test_flops_are_those_of_rows_that_belong_to_an_expert(backend):
    x = torch.randn(20, 16, requires_grad=True)
    weight = torch.randn(4, 24, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = grouped_linear(x, weight, ends([1, 9, 0, 6]), backend=backend)
        forward = counter.get_total_flops()
        (y[:16] * torch.randn(16, 24)).sum().backward()
    assert forward == 2 * 16 * 16 * 24
    assert counter.get_total_flops() == 3 * forward


@pytest.mark.parametrize("place", [FakeTensorMode, lambda: torch.device("meta")], ids=["fake", "meta"])
def test_flops_without_values_are_those_of_all_rows(place):
    with place(), FlopCounterMode(display=False) as counter:
        x, weight, offsets = torch.empty(20, 16), torch.empty(4, 24, 16), torch.empty(4, dtype=torch.int32)
        torch.ops.routerzoo.grouped_matmul(x, weight, offsets)
    assert counter.get_total_flops() == 2 * 20 * 16 * 24


def test_gated_activation_is_what_its_parts_are():
    gate_up = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    gate, up = gate_up.chunk(2, dim=-1)
    assert_close(experts._hidden_units(gate_up, 4, "silu"), torch.nn.functional.silu(gate) * up)
    assert torch.autograd.gradcheck(lambda x: experts._hidden_units(x, 4, "silu"), gate_up)
    assert torch.autograd.gradgradcheck(lambda x: experts._hidden_units(x, 4, "silu"), gate_up)


def layouts(matrix):
    """Return the same values, laid out as views leave them."""
    return {
        "contiguous": matrix,
        "transposed": matrix.mT.contiguous().mT,
        "every other column": torch.stack([matrix, matrix], -1)[..., 0],
        "rows of no 16 bytes": torch.nn.functional.pad(matrix, (0, 1))[..., :-1],
        "an odd offset": torch.cat([matrix.new_zeros(1), matrix.flatten()])[1:].view(matrix.shape),
    }


LAYOUTS = list(layouts(torch.zeros(1, 1)))
GRADIENTS = {name: lambda grad, name=name: layouts(grad)[name] for name in LAYOUTS} | {
    "a number, expanded": lambda grad: grad[:1, :1].expand_as(grad),
    "a row, expanded": lambda grad: grad[:1].expand_as(grad),
    "a column, expanded": lambda grad: grad[:, :1].expand_as(grad),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_values_count_and_not_how_they_lie_in_memory(backend, gradient):
    x, weight, bias, grad = torch.randn(16, 16), torch.randn(4, 24, 16), torch.randn(4, 24), torch.randn(16, 24)
    grad = GRADIENTS[gradient](grad)

    def gradients(x, weight, bias, grad, backend):
        leaves = [None if leaf is None else leaf.detach().requires_grad_() for leaf in (x, weight, bias)]
        y = grouped_linear(leaves[0], leaves[1], ends([1, 9, 0, 6]), leaves[2], backend)
        y.backward(grad)
        return [y.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]

    for b in (bias, None):
        expected = gradients(x, weight, b, grad.contiguous(), "reference")
        for of_x in layouts(x).values():
            for of_weight in layouts(weight).values():
                for got, value in zip(gradients(of_x, of_weight, b, grad, backend), expected, strict=True):
                    assert_close(got, value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("bank", [MLPExperts, SwiGLUExperts, partial(SwiGLUExperts, bias=True)])
def test_layers_take_any_layout_and_the_gradient_of_a_sum(bank, shared, backend):
    layer = MoE(d_model=16, num_experts=4, experts=bank, num_shared_experts=shared, backend=backend)
    x = torch.randn(6, 16)
    for loss in (torch.sum, torch.mean, lambda y: (y.T @ torch.ones(6, 3)).sum()):
        layer.zero_grad()
        loss(layer(x)).backward()
        expected = [parameter.grad for parameter in layer.parameters()]
        for laid_out in layouts(x).values():
            layer.zero_grad()
            loss(layer(laid_out)).backward()
            for got, value in zip(layer.parameters(), expected, strict=True):
                assert_close(got.grad, value)


def test_function_transforms_differentiate_the_grouped_product():
    x, weight = torch.randn(8, 16), torch.randn(2, 24, 16, requires_grad=True)

    def loss(weight):
        return grouped_linear(x, weight, ends([3, 5]), backend="grouped").square().sum()

    loss(weight).backward()
    assert_close(torch.func.grad(loss)(weight.detach()), weight.grad)


def test_biases_by_row_have_the_gradient_of_their_sum():
    bias = torch.randn(3, 2, requires_grad=True)
    expert_N = _expert_of_row(ends([1, 0, 2]), 5)  # of the last two rows none
    assert expert_N.tolist() == [0, 2, 2, 3, 3]
    by_row = _BiasByRow.apply(bias, expert_N)
    assert torch.equal(by_row[:3], bias[[0, 2, 2]])
    (grad,) = torch.autograd.grad(by_row, bias, torch.tensor([[1.0, 2], [3, 4], [5, 6], [70, 80], [90, 100]]))
    assert grad.tolist() == [[1, 2], [0, 0], [8, 10]]
