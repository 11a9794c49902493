"""Metrics of change, by hand."""

import pytest
import torch
from matplotlib.figure import Figure

from routerzoo import Routing
from routerzoo.metrics import LastFluctuation, RouterSaturation, RoutingFluctuation, expert_sets


def routing(experts):
    experts_TK = torch.tensor(experts)
    return Routing(experts_TK, torch.ones(experts_TK.shape))


def values(metric):
    return {name: pytest.approx(value.tolist()) for name, value in metric.compute().items()}


def test_sets_of_every_form():
    assert expert_sets(routing([[0, 2], [1, -1]]), 3).tolist() == [[True, False, True], [False, True, False]]
    flat = Routing(token_N=torch.tensor([1, 1, 0]), expert_N=torch.tensor([0, 2, -1]), weight_N=torch.ones(3))
    assert expert_sets(flat, 3).tolist() == [[False] * 3, [True, False, True]]
    slots = torch.ones(1, 2, 3, 1)
    with pytest.raises(ValueError, match="mixes tokens, or experts"):
        expert_sets(Routing(dispatch_GSEP=slots, combine_GSEP=slots), 3)


def test_fluctuation_by_hand():
    metric = RoutingFluctuation(4)
    # Swapped slots: 0. One of two new: 1/2. Both new: 1. From two experts to one of them: 1/2. Padding: not counted.
    before = routing([[0, 1], [0, 1], [0, 1], [0, 1], [-1, -1]])
    after = routing([[1, 0], [0, 2], [2, 3], [1, -1], [-1, -1]])
    metric.update(before, after)
    assert values(metric) == {"fluctuation": 2 / 4, "changed_tokens": 3 / 4}


def test_saturation_by_hand():
    metric = RouterSaturation(8)
    metric.update(routing([[0, 1], [2, 3], [4, 5]]), routing([[1, 0], [3, 4], [6, 7]]))
    assert values(metric) == {"saturation": (1 + 0.5 + 0) / 3, "chance": 2 / 8}


def test_saturation_of_random_routing_is_its_chance_level():
    metric = RouterSaturation(16)
    a, b = (torch.rand(20_000, 16).argsort(-1)[:, :4] for _ in range(2))
    metric.update(Routing(a, torch.ones(a.shape)), Routing(b, torch.ones(b.shape)))
    result = metric.compute()
    assert float(result["saturation"]) == pytest.approx(float(result["chance"]), abs=0.01)


def test_last_fluctuation_by_hand():
    metric = LastFluctuation(4)
    # Token 0 never changes; 1 settles at 20; 2 goes away and back: it settles at 30; 3 changes at the end.
    history = {10: [0, 0, 1, 2], 20: [0, 1, 3, 2], 30: [0, 1, 1, 2], 40: [0, 1, 1, 3]}
    for step, experts in history.items():
        metric.update(step, routing([[expert] for expert in experts]))
    assert values(metric) == {"steps": [10, 20, 30, 40], "settled": [1 / 4, 2 / 4, 3 / 4, 1]}
    with pytest.raises(ValueError, match="in order; 40 comes after 40"):
        metric.update(40, routing([[0]] * 4))
    with pytest.raises(ValueError, match="is of 3 tokens, before it was of 4"):
        metric.update(50, routing([[0]] * 3))
    metric.reset()
    metric(5, routing([[0]]))
    metric(6, routing([[0]]))
    assert values(metric) == {"steps": [5, 6], "settled": [1, 1]}


def test_last_fluctuation_agrees_with_its_definition():
    history = torch.randint(3, (9, 50, 1))
    metric = LastFluctuation(3)
    for step, experts_TK in enumerate(history):
        metric.update(step, Routing(experts_TK, torch.ones(50, 1)))
    settled = [(history[record:] == history[-1]).all(0).float().mean().item() for record in range(9)]
    assert metric.compute()["settled"].tolist() == pytest.approx(settled)


def test_other_tokens_are_refused():
    with pytest.raises(ValueError, match="are of 1 and 2 tokens; both must be of the same"):
        RoutingFluctuation(4).update(routing([[0]]), routing([[0], [1]]))


@pytest.mark.parametrize("cls", [RoutingFluctuation, RouterSaturation])
def test_change_is_drawn(cls):
    metric = cls(4)
    metric.update(routing([[-1]]), routing([[-1]]))
    assert all(value.isnan() for value in metric.compute().values())
    metric.update(routing([[0]]), routing([[1]]))
    figure, axes = metric.plot()
    assert isinstance(figure, Figure)
    assert len(axes.patches) == 2


def test_the_settling_curve_is_drawn():
    metric = LastFluctuation(4)
    metric.update(1, routing([[0]]))
    metric.update(2, routing([[1]]))
    _, axes = metric.plot()
    assert axes.lines[0].get_ydata().tolist() == [0, 1]
