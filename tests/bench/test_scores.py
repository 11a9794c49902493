import dataclasses
import math

import pytest

from routerzoo.bench.rows import Row
from routerzoo.bench.scores import mean_and_error, regret_difference, scales, summaries


def row(router, seed, loss, curve="", task="clusters", stage="final", status="finished"):
    return Row(task, router, stage, seed, 200, 0.03, 1.0, status, loss=loss, curve=curve)


def controls(seed, oracle=0.1, blind=0.5):
    return [row("oracle", seed, oracle), row("blind", seed, blind)]


def by_name(rows):
    return {summary.router: summary for summary in summaries(rows)}


def test_regret_lies_between_the_controls_of_the_seed():
    rows = [*controls(0), *controls(1, 0.0, 1.0), row("LinearRouter", 0, 0.2), row("LinearRouter", 1, 0.45)]
    found = by_name(rows)
    assert [score.regret for score in found["LinearRouter"].scores] == pytest.approx([0.25, 0.45])
    assert found["LinearRouter"].regret == pytest.approx(0.35)
    # t with one degree of freedom: 12.706; the standard error is half of the difference.
    assert found["LinearRouter"].half_width == pytest.approx(12.706 * 0.1, rel=1e-3)
    assert found["oracle"].regret == 0
    assert found["blind"].regret == 1
    assert math.isnan(by_name(controls(0))["oracle"].half_width)


def test_a_failed_run_counts_as_blind_and_is_named():
    failed = row("LinearRouter", 1, None, status="failed")
    found = by_name([*controls(0), *controls(1), row("LinearRouter", 0, 0.1), failed])
    assert found["LinearRouter"].regret == pytest.approx(0.5)
    assert found["LinearRouter"].failures == [failed]
    assert found["LinearRouter"].mean("loss") == 0.1


def test_seeds_without_controls_and_tuning_do_not_count():
    rows = [*controls(0), row("LinearRouter", 0, 0.1), row("LinearRouter", 1, 0.5), row("HashRouter", 2, 0.5)]
    rows += [row("HashRouter", 0, 0.3, stage="tuning"), row("TaskRouter", 0, None, status="not applicable")]
    found = by_name(rows)
    assert found.keys() == {"oracle", "blind", "LinearRouter"}
    assert len(found["LinearRouter"].scores) == 1


def test_regret_has_no_scale_where_a_control_failed_or_chance_is_as_good():
    failed = dataclasses.replace(row("oracle", 1, None, status="failed"), reason="killed by SIGKILL")
    rows = [*controls(0), failed, row("blind", 1, 0.5), *controls(2, 0.5, 0.5), *controls(3, 0.6, 0.5)]
    rows += [row("oracle", 4, 0.1), *(row("LinearRouter", seed, 0.2) for seed in range(5))]
    assert scales(rows) == {
        ("clusters", 0): (0.1, 0.5),
        ("clusters", 1): "the oracle control failed: killed by SIGKILL",
        ("clusters", 2): "the blind control is no worse than the oracle",
        ("clusters", 3): "the blind control is no worse than the oracle",
    }
    assert [score.row.seed for score in by_name(rows)["LinearRouter"].scores] == [0]


def test_a_longer_run_of_equal_flops_is_scored_by_the_controls_of_its_seed():
    other = dataclasses.replace(row("HashRouter", 0, 0.2), steps=225)
    assert by_name([*controls(0), other])["HashRouter"].regret == pytest.approx(0.25)


def test_steps_to_half_regret():
    rows = [*controls(0), row("a", 0, 0.2, "20:0.6 40:0.3 60:0.2"), row("b", 0, 0.4, "20:0.6 40:0.4")]
    rows.append(row("c", 0, 0.2, "20:0.6 40:0.2 60:0.5 80:0.3 100:0.2"))  # as where a task turns
    found = by_name(rows)
    assert found["a"].steps_to_half == 40
    assert found["b"].steps_to_half == math.inf
    assert found["c"].steps_to_half == 80


def test_differences_are_paired_by_seed():
    rows = [entry for seed in range(3) for entry in controls(seed, 0.0, 1.0)]
    rows += [row("a", seed, loss) for seed, loss in enumerate((0.1, 0.2, 0.3))]
    rows += [row("b", seed, loss) for seed, loss in enumerate((0.2, 0.3, 0.5))]
    found = by_name(rows)
    difference, error = regret_difference(found["a"], found["b"])
    assert difference == pytest.approx(-0.4 / 3)
    assert error == pytest.approx(math.sqrt(((0.1 / 3) ** 2 * 2 + (0.2 / 3) ** 2 / 1) / 2 / 3) * 1.0, rel=1e-6)
    assert all(map(math.isnan, mean_and_error([])))
