"""Scaling laws whose truth is known."""

import math

import numpy as np
import pytest

from routerzoo.report.statistics.scaling import fit_scaling

BUDGETS = [1e9 * 4**place for place in range(4)]
FACTORS = {"Linear": 1.0, "Better": 1.3, "Worse": 0.5}


def losses(noise=0.0, shared=0.0, seeds=10, last=None, rng=None, b=0.3, c=1.2):
    """Return losses of routers with known compute multipliers; the largest budget may have fewer seeds."""
    rng = np.random.default_rng(0) if rng is None else rng
    common = rng.normal(size=(4, seeds)) * shared
    counts = [seeds] * 3 + [last or seeds]
    return {
        name: {
            compute: {
                seed: 2 * (compute * factor / 1e9) ** -b + c + common[place, seed] + rng.normal() * noise
                for seed in range(counts[place])
            }
            for place, compute in enumerate(BUDGETS)
        }
        for name, factor in FACTORS.items()
    }


def test_the_law_is_recovered():
    fit = fit_scaling(losses(seeds=2), draws=300)
    assert fit.exponent.mean == pytest.approx(0.3, rel=0.01)
    assert fit.c[0] == pytest.approx(1.2, abs=0.01)
    for name, factor in FACTORS.items():
        assert fit.multiplier(name, "Linear").mean == pytest.approx(factor, rel=0.01)
    loss, _, _ = fit.curve("Better", [1e9])
    assert loss == pytest.approx([2 * 1.3**-0.3 + 1.2], abs=1e-3)
    assert fit.worst < 1e-3


def test_a_router_that_is_overtaken_has_no_single_multiplier():
    found = losses(noise=0.001, b=0.3)
    # Worth half the compute at the smallest budget, and twice as much at the largest.
    turned = {compute: dict(by_seed) for compute, by_seed in found["Linear"].items()}
    for compute, factor in ((BUDGETS[0], 0.5), (BUDGETS[-1], 2.0)):
        turned[compute] = {seed: (value - 1.2) * factor**-0.3 + 1.2 for seed, value in turned[compute].items()}
    fit = fit_scaling({**found, "Turned": turned}, draws=300)
    assert fit.turns("Turned", "Linear")
    assert not fit.turns("Better", "Linear")
    exponent, floor = fit.b[0], fit.c[0]
    at_first, middle, _, at_last = fit.multipliers("Turned", "Linear").values()
    linear, own = (np.mean(list(of[BUDGETS[0]].values())) for of in (found["Linear"], turned))
    assert at_first.mean == pytest.approx(((linear - floor) / (own - floor)) ** (1 / exponent))
    assert at_first.high < 1 < at_last.low
    assert middle.mean == pytest.approx(1)
    shorter = {compute: value for compute, value in turned.items() if compute != BUDGETS[1]}
    assert math.isnan(list(fit_scaling({**found, "Turned": shorter}).multipliers("Turned", "Linear").values())[1].mean)


def test_one_seed_gives_no_intervals_and_two_budgets_no_law():
    fit = fit_scaling(losses(seeds=1))
    assert math.isnan(fit.multiplier("Better", "Linear").low)
    short = {name: dict(list(found.items())[:2]) for name, found in losses().items()}
    assert fit_scaling(short) is None
    assert fit_scaling({**losses(), "Short": short["Linear"]}, draws=300).routers == list(FACTORS)


def test_a_loss_that_rises_has_no_law():
    rising = {name: {c: {s: -v for s, v in v.items()} for c, v in found.items()} for name, found in losses().items()}
    assert fit_scaling(rising, draws=300) is None


@pytest.mark.full
def test_intervals_cover_the_truth():
    rng = np.random.default_rng(1)
    hits = []
    for _ in range(100):
        fit = fit_scaling(losses(noise=0.005, shared=0.02, last=3, rng=rng), draws=300)
        found = [fit.multiplier(name, "Linear") for name in ("Better", "Worse")]
        truths = [(found[0], 1.3), (found[1], 0.5), (fit.exponent, 0.3)]
        hits.append([middle.low <= truth <= middle.high for middle, truth in truths])
    # 95 % less three standard errors of a hundred tries.
    assert (np.mean(hits, axis=0) > 0.88).all()
