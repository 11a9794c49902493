import math

import pytest
import torch

from routerzoo import Routing
from routerzoo.bench.routings import chosen_experts, correlation, first_choices, normalized_mutual_information


def test_the_first_choice_is_the_expert_of_the_largest_weight():
    experts_TK = torch.tensor([[3, 1], [2, 0], [-1, 5], [-1, -1]])
    weights_TK = torch.tensor([[0.5, 0.5], [0.1, -0.9], [0.0, 0.2], [0.0, 0.0]])
    assert first_choices(Routing(experts_TK, weights_TK), 4).tolist() == [3, 0, 5, -1]
    assert chosen_experts(Routing(experts_TK, weights_TK), 4).tolist() == [2, 2, 1, 0]


def test_the_first_choice_of_assignments():
    routing = Routing(
        token_N=torch.tensor([0, 0, 2, 3]),
        expert_N=torch.tensor([1, 2, 0, -1]),
        weight_N=torch.tensor([0.7, 0.3, 0.2, 0.9]),
    )
    assert first_choices(routing, 4).tolist() == [1, -1, 0, -1]
    assert chosen_experts(routing, 4).tolist() == [2, 0, 1, 0]


def test_the_first_choice_of_slots_and_of_merged_experts():
    combine_GSEP = torch.tensor([[[[0.1, 0.2], [0.6, 0.1]], [[0.5, 0.3], [0.1, 0.1]]]])
    assert first_choices(Routing(dispatch_GSEP=combine_GSEP, combine_GSEP=combine_GSEP), 2).tolist() == [1, 0]
    merged = Routing(merge_GE=torch.tensor([[0.2, 0.8], [0.9, 0.1]]), group_T=torch.tensor([1, 0, -1]))
    assert first_choices(merged, 3).tolist() == [0, 1, -1]


def test_mutual_information_by_hand():
    domain_T = torch.tensor([0, 0, 1, 1])
    assert normalized_mutual_information(domain_T, torch.tensor([2, 2, 0, 0]), 3) == pytest.approx(1.0)
    assert normalized_mutual_information(domain_T, torch.tensor([0, 1, 0, 1]), 3) == pytest.approx(0.0)
    # Experts split one domain: they tell it still.
    assert normalized_mutual_information(domain_T, torch.tensor([0, 1, 2, 2]), 3) == pytest.approx(1.0)
    # Three tokens in four: I = H(domain) - H(domain | expert) = 1 - 0.75 H(1/3) bits.
    told = normalized_mutual_information(domain_T, torch.tensor([0, 1, 1, 1]), 3)
    assert told == pytest.approx(1 - 0.75 * (math.log2(3) - 2 / 3))
    assert math.isnan(normalized_mutual_information(torch.tensor([1, 1]), torch.tensor([0, 1]), 3))


def test_tokens_without_domain_or_expert_do_not_count():
    domain_T, expert_T = torch.tensor([0, 1, -1, 0]), torch.tensor([0, 1, 0, -1])
    assert normalized_mutual_information(domain_T, expert_T, 2) == pytest.approx(1.0)
    assert math.isnan(normalized_mutual_information(domain_T, torch.full((4,), -1), 2))


def test_correlation_by_hand():
    need_T = torch.tensor([1, 2, 3])
    assert correlation(torch.tensor([2.0, 4.0, 6.0]), need_T) == pytest.approx(1.0)
    assert correlation(torch.tensor([0.0, 1.0, 0.0]), need_T) == pytest.approx(0.0)
    assert correlation(torch.tensor([2.0, 2.0, 2.0]), need_T) == 0.0
    assert math.isnan(correlation(need_T.float(), torch.tensor([1, 1, 1])))
