"""What a report decides, and that it decides nothing where nothing can be told apart."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from routerzoo.report.analysis import analyze
from routerzoo.report.collect import Sweep, Task
from routerzoo.report.decision import decide

BASE = {0: 3.0, 1: 3.2, 2: 3.1, 3: 2.9, 4: 3.05}
FLOPS = {"fit": {"trained k": 2, "training FLOPs": 1e9}}


def shifted(by, noise=0.0):
    return {seed: value + by + noise * (-1) ** seed for seed, value in BASE.items()}


def decided(values, *, margin=None, lower_is_better=True, flops=None, pending=0, tasks=("language",)):
    """Return the decisions on tasks of equal results."""
    flops, runs, found = flops or {}, [], []
    for task in tasks:
        for name, by_seed in values.items():
            for seed, value in by_seed.items():
                results = {"fit": {"trained k": 2, "training FLOPs": 1e9 * flops.get(name, 1)}}
                status = "failed" if math.isnan(value) else "finished"
                runs.append(_run(task, name, seed, status, results))
        runs += [_run(task, "LinearRouter", 90 + place, "waiting", {}) for place in range(pending)]
        own = {n: {r.seed: r for r in runs if (r.task, r.router, r.status) == (task, n, "finished")} for n in values}
        found.append(Task(task, "bpb", lower_is_better, values, own, {}))
    sweep = Sweep(Path(), "", "LinearRouter", {"bpb": margin} if margin else {}, found, runs, [])
    return decide(sweep, analyze(sweep))


def _run(task, name, seed, status, results):
    return SimpleNamespace(task=task, router=name, variant=name, seed=seed, status=status, results=results)


def test_a_settled_task_is_a_choice_with_its_equals_and_its_cost():
    values = {"LinearRouter": BASE, "XMoERouter": shifted(0.001, 0.001), "HashRouter": shifted(0.5, 0.01)}
    (decision,) = decided(values, margin=0.05)
    assert decision.title == "language: at 1.0 G training FLOPs"
    assert decision.answer == "Choose LinearRouter or one as good: bpb 3.05."
    assert decision.is_settled
    assert decision.lines["As good"] == "XMoERouter (within 0.05 bits per byte)"
    assert decision.lines["Worse"] == "HashRouter"
    # The differences of HashRouter are 0.51, 0.49, 0.51, 0.49, 0.51: 0.502 and an error of 0.0049, times 2.78.
    assert decision.lines["Cost of choosing wrong"].endswith("HashRouter 0.5 (0.49 to 0.52) bits per byte")
    assert "To settle it" not in decision.lines


def test_where_nothing_is_told_apart_it_says_so_and_what_would_settle_it():
    (decision,) = decided({"LinearRouter": BASE, "XMoERouter": shifted(0.02, 0.03)})
    assert decision.answer == "No router can be told from the best. The best mean is that of LinearRouter, bpb 3.05."
    assert not decision.is_settled
    # As in the findings: 15 seeds would do, five are there.
    assert decision.lines["To settle it"] == "10 more seeds for XMoERouter"
    assert decision.lines["Detectable"] == "differences of 0.055 bits per byte, with 5 seeds and 80 % power"
    assert decision.lines["Cost of choosing wrong"].startswith("XMoERouter at most 0.0")


@pytest.mark.parametrize(
    ("values", "answer"),
    [
        ({"LinearRouter": BASE}, "Only LinearRouter was run: there is nothing to choose from."),
        (
            {"LinearRouter": {0: 3.0}, "XMoERouter": {0: 2.9}},
            "Nothing can be decided: one seed shows no spread. XMoERouter had the best run, bpb 2.9.",
        ),
        ({"LinearRouter": dict.fromkeys(BASE, math.nan)}, "Every run failed."),
        (
            {"LinearRouter": {0: 3.0}, "XMoERouter": {0: math.nan}},
            "Nothing can be decided: one seed shows no spread. LinearRouter had the best run, bpb 3.",
        ),
    ],
)
def test_what_cannot_be_decided(values, answer):
    (decision,) = decided(values)
    assert decision.answer == answer
    assert not decision.is_settled


def test_the_best_at_a_larger_budget_is_no_choice():
    values = {"LinearRouter": BASE, "XMoERouter": shifted(-0.5, 0.01)}
    (decision,) = decided(values, flops={"XMoERouter": 4})
    assert decision.answer == "XMoERouter has the best mean, bpb 2.552, with up to 4 times the FLOPs of others."
    assert not decision.is_settled
    assert decision.lines["Not equal"] == "training FLOPs (XMoERouter 4.0 G)"
    # With less compute it is one.
    (decision,) = decided(values, flops={"XMoERouter": 0.5})
    assert decision.answer == "Choose XMoERouter: bpb 2.552."


def test_costs_follow_the_direction_of_the_metric():
    values = {"LinearRouter": shifted(-2.8), "XMoERouter": shifted(-2.9, 0.01)}  # shares, the higher the better
    (decision,) = decided(values, lower_is_better=False)
    assert decision.answer == "Choose LinearRouter: bpb 0.25."
    assert decision.lines["Cost of choosing wrong"] == "XMoERouter 0.098 (0.084 to 0.11) bits per byte"


def test_failed_runs_are_named_and_their_cost_is_not_known():
    (decision,) = decided({"LinearRouter": BASE, "XMoERouter": {**shifted(-1.0), 4: math.nan}})
    assert decision.lines["Failed runs"] == "XMoERouter 1 of 5"
    assert decision.lines["Cost of choosing wrong"] == "XMoERouter not known"
    assert decision.lines["To settle it"] == "an unknown number of seeds for XMoERouter"


def test_several_tasks_have_an_answer_over_all():
    values = {"LinearRouter": BASE, "XMoERouter": shifted(0.5, 0.01), "HashRouter": shifted(0.02, 0.03)}
    over_all, *each = decided(values, tasks=("language", "vision"), pending=1)
    assert over_all.title == "All 2 tasks"
    assert over_all.answer == "LinearRouter, HashRouter: in no task shown to be worse than the best."
    assert over_all.lines["Best mean"] == "LinearRouter in all of them"
    assert len(each) == 2
    assert all(decision.is_provisional for decision in (over_all, *each))
