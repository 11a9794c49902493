"""Summaries over tasks and seeds, by hand and as rliable 1.2 computes them."""

import math

import numpy as np
import pytest

from routerzoo.report.statistics.aggregates import (
    interquartile_mean,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    resampled,
    stratified_bootstrap,
)
from routerzoo.report.statistics.comparisons import Results
from routerzoo.report.statistics.margins import Metric
from routerzoo.report.statistics.ranks import improvement, mean_ranks

LOSSES_TS = np.array([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 10.0, 2.0]])


def test_the_interquartile_mean_drops_a_quarter_at_each_end():
    assert interquartile_mean(LOSSES_TS) == 2.0  # of 1, 2, 2, 3
    assert interquartile_mean(np.stack([LOSSES_TS, LOSSES_TS + 1])).tolist() == [2.0, 3.0]


def test_the_optimality_gap_counts_what_misses_the_target():
    assert optimality_gap(LOSSES_TS, 2.0) == (1 + 2 + 8) / 8


def test_the_performance_profile_is_a_share_of_runs():
    assert performance_profile(LOSSES_TS, [0, 2, 10]).tolist() == [2 / 8, 5 / 8, 1.0]


def test_the_probability_of_improvement_is_mann_whitneys():
    other_TS = np.array([[2.0, 5.0], [0.0, 1.0]])
    # Of 8 pairs a task, 5 and a tie, and 2 and two ties, are won.
    assert probability_of_improvement(LOSSES_TS, other_TS) == (5.5 / 8 + 3 / 8) / 2
    assert probability_of_improvement(LOSSES_TS, LOSSES_TS) == 0.5
    failed_TS = np.full((2, 3), math.inf)
    assert probability_of_improvement(LOSSES_TS, failed_TS) == 1.0
    assert probability_of_improvement(failed_TS, failed_TS) == 0.5


def test_the_bootstrap_draws_within_tasks():
    tasks_TS = np.repeat([[0.0], [1.0]], 5, axis=1)
    drawn = resampled(tasks_TS, 50, np.random.default_rng(0))
    assert (drawn == tasks_TS).all()
    assert math.isnan(stratified_bootstrap(interquartile_mean, tasks_TS).low)  # no spread


def test_the_bootstrap_of_a_share_is_binomial():
    # Of five seeds that are 1 with probability 0.2, at most 4 are in all but 0.03 % of draws, and at most 3 in all but
    # 0.67 %; the expanded interval cuts 0.095 %.
    losses_TS = np.array([[0.0, 0.0, 0.0, 0.0, 1.0]])
    assert stratified_bootstrap(lambda x: x.mean((-2, -1)), losses_TS, draws=20000) == (0.2, 0.0, 0.8)


def test_four_seeds_have_no_interval():
    middle = stratified_bootstrap(interquartile_mean, LOSSES_TS, draws=10)
    assert middle.mean == 2.0
    assert math.isnan(middle.low)
    assert math.isnan(middle.high)


def ranks(**tasks):
    return mean_ranks(
        {
            name: Results(
                {n: dict(enumerate(values)) for n, values in table.items()}, name != "images", Metric(0.1, "")
            )
            for name, table in tasks.items()
        }
    )


def test_ranks_are_means_over_seeds_and_tasks():
    text = {"a": [1.0, 2.0], "b": [2.0, 1.0], "c": [9.0, 9.0], "text only": [0.0, 0.0]}
    images = {"a": [0.9, 0.8], "b": [0.4, 0.4], "c": [0.5, 0.5]}
    found = ranks(text=text, images=images)
    assert {name: middle.mean for name, middle in found.items()} == {"a": 1.25, "b": 2.25, "c": 2.5}
    assert all(math.isnan(middle.low) and math.isnan(middle.high) for middle in found.values())
    assert mean_ranks({}) == {}


def test_equal_values_share_their_ranks_and_failed_runs_are_last():
    found = ranks(text={"a": [1.0], "b": [2.0], "c": [1.0], "d": [math.nan], "e": [math.nan]})
    assert {name: middle.mean for name, middle in found.items()} == {"a": 1.5, "b": 3.0, "c": 1.5, "d": 4.5, "e": 4.5}


def test_a_lucky_seed_of_a_failing_router_does_not_make_it_first():
    found = ranks(text={"failing": [math.nan, math.nan, 0.5], "b": [1.0, 1.1, 1.2], "c": [2.0, 2.1, 2.2]})
    assert {name: middle.mean for name, middle in found.items()} == pytest.approx(
        {"failing": 7 / 3, "b": 4 / 3, "c": 7 / 3}
    )


def test_seeds_that_are_pending_are_left_out():
    values = {"a": {0: 1.0, 1: 1.0}, "b": {0: 2.0}}
    found = mean_ranks({"text": Results(values, True, Metric(0.1, ""))})
    assert {name: middle.mean for name, middle in found.items()} == {"a": 1.0, "b": 2.0}


def test_improvement_is_over_the_tasks_and_seeds_that_both_have():
    text = {"baseline": {0: 2.0, 1: 5.0, 7: 0.0}, "ours": {0: 1.0, 1: 2.0}}
    images = {"baseline": {0: 0.5, 1: 0.6}, "ours": {0: 0.7, 1: math.nan}}
    tasks = {
        "text": Results(text, True, Metric(0.1, "")),
        "images": Results(images, False, Metric(0.1, "")),
        "text only": Results({"ours": {0: 1.0}}, True, Metric(0.1, "")),
    }
    # In text 3 of 4 pairs and a tie are won; in images 2, by the seed that did not fail.
    assert improvement(tasks, "ours", "baseline").mean == (3.5 / 4 + 2 / 4) / 2
    assert math.isnan(improvement(tasks, "ours", "nobody").mean)
