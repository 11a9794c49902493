"""Initial values."""

import pytest
import torch
from torch.testing import assert_close

from routerzoo.functional.initialization import orthogonal


@pytest.fixture(params=[torch.bfloat16, torch.float32, torch.float64], ids=str)
def dtype(request):
    usual = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(usual)


def test_rows_are_orthonormal_or_columns_in_any_default_dtype(dtype):
    digits = {torch.bfloat16: 2e-2, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    wide, tall = orthogonal(3, 8, gain=0.5), orthogonal(8, 3)
    assert wide.dtype == tall.dtype == dtype
    assert_close((wide @ wide.T).double(), 0.25 * torch.eye(3, dtype=torch.float64), atol=digits, rtol=0)
    assert_close((tall.T @ tall).double(), torch.eye(3, dtype=torch.float64), atol=digits, rtol=0)


def test_values_are_those_of_torch_in_float32():
    torch.manual_seed(0)
    drawn = orthogonal(4, 6, gain=0.1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.nn.init.orthogonal_(torch.empty(4, 6), gain=0.1))
