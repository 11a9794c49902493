"""What a report says in sentences."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from routerzoo.report.analysis import analyze
from routerzoo.report.collect import Sweep, Task, data_follow_seed
from routerzoo.report.findings import findings
from routerzoo.report.statistics.power import detectable_difference

BASE = {0: 3.0, 1: 3.2, 2: 3.1, 3: 2.9, 4: 3.05}


def shifted(by, noise=0.0):
    return {seed: value + by + noise * (-1) ** seed for seed, value in BASE.items()}


def run(variant, seed, status="finished", **fit):
    return SimpleNamespace(
        task="language", router=variant, variant=variant, seed=seed, status=status, results={"fit": fit}
    )


def told(values, *, runs=None, fits=None, pending=0, metric="bpb", margins=None):
    """Return the findings of a sweep with one task."""
    fits = fits or {}
    by_variant = {
        name: {seed: run(name, seed, **fits.get(name, {})) for seed, value in by_seed.items() if not math.isnan(value)}
        for name, by_seed in values.items()
    }
    planned = [
        run(n, s, "failed" if math.isnan(v) else "finished") for n, found in values.items() for s, v in found.items()
    ]
    planned += [run("LinearRouter", 90 + place, "waiting") for place in range(pending)]
    task = Task("language", metric, True, values, by_variant, {})
    return " ".join(findings(*(lambda sweep: (sweep, analyze(sweep)))(_sweep(task, planned, margins or {}))))


def _sweep(task, planned, margins):
    return Sweep(Path(), "", "LinearRouter", margins, [task], planned, [])


def test_a_settled_task_names_the_best_the_equals_and_the_worse():
    sentence = told(
        {"LinearRouter": BASE, "XMoERouter": shifted(0.001, 0.001), "HashRouter": shifted(0.5, 0.01)},
        margins={"bpb": 0.05},
    )
    assert sentence == (
        "language: the best mean bpb is 3.0500, of LinearRouter, significantly better than HashRouter. "
        "As good, within 0.05 bits per byte: XMoERouter. "
        "Against LinearRouter, equivalent: XMoERouter; worse: HashRouter."
    )


def test_a_margin_for_another_metric_has_no_effect_and_says_so():
    values = {"LinearRouter": BASE, "HashRouter": shifted(0.5, 0.01)}
    assert told(values, margins={"bpd": 0.1, "bpb": 0.1}).startswith(
        "The margin for bpd has no effect: the tasks are measured in bpb. language: "
    )


def test_what_is_open_comes_with_what_would_settle_it():
    sentence = told({"LinearRouter": BASE, "XMoERouter": shifted(0.02, 0.03)})
    # Differences 0.05, -0.01, 0.05, -0.01, 0.05: mean 0.026, standard deviation 0.0329.
    assert "Not significantly different from it, nor shown to be as good: XMoERouter." in sentence
    assert "With so many seeds, differences of 0.055 bits per byte are found with 80 % power." in sentence
    assert "Equivalence within 0.005 bits per byte cannot be shown with so few seeds, whatever they give." in sentence
    assert "Seeds that would settle it, should the differences stay: XMoERouter 15." in sentence


def test_a_metric_without_a_margin_says_so():
    sentence = told({"LinearRouter": BASE, "XMoERouter": shifted(0.02, 0.03)}, metric="recall")
    assert "Equivalence is not tested: recall has no margin (give the sweep margin: {recall: ...})." in sentence


def test_failed_runs_are_told_and_never_the_best():
    values = {
        "LinearRouter": BASE,
        "XMoERouter": {**shifted(-1.0), 4: math.nan},
        "HashRouter": dict.fromkeys(BASE, math.nan),
    }
    sentence = told(values)
    assert sentence.startswith("6 of 15 runs failed; they count as the worst of their task. ")
    assert "the best mean bpb is 3.0500, of LinearRouter." in sentence
    assert "failed at every seed: HashRouter" in sentence
    assert "Failed runs: XMoERouter 1, HashRouter 5." in sentence


def test_what_failed_is_not_called_significantly_worse():
    sentence = told({"LinearRouter": {0: 3.0}, "XMoERouter": {0: math.nan}})
    assert (
        "the best mean bpb is 3.0000, of LinearRouter. Against LinearRouter, failed at every seed: XMoERouter."
        in sentence
    )


def test_a_report_of_a_running_sweep_is_provisional():
    values = {"LinearRouter": BASE, "XMoERouter": shifted(0.03, 0.01)}  # p = 0.008
    assert "worse: XMoERouter" in told(values)
    sentence = told(values, pending=2)
    assert (
        "Provisional: 2 of 12 runs are pending. Until they are done, a verdict needs a corrected p below 0.001"
        in sentence
    )
    assert "worse: XMoERouter" not in sentence


def test_a_mean_over_fewer_seeds_is_not_called_the_best():
    values = {"LinearRouter": {0: 3.0, 1: 3.2}, "HashRouter": {0: 3.3, 1: 3.1}, "XMoERouter": {0: 2.0}}
    sentence = told(values, pending=1)
    assert "the best mean bpb is 3.1000, of LinearRouter." in sentence
    assert "Left out, with fewer seeds: XMoERouter." in sentence


@pytest.mark.parametrize(
    ("fits", "expected"),
    [
        ({"trained k": 2, "training FLOPs": 1e9}, None),
        ({"trained k": 2.01, "training FLOPs": 1.02e9}, None),
        ({"trained k": 1, "training FLOPs": 1e9}, "Not trained with equal k (LinearRouter 2, HashRouter 1)."),
        (
            {"trained k": 2, "training FLOPs": 4e9},
            "Not trained with equal FLOPs (LinearRouter 1.0 G, HashRouter 4.0 G): differences",
        ),
    ],
)
def test_unequal_budgets_are_flagged(fits, expected):
    equal = {"trained k": 2, "training FLOPs": 1e9}
    sentence = told(
        {"LinearRouter": BASE, "HashRouter": shifted(0.5)}, fits={"LinearRouter": equal, "HashRouter": fits}
    )
    assert ("Not trained with equal" in sentence) == (expected is not None)
    assert expected is None or expected in sentence


@pytest.mark.parametrize(
    ("config", "paired"),
    [
        ("data: {init_args: {seed: null}}", True),
        ("data: {init_args: {seed: 3}}", True),
        ("data: {init_args: {seed: 0}}", False),
        ("data: {init_args: {}}", True),
        ("", True),
    ],
)
def test_runs_of_a_seed_are_pairs_where_the_data_follow_it(config, paired):
    assert data_follow_seed(SimpleNamespace(config=config, seed=3)) == paired


def analysis_of(values, paired=True):
    planned = [run(name, seed) for name, found in values.items() for seed in found]
    task = Task("language", "bpb", True, values, {}, {}, paired)
    return analyze(_sweep(task, planned, {})).tasks["language"]


def test_pairing_is_worth_what_the_correlation_says():
    values = {"LinearRouter": BASE, "XMoERouter": shifted(0.05, 0.02)}
    pairs, others = analysis_of(values), analysis_of(values, paired=False)
    expected = np.corrcoef(*[list(found.values()) for found in values.values()])[0, 1]
    assert pairs.correlation("XMoERouter", "LinearRouter") == pytest.approx(expected)
    assert pairs.pairs["XMoERouter", "LinearRouter"].test == "paired t-test"
    assert others.pairs["XMoERouter", "LinearRouter"].test == "Welch's t-test"
    assert pairs.pairs["XMoERouter", "LinearRouter"].p < others.pairs["XMoERouter", "LinearRouter"].p


@pytest.mark.parametrize("paired", [True, False])
def test_the_outlook_is_that_of_the_spread_between_seeds(paired):
    found = analysis_of({"LinearRouter": BASE, "XMoERouter": shifted(0.02, 0.03)}, paired)
    comparison = found.pairs["XMoERouter", "LinearRouter"]
    both = [np.array(list(values.values())) for values in found.results.values.values()]
    sd = np.std(both[1] - both[0], ddof=1) if paired else math.sqrt((both[0].var(ddof=1) + both[1].var(ddof=1)) / 2)
    assert found.outlook(comparison).detectable == pytest.approx(detectable_difference(sd, 5, 0.05, paired=paired))
