"""TemplateRouter: the checks of every router, and numbers by hand."""

import pytest
import torch
from routerzoo_template import TemplateRouter
from torch.testing import assert_close

from routerzoo import LayerSpec
from routerzoo.testing import CHECKS, check_router


@pytest.mark.parametrize("check", CHECKS)
def test_router_is_what_it_declares(check):
    check_router(TemplateRouter, only=[check])


def test_choices_and_weights_by_hand():
    router = TemplateRouter(LayerSpec(d_model=2, num_experts=3), top_k=2, rank=1)
    router.down.data = torch.tensor([[1.0, 1.0]])
    router.up.data = torch.tensor([[1.0], [2.0], [3.0]])
    routing = router(torch.tensor([[0.5, 0.5]]))  # logits 1, 2, 3
    assert routing.experts_TK.tolist() == [[2, 1]]
    assert_close(routing.weights_TK, torch.tensor([[3.0, 2.0]]).softmax(-1))


def test_a_rank_below_1_is_refused():
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        TemplateRouter(LayerSpec(2, 3), rank=0)
