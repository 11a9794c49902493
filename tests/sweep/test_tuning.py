"""Successive halving, without runs."""

import math

import pytest
import yaml

from routerzoo.errors import UserError
from routerzoo.sweep.plan import Cell, Tune, nested, read_plan
from routerzoo.sweep.tuning import Tuning, trial_score

LR = "model.lr"


def place(tune, steps=100):
    cell = Cell("text", "R", 0, {"model.num_experts": 4}, (), nested({"trainer.max_steps": 7, "model.d": 2}), {})
    return Tuning(cell, tune, steps)


def test_the_better_half_goes_on_to_twice_the_steps_and_starts_anew():
    tuning = place(Tune({LR: (1, 2, 3), "model.z": (0, 5)}, seeds=(10, 11), rungs=3))
    rungs = []
    while not tuning.is_over:
        assert tuning.best is None
        cells = tuning.cells()
        rungs.append(
            [(c.overlay["trainer"]["max_steps"], c.overlay["model"]["lr"], c.overlay["model"]["z"]) for c in cells[::2]]
        )
        assert [cell.seed for cell in cells[:2]] == [10, 11]
        assert {cell.stage for cell in cells} == {"trial"}
        assert len({cell.label for cell in cells}) == len(cells)
        # A trial has not ended yet.
        assert not tuning.advance(lambda cell: None if cell.seed == 11 else 0.0)
        # The larger the better; the seeds disagree.
        assert tuning.advance(lambda cell: -cell.overlay["model"]["lr"] + (cell.seed - 10) * 0.1)
    points = [(lr, z) for lr in (1, 2, 3) for z in (0, 5)]
    assert rungs[0] == [(25, *point) for point in points]
    assert rungs[1] == [(50, 3, 0), (50, 3, 5), (50, 2, 0)]
    assert rungs[2] == [(100, 3, 0), (100, 3, 5)]
    assert tuning.best == {LR: 3, "model.z": 0}
    assert not tuning.cells()
    assert len(tuning.history) == 2 * (6 + 3 + 2)
    assert [row["kept"] for row in tuning.history[-4:]] == [True, True, False, False]


def test_failed_trials_are_the_worst_and_all_of_them_leave_nothing():
    tuning = place(Tune({LR: (1, 2)}, rungs=1))
    assert tuning.cells()[0].overlay["trainer"]["max_steps"] == 100
    tuning.advance(lambda cell: math.inf if cell.overlay["model"]["lr"] == 1 else 9.0)
    assert tuning.best == {LR: 2}
    tuning = place(Tune({LR: (1, 2)}, rungs=2))
    tuning.advance(lambda cell: math.inf)
    assert (tuning.is_over, tuning.failed, tuning.best) == (True, True, None)


def test_where_all_points_have_a_failed_trial_the_one_with_the_fewest_and_the_lowest_mean_is_chosen():
    scores = {(1, 10): 2.0, (1, 11): math.inf, (2, 10): math.inf, (2, 11): 1.0, (3, 10): math.inf, (3, 11): math.inf}
    tuning = place(Tune({LR: (3, 1, 2)}, seeds=(10, 11), rungs=1))
    tuning.advance(lambda cell: scores[cell.overlay["model"]["lr"], cell.seed])
    assert (tuning.best, tuning.failed) == ({LR: 2}, False)


def test_a_space_is_tried_in_part_without_repetition_and_the_same_way_always():
    tune = Tune({LR: tuple(range(10)), "model.z": (0, 1)}, trials=5)
    points = tune.points()
    assert points == tune.points()
    assert len({tuple(point.values()) for point in points}) == 5
    assert all(point in Tune(tune.space).points() for point in points)


@pytest.mark.parametrize(
    ("status", "results", "expected"),
    [
        ("waiting", {}, None),
        ("running", {}, None),
        ("failed", {}, math.inf),
        ("finished", {"headline_metric": "bpb", "higher_is_better": False, "best bpb": 2.0, "bpb": 3.0}, 2.0),
        ("finished", {"headline_metric": "accuracy", "higher_is_better": True, "best accuracy": 0.5}, -0.5),
        ("finished", {"headline_metric": "bpb", "higher_is_better": False, "best bpb": math.nan}, math.inf),
        ("finished", {"headline_metric": "bpb", "higher_is_better": False, "best bpb": None}, math.inf),
    ],
)
def test_a_trials_score_is_its_best_validation(status, results, expected):
    from types import SimpleNamespace

    assert trial_score(SimpleNamespace(status=status, results={"fit": results})) == expected


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"space": {}}, "tune needs a space"),
        ({"spaces": {}}, "tune has no 'spaces'; it has space, trials"),
        ({"space": {LR: 3}}, "tune.space.model.lr must be a list of values, got 3"),
        ({"space": {"model.n": [1]}}, "model.n is an axis of the grid, so that it cannot be tuned too"),
        ({"space": {LR: [1, 2]}, "trials": 3}, "tune.trials must be a whole number from 1 to 2, got 3"),
        ({"space": {LR: [1]}, "factor": 1}, "tune.factor must be a whole number from 2 to 10, got 1"),
        (
            {"space": {LR: [1]}, "seeds": [1, 1]},
            r"tune.seeds must be a list of different .*, got \[1, 1\]",
        ),
        ({"space": {LR: [1]}, "seeds": [7, 0]}, "the seed 0 is among seeds too, but tuning needs seeds of its own"),
        ({"space": {LR: [1]}, "untuned": 1}, "tune.untuned must be true or false, got 1"),
    ],
)
def test_faults_are_named(tune, message, tmp_path):
    (tmp_path / "base.yaml").write_text("{}")
    plan = {"tasks": {"text": "base.yaml"}, "routers": ["A"], "grid": {"model.n": [1, 2]}, "tune": tune}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(UserError, match=message):
        read_plan(tmp_path / "sweep.yaml")
