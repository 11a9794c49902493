"""Statistics of a report, against scipy and by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from routerzoo.report.statistics import adjusted, compare, interval, mean_ranks


def test_intervals_are_students():
    values = [2.0, 2.5, 3.1, 2.2]
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert interval(values)[1:] == pytest.approx(expected)
    single = interval([2.0])
    assert single.mean == 2.0
    assert math.isnan(single.low)
    with pytest.raises(ValueError, match="no values"):
        interval([])


def test_intervals_cover_what_they_say():
    generator = np.random.default_rng(0)
    inside = [(i := interval(list(row))).low <= 0 <= i.high for row in generator.normal(size=(4000, 3))]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.012)


def test_the_comparison_is_the_paired_t_test():
    ours, theirs = {0: 2.0, 1: 2.4, 2: 2.1, 7: 9.0}, {0: 2.3, 1: 2.6, 2: 2.45}
    comparison = compare(ours, theirs, 0.01, lower_is_better=True)
    common = [0, 1, 2]
    expected = stats.ttest_rel([ours[s] for s in common], [theirs[s] for s in common])
    assert comparison.p == pytest.approx(expected.pvalue)
    assert comparison.seeds == 3
    low, high = expected.confidence_interval(0.95)
    assert comparison.difference[1:] == pytest.approx((low, high))
    assert comparison.verdict == "better"
    assert compare(ours, theirs, 0.01, lower_is_better=False).verdict == "worse"


def test_equivalence_is_two_one_sided_tests():
    theirs = {seed: 2.0 + 0.1 * seed for seed in range(5)}
    ours = {seed: value + 0.001 * (-1) ** seed for seed, value in theirs.items()}
    comparison = compare(ours, theirs, 0.05, lower_is_better=True)
    differences = [ours[s] - theirs[s] for s in theirs]
    low = stats.ttest_1samp(differences, -comparison.margin, alternative="greater").pvalue
    high = stats.ttest_1samp(differences, comparison.margin, alternative="less").pvalue
    assert comparison.p_equivalence == pytest.approx(max(low, high))
    assert comparison.margin == pytest.approx(0.05 * 2.2)
    assert comparison.verdict == "equivalent"


@pytest.mark.parametrize(("shift", "verdict"), [(0.0, "equivalent"), (-0.5, "better"), (0.5, "worse")])
def test_seeds_without_spread_leave_no_doubt(shift, verdict):
    values = {0: 2.0, 1: 4.0}
    assert compare({s: v + shift for s, v in values.items()}, values, 0.01, True).verdict == verdict


def test_one_seed_or_none_tells_nothing():
    single = compare({0: 1.0}, {0: 2.0}, 0.01, True)
    assert single.verdict == "inconclusive"
    assert math.isnan(single.p)
    assert compare({0: 1.0}, {1: 2.0}, 0.01, True) is None


def test_holm_by_hand():
    # p of 0.01, 0.02 and 0.04 times 3, 2 and 1.
    comparisons = {name: _with_p(p) for name, p in {"a": 0.02, "b": 0.01, "c": 0.04, "d": math.nan}.items()}
    result = adjusted(comparisons, True)
    assert result["b"].p_adjusted == pytest.approx(0.03)
    assert result["a"].p_adjusted == pytest.approx(0.04)
    assert result["c"].p_adjusted == pytest.approx(0.04)
    assert [result[name].verdict for name in "abcd"] == ["better", "better", "better", "inconclusive"]
    late = adjusted({"a": _with_p(0.04), "b": _with_p(0.03)}, True)
    assert [late[name].verdict for name in "ab"] == ["inconclusive", "inconclusive"]


def _with_p(p):
    from dataclasses import replace

    known = compare({0: 1.0, 1: 1.1}, {0: 2.0, 1: 2.3}, 0.001, True)
    return replace(known, p=p, p_adjusted=p)


def test_mean_ranks_over_tasks():
    tables = {
        "text": {"a": {0: 1.0, 1: 1.1}, "b": {0: 2.0, 1: 2.1}, "text only": {0: 0.0, 1: 0.0}},
        "images": {"a": {0: 0.5, 1: 0.6}, "b": {0: 0.7, 1: 0.8}},
    }
    result = mean_ranks(tables, {"text": True, "images": False})
    assert set(result) == {"a", "b"}
    assert result["a"].mean == 1.5  # first in text, second in images
    assert result["a"].low == result["a"].high == 1.5
    assert mean_ranks({}, {}) == {}


def test_equal_means_share_their_ranks():
    table = {"a": {0: 1.0}, "b": {0: 2.0}, "c": {0: 1.0}}
    result = mean_ranks({"text": table}, {"text": True})
    assert {name: middle.mean for name, middle in result.items()} == {"a": 1.5, "b": 3.0, "c": 1.5}
    assert all(math.isnan(middle.low) and math.isnan(middle.high) for middle in result.values())


def test_intervals_of_ranks_are_those_of_all_draws_of_seeds():
    # Of the four draws of two seeds, (1, 1) alone puts b first: ranks of a are 1, 1, 1 and 2.
    tables = {
        "text": {"a": {0: 1.0, 1: 2.0}, "b": {0: 4.0, 1: 1.0}, "c": {0: 9.0, 1: 9.0}},
        "images": {"a": {0: 0.9, 1: 0.8, 2: 0.7}, "b": {0: 0.4, 1: 0.4, 2: 0.4}, "c": {0: 0.5, 1: 0.5, 2: 0.5}},
    }
    assert mean_ranks(tables, {"text": True, "images": False}) == {
        "a": (1.0, 1.0, 1.5),
        "b": (2.5, 2.0, 2.5),
        "c": (2.5, 2.5, 2.5),
    }
