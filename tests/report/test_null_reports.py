"""Reports on made-up runs whose truth is known: how often do they say something false?"""

import itertools
import math
from typing import Any

import numpy as np
import pytest

from routerzoo.report.statistics.aggregates import interquartile_mean, probability_of_improvement, stratified_bootstrap
from routerzoo.report.statistics.best import find_best
from routerzoo.report.statistics.comparisons import ALPHA, INTERIM_ALPHA, Results, compare_all
from routerzoo.report.statistics.intervals import interval
from routerzoo.report.statistics.margins import Metric
from routerzoo.report.statistics.ranks import mean_ranks

# 5 %, and three standard errors of 2,000 reports.
TOLERATED = 0.063


def normal(generator, shape):
    return generator.normal(size=shape)


def skewed(generator, shape):
    return generator.lognormal(sigma=1.0, size=shape)


def counted(generator, shape):
    """Accuracies of few examples: four steps in a standard deviation's width on either side."""
    return np.round(2.5 * generator.normal(size=shape)) / 2.5


def heavy_tailed(generator, shape):
    return generator.standard_t(2, size=shape)


def seldom_different(generator, shape):
    return 5.0 * (generator.random(shape) < 0.1)


def uniform(generator, shape):
    return generator.random(shape)


def with_failures(generator, shape):
    return np.where(generator.random(shape) < 0.1, math.nan, generator.normal(size=shape))


def made_up(generator, noise, paired, means=None, *, shape=None, margin=0.5, num_tasks=None):
    """Return a report's results: routers of equal means, or of these, at random sizes if not given.

    Where runs are pairs, what a seed does to all routers is twice as large as what it does to each.
    """
    num_routers, seeds = shape or (generator.integers(3, 9), generator.integers(2, 11))
    tasks = {}
    for task in range(num_tasks or generator.integers(1, 9)):
        values_RS = 100 + noise(generator, (num_routers, seeds)) + paired * 2 * generator.normal(size=seeds)
        if means is not None:
            values_RS = values_RS + np.array(means)[:, None]
        by_seed = {f"r{place}": dict(enumerate(map(float, row))) for place, row in enumerate(values_RS)}
        baselines = {name: "r0" for name in by_seed if name != "r0"}
        tasks[str(task)] = Results(by_seed, True, Metric(margin, "units"), baselines, paired)
    return tasks


def verdicts(tasks, alpha=ALPHA):
    return [found.verdict for pairs in compare_all(tasks, alpha).values() for found in pairs.values()]


def is_false_difference(tasks, alpha=ALPHA):
    """Whether any of identical routers is said to differ, or is ruled out as the best."""
    compared = compare_all(tasks, alpha)
    ruled_out = any(find_best(results, compared[name]).worse for name, results in tasks.items())
    return ruled_out or any(found.is_significant for pairs in compared.values() for found in pairs.values())


@pytest.mark.full
def test_reports_on_identical_routers_find_no_difference():
    generator = np.random.default_rng(0)
    noises = (normal, skewed, counted, heavy_tailed, seldom_different, uniform)
    kinds = itertools.cycle(itertools.product(noises, (True, False)))
    false: dict[Any, list[bool]] = {}
    for noise, paired in itertools.islice(kinds, 2000):
        tasks = made_up(generator, noise, paired)
        false.setdefault((noise.__name__, paired), []).append(is_false_difference(tasks))
    assert np.mean(list(itertools.chain(*false.values()))) <= TOLERATED
    for kind, found in false.items():
        assert np.mean(found) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / len(found)), kind


@pytest.mark.full
@pytest.mark.parametrize("paired", [True, False])
def test_failing_runs_make_no_difference_either(paired):
    generator = np.random.default_rng(0)
    reports = (made_up(generator, with_failures, paired, shape=(4, 6), num_tasks=1) for _ in range(300))
    assert np.mean([is_false_difference(tasks) for tasks in reports]) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)


@pytest.mark.full
@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("seeds", [3, 6, 20])
def test_routers_as_far_apart_as_the_margin_are_not_equivalent(paired, seeds):
    generator, margin = np.random.default_rng(0), 1.5
    means = [0.0, margin, 2 * margin, 3 * margin]
    reports = (
        made_up(generator, normal, paired, means, shape=(4, seeds), margin=margin, num_tasks=1) for _ in range(1000)
    )
    false = [any(v in ("equivalent", "negligibly worse") for v in verdicts(tasks)) for tasks in reports]
    assert np.mean(false) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)


@pytest.mark.full
def test_equivalent_routers_are_found_equivalent_and_different_ones_different():
    generator = np.random.default_rng(0)
    tasks = made_up(generator, normal, True, [0.0, 0.0, 6.0], shape=(3, 20), margin=2.0, num_tasks=1)
    pairs = compare_all(tasks)["0"]
    assert (pairs["r1", "r0"].verdict, pairs["r2", "r0"].verdict) == ("equivalent", "worse")


@pytest.mark.full
def test_looking_after_every_seed_finds_nothing_false():
    generator, seeds = np.random.default_rng(0), 10
    false = []
    for _ in range(500):
        tasks = made_up(generator, normal, True, shape=(4, seeds), num_tasks=2)
        looks = ((_first(tasks, n), INTERIM_ALPHA if n < seeds else ALPHA) for n in range(2, seeds + 1))
        false.append(any(is_false_difference(seen, alpha) for seen, alpha in looks))
    assert np.mean(false) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 500)


@pytest.mark.full
def test_seeds_that_are_added_to_what_was_inconclusive_are_a_second_look():
    generator, false = np.random.default_rng(0), []
    for _ in range(1000):
        tasks = made_up(generator, normal, True, shape=(6, 15), num_tasks=1)
        false.append(is_false_difference(_first(tasks, 5)) or is_false_difference(tasks))
    assert np.mean(false) == pytest.approx(0.09, abs=0.027)


def _first(tasks, seeds):
    return {
        name: Results(
            {router: dict(list(values.items())[:seeds]) for router, values in known.values.items()},
            known.lower_is_better,
            known.metric,
            known.baselines,
            known.paired,
        )
        for name, known in tasks.items()
    }


@pytest.mark.full
@pytest.mark.parametrize("noise", [normal, skewed])
@pytest.mark.parametrize(("num_routers", "seeds", "num_tasks"), [(6, 5, 1), (3, 5, 2), (6, 10, 2), (4, 20, 1)])
def test_intervals_of_ranks_cover_the_true_rank(noise, num_routers, seeds, num_tasks):
    generator, inside = np.random.default_rng(0), []
    for _ in range(500):
        tasks = made_up(generator, noise, True, shape=(num_routers, seeds), num_tasks=num_tasks)
        inside += [i.low <= (num_routers + 1) / 2 <= i.high for i in mean_ranks(tasks, draws=1000).values()]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.03)


@pytest.mark.full
@pytest.mark.parametrize(("seeds", "num_tasks"), [(5, 4), (10, 1), (10, 4)])
def test_bootstrap_intervals_cover(seeds, num_tasks):
    generator = np.random.default_rng(0)
    improvement, middle = [], []
    for _ in range(500):
        one, other = generator.normal(size=(2, num_tasks, seeds))
        improvement.append(stratified_bootstrap(probability_of_improvement, one, other, draws=1000))
        middle.append(stratified_bootstrap(interquartile_mean, one, draws=1000))
    assert 0.93 <= np.mean([i.low <= 0.5 <= i.high for i in improvement]) <= 0.99
    assert 0.93 <= np.mean([i.low <= 0.0 <= i.high for i in middle]) <= 0.99


@pytest.mark.full
def test_intervals_of_means_cover():
    generator = np.random.default_rng(0)
    inside = [(i := interval(row)).low <= 0 <= i.high for row in generator.normal(size=(4000, 3)).tolist()]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.012)


@pytest.mark.full
def test_intervals_of_accuracies_cover_and_stay_in_range():
    generator = np.random.default_rng(0)
    inside = []
    for share in (0.07, 0.5, 0.95):
        trained = generator.normal(share, 0.01, size=(1000, 5)).clip(0, 1)
        for row in (generator.binomial(500, trained) / 500).tolist():
            found = interval(row, is_share=True)
            assert 0 < found.low < found.high < 1
            inside.append(found.low <= share <= found.high)
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)
