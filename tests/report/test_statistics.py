"""Intervals, corrections and verdicts of a report, against SciPy and by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from routerzoo.report.statistics.best import find_best
from routerzoo.report.statistics.comparisons import ALPHA, Results, compare_all
from routerzoo.report.statistics.holm import holm
from routerzoo.report.statistics.intervals import interval
from routerzoo.report.statistics.margins import MARGINS, Metric, metric

NAN = math.nan
BASE = (3.0, 3.2, 3.1, 2.9, 3.05)


def results(margin=0.01, paired=True, lower_is_better=True, kind="plain", **values):
    """Return a task's results, with the first router as the baseline."""
    first, *others = values
    by_seed = {name: dict(enumerate(found)) for name, found in values.items()}
    return Results(by_seed, lower_is_better, Metric(margin, "units", kind), dict.fromkeys(others, first), paired)


def compared(**arguments):
    (pairs,) = compare_all({"task": results(**arguments)}).values()
    return pairs


def test_intervals_are_students():
    values = [2.0, 2.5, 3.1, 2.2]
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert interval(values)[1:] == pytest.approx(expected)
    with pytest.raises(ValueError, match="finite values"):
        interval([])
    with pytest.raises(ValueError, match="finite values"):
        interval([1.0, NAN])


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0, 2.0], [0.1, np.float64(np.float32(0.1))]])
def test_without_spread_there_are_no_bounds(values):
    middle = interval(values)
    assert middle.mean == pytest.approx(values[0])
    assert math.isnan(middle.low)
    assert math.isnan(middle.high)


def test_intervals_of_shares_stay_in_range():
    # Log-odds of 0.02 are -3.8918; half the interval is 4.3027 * 0.01 / sqrt(3) / (0.02 * 0.98) = 1.2674.
    middle = interval([0.01, 0.02, 0.03], is_share=True)
    assert middle.mean == pytest.approx(0.02)
    assert middle[1:] == pytest.approx((0.005713, 0.067584), rel=1e-3)
    assert interval([0.01, 0.02, 0.03]).low < 0
    assert (
        0 < interval([0.0, 0.5, 1.0, 1.0], is_share=True).low < interval([0.0, 0.5, 1.0, 1.0], is_share=True).high < 1
    )


@pytest.mark.parametrize(
    ("p_values", "weights", "adjusted", "levels"),
    [
        ((0.02, 0.01, 0.04), None, (0.04, 0.03, 0.04), (0.025, 0.05 / 3, 0.05)),
        ((0.04, 0.03), None, (0.06, 0.06), (0.025, 0.025)),  # the second is held against no more than the first
        ((0.01, 0.02, 0.04), (1.0, 0.5, 0.5), (0.02, 0.04, 0.04), (0.025, 0.025, 0.05)),
        ((0.01, NAN), None, (0.02, 1.0), (0.025, 0.05)),  # what cannot be tested counts
    ],
)
def test_holm_by_hand(p_values, weights, adjusted, levels):
    corrected = holm(p_values, weights)
    assert [found.p for found in corrected] == pytest.approx(adjusted)
    assert [found.level for found in corrected] == pytest.approx(levels)


def test_pairs_are_tested_by_the_paired_t_test():
    ours, theirs = (2.0, 2.4, 2.1), (2.3, 2.6, 2.45)
    found = compared(baseline=theirs, ours=ours)["ours", "baseline"]
    expected = stats.ttest_rel(ours, theirs)
    assert found.test == "paired t-test"
    assert found.p == found.p_adjusted == pytest.approx(expected.pvalue)
    assert found.difference[1:] == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert found.verdict == "better"
    assert compared(baseline=theirs, ours=ours, lower_is_better=False)["ours", "baseline"].verdict == "worse"


def test_runs_that_are_no_pairs_are_tested_by_welchs_t_test():
    ours, theirs = (2.0, 2.4, 2.1, 2.2), (2.3, 2.6, 2.45)
    found = compared(baseline=theirs, ours=ours, paired=False)["ours", "baseline"]
    expected = stats.ttest_ind(ours, theirs, equal_var=False)
    assert found.test == "Welch's t-test"
    assert found.p == pytest.approx(expected.pvalue)
    assert found.difference[1:] == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_a_pair_is_there_in_both_orders():
    pairs = compared(baseline=BASE, other=(3.4, 3.61, 3.52, 3.28, 3.46))
    one, other = pairs["baseline", "other"], pairs["other", "baseline"]
    assert (one.verdict, other.verdict) == ("better", "worse")
    assert one.difference == pytest.approx((-other.difference.mean, -other.difference.high, -other.difference.low))


def test_equivalence_is_two_one_sided_tests_and_shows_its_interval():
    ours = [value + 0.001 * (-1) ** place for place, value in enumerate(BASE)]
    found = compared(margin=0.05, baseline=BASE, ours=ours)["ours", "baseline"]
    differences = np.subtract(ours, BASE)
    above = stats.ttest_1samp(differences, -0.05, alternative="greater").pvalue
    below = stats.ttest_1samp(differences, 0.05, alternative="less").pvalue
    assert found.p_equivalence == pytest.approx(max(above, below))
    assert found.verdict == "equivalent"
    assert found.bounds_level == pytest.approx(0.90)
    assert found.bounds[1:] == pytest.approx(tuple(stats.ttest_1samp(differences, 0).confidence_interval(0.90)))


def test_the_interval_agrees_with_the_verdict():
    generator = np.random.default_rng(0)
    verdicts = set()
    for _ in range(60):
        values = {f"r{place}": generator.normal(3, 0.01, 6) for place in range(4)}
        for found in compared(margin=0.02, **values).values():
            inside = found.bounds.low > -0.02 and found.bounds.high < 0.02
            assert inside == (found.p_equivalence_adjusted < ALPHA)
            verdicts.add(found.verdict)
    assert {"equivalent", "inconclusive"} <= verdicts


def test_a_significant_difference_within_the_margin_is_negligible():
    ours = [value + 0.002 + 0.0001 * (-1) ** place for place, value in enumerate(BASE)]
    pairs = compared(margin=0.01, baseline=BASE, ours=ours)
    assert pairs["ours", "baseline"].verdict == "negligibly worse"
    assert pairs["baseline", "ours"].verdict == "negligibly better"


def test_half_of_the_level_is_for_the_baseline():
    pairs = compared(baseline=BASE, a=(3.4, 3.6, 3.55, 3.2, 3.5), b=(4, 4.5, 4.2, 4.1, 4.3))
    declared, other = pairs["a", "baseline"], pairs["a", "b"]
    # Weights 1/2, 1/2 and 1; the three are rejected in the order of p by weight.
    found = holm([pairs[pair].p for pair in (("baseline", "a"), ("baseline", "b"), ("a", "b"))], [0.5, 0.5, 1.0])
    assert declared.p_adjusted == pytest.approx(found[0].p)
    assert other.p_adjusted == pytest.approx(found[2].p)


def test_all_tasks_of_a_report_are_corrected_for():
    task = results(baseline=BASE, ours=[value + 0.02 + 0.01 * (-1) ** place for place, value in enumerate(BASE)])
    (alone,) = compare_all({"one": task}).values()
    both = compare_all({"one": task, "two": task})
    pair = ("ours", "baseline")
    assert both["one"][pair].p == alone[pair].p
    assert both["one"][pair].p_adjusted == pytest.approx(2 * alone[pair].p)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("shift", [0.0, 0.001])
def test_equal_differences_prove_nothing(paired, shift):
    # Accuracies on 1,000 images, as float32 has them: two seeds differ equally by chance.
    values = np.array([0.832, 0.828 if paired else 0.832], np.float32)
    ours = (values + np.float32(shift)).astype(np.float32)
    found = compared(baseline=values, ours=ours, paired=paired)["ours", "baseline"]
    assert found.verdict == "untestable"
    assert math.isnan(found.p)
    assert found.note == "the difference does not vary over seeds, so its error is unknown"


def test_one_seed_or_none_tells_nothing():
    single = compared(baseline=(2.0,), ours=(1.0,))["ours", "baseline"]
    assert (single.verdict, single.difference.mean) == ("untestable", -1.0)
    assert math.isnan(single.difference.low)
    values = {"baseline": {0: 2.0}, "ours": {1: 1.0}}
    (pairs,) = compare_all({"task": Results(values, True, Metric(0.01, ""))}).values()
    assert pairs["ours", "baseline"].seeds == 0
    assert pairs["ours", "baseline"].verdict == "untestable"


@pytest.mark.parametrize(
    ("paired", "p"),
    [(True, 2 / 2**6), (False, 2 / math.comb(12, 6))],  # one extreme arrangement of all, on either side
)
def test_where_runs_failed_ranks_are_compared(paired, p):
    ours = (3.5, NAN, 3.45, NAN, 3.6, 3.7)
    found = compared(baseline=(*BASE, 3.3), ours=ours, paired=paired)["ours", "baseline"]
    assert found.test == ("signed-rank test" if paired else "rank-sum test")
    assert found.p == pytest.approx(p)
    assert found.verdict == "worse"
    assert math.isnan(found.p_equivalence)
    higher = compared(baseline=(*BASE, 3.3), ours=ours, paired=paired, lower_is_better=False)["ours", "baseline"]
    assert higher.p > 0.05  # its failed runs are the worst, its others the best


def test_a_router_without_a_finished_run_has_failed():
    pairs = compared(baseline=BASE, ours=[NAN] * 5)
    assert pairs["ours", "baseline"].verdict == "failed"
    best = find_best(results(baseline=BASE, ours=[NAN] * 5), pairs)
    assert (best.router, best.worse, best.is_settled) == ("baseline", ("ours",), True)


def test_failed_runs_are_never_the_best():
    task = results(a=(2.0, NAN, NAN), b=(3.0, 3.1, 3.2), c=(NAN, NAN, NAN))
    best = find_best(task, compare_all({"task": task})["task"])
    assert (best.router, best.second) == ("b", "a")
    assert best.open == ("a",)
    none = results(a=(NAN,), b=(NAN,))
    assert find_best(none, compare_all({"task": none})["task"]).router is None


def test_the_best_is_compared_with_all_others():
    best_values = [value - 0.5 + 0.01 * (-1) ** place for place, value in enumerate(BASE)]
    close = [value + 0.003 * (-1) ** (place // 2) for place, value in enumerate(best_values)]
    open_ = [value + 0.05 * place for place, value in enumerate(best_values)]
    task = results(margin=0.02, baseline=BASE, best=best_values, close=close, open=open_)
    best = find_best(task, compare_all({"task": task})["task"])
    assert (best.router, best.second) == ("best", "close")
    assert (best.as_good, best.open, best.worse) == (("close",), ("open",), ("baseline",))


def test_margins_are_absolute_and_by_metric():
    assert metric("bpb").width(2.8) == metric("bpc").width(1.1) == 0.005
    assert MARGINS["loss"].margin == pytest.approx(0.005 * math.log(2), rel=0.02)
    # Perplexities are compared in bits: 0.005 bits of 20 are 0.0694.
    assert metric("ppl").compared(20.0694) - metric("ppl").compared(20.0) == pytest.approx(0.005, rel=1e-3)
    # Shares: 2 % of 170 errors in 1,000, and of 67 hits in 1,000.
    assert metric("accuracy").width(0.83) == pytest.approx(0.0034)
    assert metric("accuracy").width(0.067) == pytest.approx(0.00134)
    assert metric("bpb", {"bpb": 0.01}).width(2.8) == 0.01
    assert metric("accuracy", {"accuracy": 0.1}).width(0.83) == pytest.approx(0.017)
    assert math.isnan(metric("recall").width(0.5))
    assert metric("recall", {"recall": 0.01}).width(0.5) == 0.01
    assert metric("accuracy").stated == "2 % of the errors (of the hits, if fewer)"


def test_perplexities_are_compared_in_bits():
    found = compared(kind="perplexity", baseline=(16.0, 16.0, 16.0), ours=(32.0, 33.0, 32.0))["ours", "baseline"]
    assert found.difference.mean == pytest.approx((1 + math.log2(33 / 16) + 1) / 3)
