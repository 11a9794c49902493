"""Products of 16-bit matrices that are computed in float32."""

import pytest
import torch
from torch.testing import assert_close

from routerzoo import grouped_linear
from routerzoo.moe import cpu_upcast as widening
from routerzoo.moe import grouped_linear as grouped
from routerzoo.moe.cpu_upcast import CHUNK, FEWEST_ROWS, FEWEST_ROWS_PER_EXPERT, Widening

ROWS = [1, CHUNK - 1, CHUNK, 2 * CHUNK + 3]
DTYPES = list(FEWEST_ROWS)


def draw(*shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_rounded_once(rows, dtype, transposed):
    x, grad = draw(rows, 24, dtype=dtype), draw(rows, 40, dtype=dtype)
    weight = draw(24, 40, dtype=dtype).T if transposed else draw(40, 24, dtype=dtype)
    y, weight_grad = torch.empty(rows, 40, dtype=dtype), torch.empty(40, 24, dtype=dtype)
    widened = Widening(weight, len(x))
    for _ in range(2):  # the second time with what the first has left in its memory
        widened.multiply(x, weight, y)
        assert_close(y, (x.double() @ weight.double().T).to(dtype))
        if not transposed:
            widened.weight_grad(grad, x, weight_grad)
            assert_close(weight_grad, (grad.double().T @ x.double()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_an_overflow_left_in_memory_does_not_count(dtype):
    weight, x = torch.full((8, 8), float("nan"), dtype=dtype), torch.ones(16, 8, dtype=dtype)
    widened, grad = Widening(weight, len(x)), torch.empty(8, 8, dtype=dtype)
    widened.multiply(x, weight, torch.empty(16, 8, dtype=dtype))
    widened.weight_grad(x, x, grad)
    assert_close(grad, torch.full_like(grad, 16.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loads", [[300, 0, 9, 1], [0, 310, 0, 0], [80, 75, 80, 75]])
def test_the_loop_agrees_with_the_reference_wherever_it_widens(monkeypatch, loads, dtype):
    monkeypatch.setattr(grouped, "widens", lambda device_type, dtype: True)
    ends = torch.tensor(loads).cumsum(0).int()
    outcomes = []
    for backend, kind in (("loop", dtype), ("reference", torch.float64)):
        x, weight, bias = (
            draw(*shape, dtype=dtype).to(kind).requires_grad_() for shape in ((310, 16), (4, 24, 16), (4, 24))
        )
        y = grouped_linear(x, weight, ends, bias, backend)
        y.backward(draw(310, 24, dtype=dtype).to(kind))
        outcomes.append([y.detach(), x.grad, weight.grad, bias.grad])
    for got, expected in zip(*outcomes, strict=True):
        # The bias is added in 16 bits.
        assert_close(got, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0.05)


def test_it_is_chosen_where_rows_are_many_and_instructions_lack(monkeypatch):
    def chosen(rows):
        weight = torch.empty(8, 32, 16, dtype=torch.bfloat16)
        return grouped._choose(torch.empty(rows, 16, dtype=torch.bfloat16), weight)

    many = 8 * FEWEST_ROWS_PER_EXPERT[torch.bfloat16]
    monkeypatch.setattr(grouped, "widens", lambda device_type, dtype: dtype == torch.bfloat16)
    assert [chosen(many), chosen(many - 1)] == ["loop", "grouped"]
    monkeypatch.setattr(grouped, "widens", lambda device_type, dtype: False)
    assert chosen(many) == "grouped"


def test_only_16_bit_tensors_of_a_cpu_are_widened():
    assert not widening.widens("cpu", torch.float32)
    assert not widening.widens("cuda", torch.bfloat16)


def test_the_callers_default_dtype_is_not_ours():
    weight, x = draw(8, 16, dtype=torch.bfloat16), draw(64, 16, dtype=torch.bfloat16)
    y = torch.empty(64, 8, dtype=torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    try:
        widened = Widening(weight, len(x))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {memory.dtype for memory in (widened._weight, widened._x_MI, widened._y_MO)} == {torch.float32}
    widened.multiply(x, weight, y)
    assert_close(y, (x.double() @ weight.double().T).to(torch.bfloat16))


def test_two_dtypes_are_refused_with_many_rows_as_with_few():
    weight = torch.randn(1, 8, 16, dtype=torch.bfloat16)
    for rows in (1, 64):
        with pytest.raises(RuntimeError, match="dtype"):
            grouped_linear(torch.randn(rows, 16), weight, torch.tensor([rows], dtype=torch.int32), backend="loop")
