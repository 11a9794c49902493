import dataclasses
import json
import pathlib
import sys

import pytest

from routerzoo.bench.choices import RouterChoice
from routerzoo.bench.protocol import Cell, Protocol, make_cell
from routerzoo.bench.rows import Row

PROTOCOL = Protocol(seeds=2, tuning_seeds=2, lrs=(0.1, 0.2, 0.3), aux_scales=(1.0, 0.5))


def cell(name="LinearRouter", protocol=PROTOCOL, task="clusters"):
    return make_cell(task, RouterChoice(name), protocol, "code")


def make(jobs, loss_of):
    """Pretend to make runs."""
    rows = (job.row(status="finished", loss=loss_of(job)) for job in jobs)
    return {row.key: row for row in rows}


def test_halving_keeps_the_better_half_and_final_seeds_are_fresh():
    # Best at half of the steps: 0.2, then 0.3; best of these in the end: 0.3 with half the weight.
    def loss_of(job):
        if job.steps == 100:
            return abs(job.lr - 0.22)
        return 0.1 if (job.lr, job.aux_scale) == (0.3, 0.5) else 0.2

    rows: dict = {}
    first = cell().jobs(rows)
    assert len(first) == 3 * 2 * 2
    assert {(job.stage, job.steps) for job in first} == {("tuning", 100)}
    assert {job.seed for job in first} == {1000, 1001}
    rows |= make(first, loss_of)
    second = cell().jobs(rows)
    assert {(job.lr, job.aux_scale, job.steps) for job in second} == {(0.2, 1.0, 200), (0.2, 0.5, 200), (0.3, 1.0, 200)}


def test_the_lowest_mean_loss_is_chosen_and_a_failed_run_is_the_highest():
    rows: dict = {}
    one = cell("HashRouter")  # without losses, so that learning rates alone are tried
    rows |= make(one.jobs(rows), lambda job: None if (job.lr, job.seed) == (0.1, 1000) else job.lr)
    second = one.jobs(rows)
    assert [job.lr for job in second] == [0.2, 0.3, 0.2, 0.3]
    rows |= make(
        second, lambda job: {(0.2, 1000): 0.3, (0.2, 1001): 0.3, (0.3, 1000): 0.1}.get((job.lr, job.seed), 0.4)
    )
    final = one.jobs(rows)
    assert [(job.stage, job.seed, job.steps, job.lr, job.aux_scale) for job in final] == [
        ("final", 0, 200, 0.3, 1.0),
        ("final", 1, 200, 0.3, 1.0),
    ]
    rows |= make(final, lambda job: 0.1)
    assert one.jobs(rows) == []
    assert one.num_runs == len(rows) == 2 * 3 + 2 * 2 + 2


def test_where_all_settings_have_a_failed_run_the_lowest_mean_of_the_others_counts():
    rows: dict = {}
    one = cell("HashRouter")
    while (jobs := one.jobs(rows))[0].stage == "tuning":
        rows |= make(jobs, lambda job: None if job.seed == 1000 else 1 - job.lr)
    assert {job.lr for job in jobs} == {0.3}


def test_half_made_stages_go_on():
    rows: dict = {}
    jobs = cell().jobs(rows)
    rows |= make(jobs[:5], lambda job: 0.1)
    assert cell().jobs(rows) == jobs[5:]


def test_without_tuning_the_first_learning_rate_and_the_published_weight_are_taken():
    (job,) = cell(protocol=Protocol(seeds=1, tuning_seeds=0)).jobs({})
    assert (job.stage, job.lr, job.aux_scale, job.steps) == ("final", 0.03, 1.0, 200)


def test_a_router_whose_tuning_runs_all_fail_has_no_final_runs_and_counts_as_failed():
    rows: dict = {}
    one = cell("HashRouter")
    rows |= {
        row.key: row for job in one.jobs(rows) for row in [job.row(status="failed", reason="DivergedError: step 3")]
    }
    assert one.jobs(rows) == []
    given_up = one.given_up(rows)
    assert [(row.stage, row.seed, row.steps, row.status) for row in given_up] == [
        ("final", 0, 200, "failed"),
        ("final", 1, 200, "failed"),
    ]
    assert {row.reason for row in given_up} == {"not made, since all tuning runs failed: DivergedError: step 3"}
    assert one.given_up(rows | {row.key: row for row in given_up}) == []
    # One that finishes is enough to go on.
    key = next(iter(rows))
    rows[key] = dataclasses.replace(rows[key], status="finished", loss=0.1)
    assert {job.stage for job in one.jobs(rows)} == {"tuning"}
    assert one.given_up(rows) == []


def test_steps_take_the_flops_of_the_linear_gate():
    # A token's two experts take 2 * 2 * (2 * 32 * 32) = 8,192 operations, the gate 2 * 32 * 16 = 1,024 more.
    steps = {
        name: cell(name, Protocol(budget="flops")).steps
        for name in ("LinearRouter", "HashRouter", "blind", "BaseLayerRouter")
    }
    assert steps == {"LinearRouter": 200, "HashRouter": 225, "blind": 225, "BaseLayerRouter": 360}
    assert cell("HashRouter", Protocol(steps=100, budget="flops")).steps == 112
    assert cell("HashRouter").steps == 200


def test_folders_of_another_budget_have_another_protocol_and_older_ones_keep_theirs():
    assert "budget" not in json.loads(Protocol().text())
    assert json.loads(Protocol(budget="flops").text())["budget"] == "flops"


@pytest.mark.parametrize(
    ("router", "changes", "reason"),
    [
        ("TaskRouter", {}, "TaskRouter requires task_ids, which the task does not provide"),
        (
            "SoftMoERouter",
            {"causal": True},
            "SoftMoERouter is not causal in evaluation: its choices",
        ),
        ("LinearRouter", {"top_k": 17}, "top_k must be between 1 and num_experts = 16, got 17"),
    ],
)
def test_what_a_router_cannot_do_is_a_row_with_the_reason(router, changes, reason, monkeypatch):
    from routerzoo.bench.tasks.clusters import Clusters

    for name, value in changes.items():
        monkeypatch.setattr(Clusters, name, value)
    row = cell(router)
    assert isinstance(row, Row)
    assert row.status == "not applicable"
    assert row.reason.startswith(reason)


def test_a_router_that_is_causal_in_evaluation_does_causal_tasks(monkeypatch):
    from routerzoo.bench.tasks.clusters import Clusters

    monkeypatch.setattr(Clusters, "causal", True)
    assert isinstance(cell("BaseLayerRouter"), Cell)


def test_rows_tell_other_arguments_sizes_and_sources_apart(monkeypatch):
    from routerzoo.bench.tasks.clusters import Clusters

    here = str(pathlib.Path(__file__).parent)
    monkeypatch.setattr(sys, "path", [here, *sys.path])
    usual = cell()
    assert isinstance(usual, Cell)
    assert usual.code == "code"
    noisy = make_cell("clusters", RouterChoice("LinearRouter", {"noisy": True}), PROTOCOL, "code")
    assert noisy.settings != usual.settings
    assert make_cell("clusters", RouterChoice("own_router.OwnRouter"), PROTOCOL, "code").code.startswith("code+")
    assert make_cell(f"{here}/small_task.py", RouterChoice("LinearRouter"), PROTOCOL, "code").code.startswith("code+")
    monkeypatch.setattr(Clusters, "dim", 64)
    assert cell().settings != usual.settings
