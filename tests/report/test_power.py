"""What a number of seeds can show, against the noncentral t distribution and simulations."""

import math

import numpy as np
import pytest
from scipy import stats

from routerzoo.report.statistics.power import (
    can_show_equivalence,
    detectable_difference,
    power,
    power_of_equivalence,
    seeds_for_difference,
    seeds_for_equivalence,
    seeds_to_settle,
)


@pytest.mark.parametrize("seeds", [2, 3, 10])
@pytest.mark.parametrize("paired", [True, False])
def test_power_is_that_of_the_noncentral_t_distribution(seeds, paired):
    freedom, error = (seeds - 1, seeds**-0.5) if paired else (2 * seeds - 2, (2 / seeds) ** 0.5)
    critical = stats.t.ppf(0.975, freedom)
    for size in (0.0, 0.5, 2.0):
        expected = stats.nct.sf(critical, freedom, size / error) + stats.nct.cdf(-critical, freedom, size / error)
        assert power(size, 1.0, seeds, 0.05, paired=paired) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (0.05, {2: 11.5, 3: 3.26, 5: 1.68, 10: 1.00, 20: 0.66}),
        (0.01, {3: 7.32, 5: 2.63, 10: 1.33, 20: 0.84}),
    ],
)
def test_detectable_differences_are_those_of_tables(level, expected):
    found = {seeds: detectable_difference(1.0, seeds, level) for seeds in expected}
    assert found == pytest.approx(expected, rel=0.01)
    assert detectable_difference(0.03, 5, 0.05) == pytest.approx(0.0505, rel=0.01)
    assert detectable_difference(1.0, 1, 0.05) == math.inf


@pytest.mark.full
@pytest.mark.parametrize(
    ("seeds", "difference", "margin"), [(3, 0.0, 2.0), (5, 1.0, 2.0), (10, 0.7, 1.2), (10, 1.2, 1.2)]
)
def test_power_of_equivalence_is_what_simulations_give(seeds, difference, margin):
    drawn = np.random.default_rng(0).normal(difference, 1.0, size=(100_000, seeds))
    half = stats.t.ppf(0.95, seeds - 1) * stats.sem(drawn, axis=1)
    expected = np.mean(np.abs(drawn.mean(1)) + half < margin)
    assert power_of_equivalence(difference, 1.0, seeds, margin, 0.05) == pytest.approx(expected, abs=0.006)


def test_seeds_to_settle_are_the_fewest_that_have_the_power():
    needed = seeds_for_difference(0.03, 0.03, 0.05)
    assert needed == 10  # the table's detectable difference of 10 seeds is one standard deviation
    assert power(0.03, 0.03, needed, 0.05) >= 0.8 > power(0.03, 0.03, needed - 1, 0.05)
    enough = seeds_for_equivalence(0.0, 0.02, 0.01, 0.05)
    assert (
        power_of_equivalence(0, 0.02, enough, 0.01, 0.05) >= 0.8 > power_of_equivalence(0, 0.02, enough - 1, 0.01, 0.05)
    )
    assert seeds_to_settle(0.03, 0.03, 0.005, 0.05) == needed
    assert seeds_to_settle(0.0, 0.02, 0.01, 0.05) == enough
    assert seeds_for_equivalence(0.02, 0.02, 0.01, 0.05) is None  # larger than the margin
    assert seeds_to_settle(0.0, 1.0, 0.01, 0.05) is None  # more than 1,000


def test_equivalence_cannot_be_shown_where_the_interval_is_wider_than_the_margin():
    # Half of the 90 % interval of three seeds is 2.92 / sqrt(3) = 1.686 standard deviations.
    assert can_show_equivalence(1.0, 3, 1.69, 0.05)
    assert not can_show_equivalence(1.0, 3, 1.68, 0.05)
    assert not can_show_equivalence(1.0, 1, 10.0, 0.05)
    assert not can_show_equivalence(1.0, 3, math.nan, 0.05)
