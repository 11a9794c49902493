"""Load, confidence and the schedules of k, by hand."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from routerzoo import Routing
from routerzoo.functional.schedules import k_at
from routerzoo.metrics import ExpertLoad, GateConfidence
from routerzoo.metrics.figures import load_over_training
from routerzoo.metrics.load import load_statistics


def test_load_statistics_by_hand():
    # Mean 2, so relative loads 2, 1, 1, 0; shares 1/2, 1/4, 1/4, 0: entropy 1.5 bits of 2.
    statistics = load_statistics(torch.tensor([4, 2, 2, 0]))
    expected = {
        "load_max": 2,
        "load_min": 0,
        "load_max_violation": 1,
        "load_cv": 0.5**0.5,
        "load_entropy": 0.75,
        "dead_experts": 1,
    }
    assert {name: pytest.approx(float(value)) for name, value in statistics.items()} == expected


def test_load_of_one_expert_and_of_nothing():
    assert load_statistics(torch.tensor([3]))["load_entropy"] == 1
    assert load_statistics(torch.zeros(4))["dead_experts"] == 4


def test_expert_load_adds_up_over_updates_and_plots():
    metric = ExpertLoad(3)
    for chosen in ([[0, 1]], [[0, -1]], [[2, 0]]):
        metric.update(Routing(torch.tensor(chosen), torch.ones(1, 2)))
    assert metric.counts_E.tolist() == [3, 1, 1]
    assert metric.shares_E.tolist() == pytest.approx([0.6, 0.2, 0.2])
    figure, axes = metric.plot()
    assert isinstance(figure, Figure)
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([1.8, 0.6, 0.6])


def test_counts_are_exact_whatever_the_default_dtype():
    metric, experts_TK = ExpertLoad(4), torch.zeros(5001, 1, dtype=torch.int64)
    given = Routing(experts_TK, torch.ones(5001, 1))
    torch.set_default_dtype(torch.bfloat16)  # as in a run in bf16-true
    try:
        metric.update(given)
    finally:
        torch.set_default_dtype(torch.float32)
    assert metric.counts_E.tolist() == [5001, 0, 0, 0]


def test_gate_confidence_by_hand():
    logits_TE = torch.log(
        torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25], [1.0, 1e-30, 1e-30, 1e-30]])
    )
    metric = GateConfidence(4)
    metric.update(Routing(torch.tensor([[0, 1], [0, -1], [-1, -1]]), torch.ones(3, 2), logits_TE))
    values = metric.compute()
    assert float(values["gate_entropy"]) == pytest.approx((1.75 / 2 + 1) / 2)
    assert float(values["gate_margin"]) == pytest.approx(0.125)
    assert float(values["active_experts"]) == pytest.approx(1.5)


def test_gate_confidence_of_a_router_without_logits_is_nan():
    metric = GateConfidence(4)
    metric.update(Routing(torch.tensor([[0, 1]]), torch.ones(1, 2)))
    assert metric.compute()["gate_entropy"].isnan()


def test_the_picture_of_a_run_with_a_single_record_is_drawn():
    figure = load_over_training([10], np.ones((1, 2, 4)), "title")
    assert len(figure.axes) == 5  # two panels per layer, and the color bar


@pytest.mark.parametrize(
    ("growth", "expected"),
    [
        ("linear", [8, 10, 12, 14, 16]),
        ("cosine", [8, 9, 10, 13, 16]),  # 16 - 8 cos(pi t / 2S) at t/S = 0, 1/4, 1/2, 3/4, 1
        ("exponential", [8, 12, 14, 15, 16]),  # 16 - 8 * 0.99^(300 t / S)
        ("multi-step", [8, 8, 8, 8, 16]),
    ],
)
def test_k_grows_as_published(growth, expected):
    assert [k_at(step, 1200, 8, 16, growth) for step in (0, 300, 600, 900, 1200)] == expected


def test_k_doubles_through_the_published_stages():
    assert [k_at(step, 100, 1, 16, "multi-step") for step in (0, 20, 40, 60, 80, 100)] == [1, 2, 4, 8, 16, 16]
    assert [k_at(step, 100, 16, 1, "multi-step") for step in (0, 20, 40, 60, 80, 100)] == [16, 8, 4, 2, 1, 1]
    with pytest.raises(ValueError, match="growth must be linear, cosine, exponential or multi-step"):
        k_at(0, 1, 1, 2, "steep")
    with pytest.raises(ValueError, match="k must be at least 1"):
        k_at(0, 1, 0, 2)
