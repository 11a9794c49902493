"""Which k the runs of a sweep are tested at, decided before they train."""

import pytest
import yaml

from routerzoo.errors import UserError
from routerzoo.sweep.plan import Cell
from routerzoo.sweep.tested_k import with_possible_k

TOP_K = "model.init_args.eval_top_k"


def cell(router, ks, num_experts=4):
    arguments = {"num_experts": num_experts, "router": router}
    config = yaml.safe_dump({"model": {"class_path": "LanguageModeling", "init_args": arguments}})
    test = {TOP_K: ks, "trainer.limit_test_batches": 2}
    return Cell("language", "it", 0, {}, (), {}, test), config


@pytest.mark.parametrize("router", ["LinearRouter", "HyperRouter", "TopKRouter"])
def test_routers_that_take_k_are_tested_at_each(router):
    tested, config = cell({"class_path": router, "init_args": {"top_k": 1}}, [2, 1, 4])
    assert with_possible_k(tested, config) is tested


@pytest.mark.parametrize(
    "router",
    [
        {"class_path": "TopPRouter"},
        {"class_path": "BlockFFNRouter"},
        {"class_path": "BaseLayerRouter"},
        {"class_path": "CapacityRouter", "init_args": {"router": {"class_path": "TopPRouter"}}},
    ],
)
def test_routers_that_choose_their_own_k_are_tested_without(router):
    assert with_possible_k(*cell(router, [2, 1, 4])).test == {"trainer.limit_test_batches": 2}


@pytest.mark.parametrize("ks", [[2, 8], 8, [0]])
def test_a_k_that_the_router_cannot_do_is_refused(ks):
    with pytest.raises(UserError, match=r"eval_top_k must be between 1 and 4, got (8|0)"):
        with_possible_k(*cell({"class_path": "LinearRouter"}, ks))


def test_what_cannot_be_told_is_left_to_the_run():
    for router in (None, {"class_path": "LinearRouter", "init_args": {"nonsense": 1}}):
        tested, config = cell(router, [9])
        assert with_possible_k(tested, config) is tested
