import pytest
import torch
from torch.testing import assert_close

from routerzoo import LayerSpec, Routing


def test_a_spec_refuses_sizes_below_one():
    with pytest.raises(ValueError, match="num_experts must be at least 1, got 0"):
        LayerSpec(8, 0)
    with pytest.raises(ValueError, match=r"num_experts must be a whole number, got 2.5"):
        LayerSpec(8, 2.5)


def test_a_spec_refuses_fields_that_no_context_has():
    with pytest.raises(ValueError, match="no context field is called colour"):
        LayerSpec(8, 2, provides=frozenset({"colour"}))


def test_a_routing_has_exactly_one_form():
    experts_TK = torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="exactly one form"):
        Routing(experts_TK)
    with pytest.raises(ValueError, match="exactly one form"):
        Routing(experts_TK, torch.ones(2, 1), token_N=experts_TK[0], expert_N=experts_TK[0], weight_N=torch.ones(1))
    with pytest.raises(ValueError, match="exactly one form"):
        Routing()


def test_sparse_routings_give_their_assignments():
    routing = Routing(torch.tensor([[3, 1], [0, -1]]), torch.tensor([[0.7, 0.3], [1.0, 0.0]]))
    token_N, expert_N, weight_N, top_k, may_drop = routing.assignments()
    assert token_N.tolist() == [0, 0, 1, 1]
    assert expert_N.tolist() == [3, 1, 0, -1]
    assert_close(weight_N, torch.tensor([0.7, 0.3, 1.0, 0.0]))
    assert (top_k, may_drop) == (2, True)


def test_load_counts_assignments_and_leaves_padding_out():
    routing = Routing(torch.tensor([[3, 1], [0, -1], [1, 3]]), torch.ones(3, 2))
    assert routing.expert_load(4).tolist() == [1, 2, 0, 2]


def test_load_of_a_dense_routing_is_its_slots():
    dense = torch.rand(2, 5, 3, 4)
    assert Routing(dispatch_GSEP=dense, combine_GSEP=dense).expert_load(3).tolist() == [8, 8, 8]
