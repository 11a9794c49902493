"""What metrics refuse."""

import pytest
import torch

from routerzoo import Routing, metrics
from routerzoo.metrics import CoActivation, ExpertLoad, GateConfidence, RepresentationCollapse, Specialization

LABELS_T = torch.tensor([0, 1])


def routing(experts, width=None):
    experts_TK = torch.tensor(experts)
    logits_TE = None if width is None else torch.zeros(len(experts), width)
    return Routing(experts_TK, torch.ones(experts_TK.shape), logits_TE)


def updates(given):
    """Return an update with a routing of two tokens for each metric that takes one."""
    return {
        "CoActivation": lambda: CoActivation(4).update(given),
        "ExpertLoad": lambda: ExpertLoad(4).update(given),
        "GateConfidence": lambda: GateConfidence(4).update(given),
        "LastFluctuation": lambda: metrics.LastFluctuation(4).update(0, given),
        "RouterSaturation": lambda: metrics.RouterSaturation(4).update(given, routing([[0], [1]])),
        "RoutingFluctuation": lambda: metrics.RoutingFluctuation(4).update(routing([[0], [1]]), given),
        "Specialization": lambda: Specialization(4, 2).update(given, LABELS_T),
    }


@pytest.mark.parametrize("name", sorted(updates(None)))
def test_experts_of_another_layer_are_refused(name):
    with pytest.raises(ValueError, match="expert ids must be below num_experts = 4, or -1 for none; got 6"):
        updates(routing([[3], [6]]))[name]()
    with pytest.raises(ValueError, match="or -1 for none; got -2"):
        updates(routing([[3], [-2]]))[name]()
    with pytest.raises(ValueError, match="the routing is over 16 experts, the metric over num_experts = 4"):
        updates(routing([[3], [0]], width=16))[name]()
    updates(routing([[3], [-1]], width=4))[name]()


def test_every_form_is_checked():
    token_N = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="got 4"):
        ExpertLoad(4).update(Routing(token_N=token_N, expert_N=torch.tensor([4, 0]), weight_N=torch.ones(2)))
    slots = torch.zeros(1, 2, 5, 1)
    with pytest.raises(ValueError, match="over 5 experts"):
        ExpertLoad(4).update(Routing(dispatch_GSEP=slots, combine_GSEP=slots))
    with pytest.raises(ValueError, match="over 3 experts"):
        ExpertLoad(4).update(Routing(merge_GE=torch.ones(1, 3), group_T=torch.tensor([0])))


def test_widths_are_checked_without_reading_ids():
    meta = Routing(*(torch.zeros(2, 1, device="meta", dtype=dtype) for dtype in (torch.int64, torch.float32)))
    metrics.sets.check_num_experts(meta, 4)
    with pytest.raises(ValueError, match="over 5 experts"):
        metrics.sets.check_num_experts(Routing(meta.experts_TK, meta.weights_TK, torch.zeros(2, 5, device="meta")), 4)


def test_classes_beyond_the_last_are_refused():
    with pytest.raises(ValueError, match="classes must be below num_classes = 2, got 2"):
        RepresentationCollapse(2, 3).update(torch.zeros(2, 3), torch.tensor([0, 2]))
