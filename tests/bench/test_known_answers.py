"""Orders of routers that the committed record is sure of must not turn: two tasks at three fresh seeds."""

import itertools
from pathlib import Path

import pytest

from routerzoo.bench.choices import RouterChoice
from routerzoo.bench.protocol import Job, Protocol
from routerzoo.bench.registry import task_class
from routerzoo.bench.rows import Row, read_rows
from routerzoo.bench.scores import regret_difference, summaries
from routerzoo.bench.work import do

RECORD = Path(__file__).parents[2] / "benchmarks/results/router_bench.csv"
TASKS = ("clusters", "ids")
ROUTERS = ("oracle", "blind", "LinearRouter", "RandomFrozenRouter", "HashRouter")
SEEDS = range(2000, 2003)
SURE_ERRORS = 5.0


def turned(record, fresh):
    """Return the pairs of routers whose order in `fresh` is not that of the record, where the record is sure."""
    recorded, now = ({summary.router: summary for summary in summaries(rows)} for rows in (record, fresh))
    found = []
    for better, worse in itertools.permutations(sorted(recorded.keys() & now.keys()), 2):
        difference, error = regret_difference(recorded[better], recorded[worse])
        if difference < -SURE_ERRORS * error and now[better].regret >= now[worse].regret:
            found.append((better, worse))
    return found


def recorded_rows(task):
    return [row for row in read_rows(RECORD) if row.task == task] if RECORD.exists() else []


@pytest.mark.full
@pytest.mark.parametrize("task", TASKS)
def test_no_order_turns_that_the_record_or_theory_is_sure_of(task):
    record = recorded_rows(task)
    final = {row.router: row for row in record if row.stage == "final"}
    fresh = []
    for name in ROUTERS:
        lr, aux_scale = (final[name].lr, final[name].aux_scale) if name in final else (Protocol().lrs[0], 1.0)
        for seed in SEEDS:
            fresh.append(
                do(Job(task, RouterChoice(name), "final", seed, task_class(task).steps, lr, aux_scale, "", ""))
            )
    assert {row.status for row in fresh} == {"finished"}
    assert turned(record, fresh) == []
    now = {summary.router: summary.regret for summary in summaries(fresh)}
    for prediction in task_class(task).predictions:
        if {prediction.better, prediction.worse} <= now.keys():
            assert now[prediction.better] < now[prediction.worse], prediction


def rows(losses, seeds=20, spread=0.01):
    return [
        Row("clusters", router, "final", seed, 200, 0.03, 1.0, "finished", loss=loss + spread * (seed % 3 - 1) * weight)
        for router, (loss, weight) in {"oracle": (0, 0), "blind": (1, 0), **losses}.items()
        for seed in range(seeds)
    ]


def test_an_order_that_turns_is_found_where_the_record_is_sure():
    record = rows({"a": (0.30, 1), "b": (0.35, -1), "c": (0.301, 0)})
    assert turned(record, rows({"a": (0.3, 1), "b": (0.4, 1), "c": (0.2, 1)}, seeds=3)) == []
    assert turned(record, rows({"a": (0.4, 1), "b": (0.3, 1)}, seeds=3)) == [("a", "b")]
    assert turned(record, rows({"a": (1.2, 1)}, seeds=3)) == [("a", "blind")]
    assert turned([], rows({"a": (0.4, 1)})) == []
