"""Co-activation, specialization, collapse and consistency, by hand and against other implementations."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from routerzoo import Routing
from routerzoo.metrics import CoActivation, InterRunConsistency, RepresentationCollapse, Specialization


def routing(experts):
    experts_TK = torch.tensor(experts)
    return Routing(experts_TK, torch.ones(experts_TK.shape))


def test_co_activation_by_hand():
    metric = CoActivation(4)
    metric.update(routing([[0, 1], [1, 0], [0, 2], [1, -1]]))
    # Expert 0 has 3 tokens, 2 of them with 1; expert 1 has 3, 2 with 0; expert 2 has 1, with 0; expert 3 none.
    expected = [[1, 2 / 3, 1 / 3, 0], [2 / 3, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert_close(metric.compute(), torch.tensor(expected))
    _, axes = metric.plot()
    shown = axes.images[0].get_array()
    assert np.ma.is_masked(shown[0, 0]) or np.isnan(shown[0, 0])
    assert shown[2, 0] == 1


def test_specialization_by_hand():
    metric = Specialization(3, 4, min_count=2)
    # Label 0: both tokens to experts 0 and 1, one to 2. Label 1: twice expert 2 and once each 0 and 1. Label 2: once.
    metric.update(
        routing([[0, 1], [0, 2], [2, 0], [1, 2], [0, 1], [-1, -1], [0, 1]]), torch.tensor([0, 0, 1, 1, 2, 1, -1])
    )
    result = metric.compute()
    nan = float("nan")
    assert_close(
        result["share_VE"],
        torch.tensor([[1, 0.5, 0.5], [0.5, 0.5, 1], [nan, nan, nan], [nan, nan, nan]]),
        equal_nan=True,
    )
    assert float(result["specialization"]) == 1
    assert float(result["chance"]) == pytest.approx(2 / 3)


def test_specialization_refuses_what_does_not_fit():
    metric = Specialization(3, 2)
    with pytest.raises(ValueError, match=r"there are 1 tokens and labels \[2\]"):
        metric.update(routing([[0]]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="labels must be below num_labels = 2, got 2"):
        metric.update(routing([[0]]), torch.tensor([2]))
    assert metric.compute()["specialization"].isnan()


def test_specialization_is_drawn_with_names():
    metric = Specialization(2, 3, min_count=1)
    metric.update(routing([[0], [1], [0]]), torch.tensor([0, 0, 2]))
    _, axes = metric.plot(names=["a", "b", "c"])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["c", "a"]


def test_collapse_by_hand():
    # Along x: variance 1 within, 4 between. Along y: 9 within, none between, so that the pseudo-inverse leaves it out.
    metric = RepresentationCollapse(2, 2)
    x_TD = torch.tensor([[-3.0, 3], [-1, -3], [1, 3], [3, -3], [99, 99]])
    metric.update(x_TD, torch.tensor([0, 0, 1, 1, -1]))
    assert float(metric.compute()) == pytest.approx(1 / 4)


def test_collapse_agrees_with_numpy_by_definition():
    x_TD, classes_T = torch.randn(200, 6) + 3, torch.randint(5, (200,))
    x_TD = x_TD + torch.randn(5, 6)[classes_T]
    metric = RepresentationCollapse(5, 6)
    for part in range(0, 200, 64):
        metric.update(x_TD[part : part + 64], classes_T[part : part + 64])
    x, y = x_TD.double().numpy(), classes_T.numpy()
    within = sum(np.cov(x[y == c].T, bias=True) * (y == c).mean() for c in range(5))
    total = np.cov(x.T, bias=True)
    expected = np.trace(within @ np.linalg.pinv(total - within, rcond=1e-10))
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-5)
    more_collapsed = RepresentationCollapse(5, 6)
    means = torch.stack([x_TD[classes_T == c].mean(0) for c in range(5)])[classes_T]
    more_collapsed.update(means + 0.1 * (x_TD - means), classes_T)
    assert float(more_collapsed.compute()) == pytest.approx(0.01 * expected, rel=1e-4)
    with pytest.raises(ValueError, match=r"expected hidden states \[tokens, 6\]"):
        metric.update(x_TD[:, :3], classes_T)


def test_consistency_agrees_with_numpy():
    loads = torch.rand(4, 8)
    metric = InterRunConsistency()
    for load_E in loads:
        metric.update(load_E)
    correlations = np.corrcoef(loads.numpy())
    assert float(metric.compute()["consistency"]) == pytest.approx(correlations.mean(), rel=1e-5)
    assert float(metric.compute()["between_runs"]) == pytest.approx((correlations.sum() - 4) / 12, rel=1e-4)
    with pytest.raises(ValueError, match=r"load of each expert of one run, got \[3\]"):
        metric.update(torch.ones(3))


def test_a_single_run_agrees_with_itself():
    metric = InterRunConsistency()
    metric.update(torch.tensor([1.0, 2.0]))
    result = metric.compute()
    assert float(result["consistency"]) == 1
    assert result["between_runs"].isnan()


@pytest.mark.parametrize("metric", [RepresentationCollapse(2, 2), InterRunConsistency()], ids=["collapse", "runs"])
def test_the_rest_is_drawn(metric):
    if isinstance(metric, InterRunConsistency):
        metric.update(torch.tensor([1.0, 2.0, 4.0]))
        metric.update(torch.tensor([1.0, 3.0, 4.0]))
        assert metric.plot()[1].images[0].get_array().shape == (2, 2)
    else:
        metric.update(torch.randn(9, 2), torch.arange(9) % 2)
        assert len(metric.plot()[1].patches) == 1
