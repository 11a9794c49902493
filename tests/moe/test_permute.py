import pytest
import torch
from torch.testing import assert_close

from routerzoo.moe.permute import _sum_gathered, permutation_of, permute, sum_bags, unpermute

CASES = {
    "one each": ([0, 1, 2, 3], 1),
    "two each": ([0, 0, 1, 1, 2, 2], 2),
    "as they come": ([0, 0, 2, 2, 2, 4], None),
    "none": ([], None),
    "none of two each": ([], 2),
}


def example(case, dtype=torch.float64):
    tokens, top_k = CASES[case]
    token_N, num_tokens = torch.tensor(tokens, dtype=torch.int64), 5 if top_k is None else len(tokens) // top_k
    permutation = permutation_of(token_N, torch.randperm(len(tokens)), num_tokens, top_k)
    x_TD = torch.randn(num_tokens, 3, dtype=dtype, requires_grad=True)
    y_ND = torch.randn(len(tokens), 3, dtype=dtype, requires_grad=True)
    return permutation, x_TD, y_ND, torch.rand(len(tokens), dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_bags_are_what_indexing_is(case, dtype):
    permutation, x_TD, y_ND, weight_N = example(case, dtype)
    plain = permutation._replace(bags=None)
    for operation, inputs in ((permute, (x_TD,)), (unpermute, (y_ND, weight_N))):
        bagged, indexed = operation(*inputs, permutation), operation(*inputs, plain)
        tolerance = {"atol": 0.05, "rtol": 0.02} if dtype.itemsize == 2 else {}
        assert_close(bagged, indexed, **tolerance)
        probe = torch.randn_like(bagged)
        ours, theirs = (torch.autograd.grad(y, inputs, probe) for y in (bagged, indexed))
        for one, other in zip(ours, theirs, strict=True):
            assert_close(one, other, **tolerance)


@pytest.mark.parametrize("case", ["one each", "two each", "as they come"])
def test_gradients_can_be_differentiated(case):
    permutation, x_TD, y_ND, weight_N = example(case)
    assert torch.autograd.gradcheck(lambda x: permute(x, permutation), x_TD)
    assert torch.autograd.gradgradcheck(lambda x: permute(x, permutation), x_TD)
    assert torch.autograd.gradcheck(lambda y, w: unpermute(y, w, permutation), (y_ND, weight_N))
    assert torch.autograd.gradgradcheck(lambda y, w: unpermute(y, w, permutation), (y_ND, weight_N))


def test_a_token_without_assignments_gets_zeros():
    permutation, _, y_ND, weight_N = example("as they come")
    assert not unpermute(y_ND, weight_N, permutation)[[1, 3]].any()


@pytest.mark.parametrize("case", ["one each", "two each", "as they come"])
def test_a_gpu_sums_what_a_cpu_does(case):
    permutation, _, y_ND, weight_N = example(case)
    assert permutation.bags is not None
    for weights in (None, weight_N):
        expected = sum_bags(y_ND, *permutation.bags, weights)
        # In float32 where tokens have different numbers of experts.
        assert_close(_sum_gathered(y_ND, *permutation.bags, weights, permutation.top_k), expected, rtol=1e-6, atol=1e-6)
