"""What a sweep's YAML may say."""

import pytest
import yaml

from routerzoo.errors import UserError
from routerzoo.sweep.plan import nested, read_plan

WHOLE = {
    "tasks": {"language": "base.yaml", "vision": ["base.yaml", "more.yaml"]},
    "routers": [
        "LinearRouter",
        {"class_path": "HashRouter", "init_args": {"top_k": 1}},
        {"label": "grown", "config": "more.yaml", "set": {"trainer.max_steps": 7}, "tasks": ["vision"]},
        {"config": "more.yaml", "init_args": {"top_k": 3}},
    ],
    "seeds": [0, 1],
    "grid": {"model.init_args.num_experts": [4, 8]},
    "set": {"trainer.max_steps": 5},
    "test": {"model.init_args.eval_top_k": [1, 2]},
    "margin": {"bpb": 0.02},
}


@pytest.fixture
def write(tmp_path):
    for name in ("base", "more"):
        (tmp_path / f"{name}.yaml").write_text("{}")

    def plan(**changes):
        content = {key: value for key, value in {**WHOLE, **changes}.items() if value is not None}
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
        return read_plan(tmp_path / "sweep.yaml")

    return plan


def test_the_grid_is_what_the_lists_say(write, tmp_path):
    plan = write()
    cells = list(plan.cells())
    assert len(cells) == 2 * (3 + 4) * 2  # seeds, routers in language and in vision, numbers of experts
    assert [cell.seed for cell in cells] == [0] * 14 + [1] * 14
    first = cells[0]
    assert first.label == "language LinearRouter num_experts=4 seed 0"
    assert first.overlay == {
        "seed_everything": 0,
        "trainer": {"max_steps": 5},
        "model": {"init_args": {"num_experts": 4, "router": {"class_path": "LinearRouter"}}},
    }
    hashed = next(cell for cell in cells if cell.router == "HashRouter")
    assert hashed.overlay["model"]["init_args"]["router"] == {"class_path": "HashRouter", "init_args": {"top_k": 1}}
    grown = [cell for cell in cells if cell.router == "grown"]
    assert {cell.task for cell in grown} == {"vision"}
    assert grown[0].overlay["trainer"] == {"max_steps": 7}  # the router's own word stands
    assert [path.name for path in grown[0].configs] == ["base.yaml", "more.yaml", "more.yaml"]
    more = next(cell for cell in cells if cell.router == "more")  # called after its file
    assert more.overlay["model"]["init_args"]["router"] == {"init_args": {"top_k": 3}}
    assert first.arguments(tmp_path / "o.yaml") == [
        "fit",
        "--config",
        str(tmp_path / "base.yaml"),
        "--config",
        str(tmp_path / "o.yaml"),
    ]
    assert first.test_arguments == ["--model.init_args.eval_top_k=[1, 2]"]
    assert plan.baseline == "LinearRouter"
    assert plan.margins == {"bpb": 0.02}


def test_little_is_needed(write):
    plan = write(seeds=None, grid=None, set=None, test=None, margin=None, routers=["HyperRouter"])
    assert [cell.label for cell in plan.cells()] == ["language HyperRouter seed 0", "vision HyperRouter seed 0"]
    assert plan.baseline == "HyperRouter"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routter": []}, "a sweep has no 'routter'; it has tasks, routers"),
        ({"tasks": {}}, "needs tasks"),
        (
            {"tasks": {"language": "nowhere.yaml", "vision": "base.yaml"}},
            "tasks.language names nowhere.yaml, which is neither here nor in",
        ),
        ({"tasks": ["language"]}, "tasks must map names to values"),
        ({"routers": []}, "needs routers"),
        ({"routers": ["A", "A"]}, "two routers are called 'A'"),
        ({"routers": [{"init_args": {}}]}, "a router needs a label, a class_path or a config"),
        ({"routers": [{"klass": "A"}]}, "a router has no 'klass'"),
        ({"routers": [{"label": "A", "tasks": ["audio"]}]}, "A is for the task 'audio', which the sweep does not have"),
        ({"seeds": 3}, "seeds must be a list of whole numbers from 0 on, got 3"),
        ({"seeds": [True]}, r"seeds must be a list of whole numbers from 0 on, got \[True\]"),
        ({"seeds": [0, -1]}, r"seeds must be a list of whole numbers from 0 on, got \[0, -1\]"),
        ({"seeds": [1, 1]}, "a seed is there twice"),
        ({"grid": {"model.x": 3}}, "grid.model.x must be a list of values, got 3"),
        ({"budget": "time"}, "budget must be steps or flops, got 'time'"),
        ({"allow_unequal": 1}, "allow_unequal must be true or false, got 1"),
        ({"fewer_seeds": {"model.y": {4: 1}}}, "fewer_seeds names model.y, which is no axis of the grid"),
        ({"fewer_seeds": {"model.init_args.num_experts": {5: 1}}}, "names 5, which the grid does not have"),
        ({"fewer_seeds": {"model.init_args.num_experts": {4: 3}}}, "must give 4 between 1 and 2 seeds, got 3"),
        ({"baseline": "Nobody"}, "the baseline 'Nobody' is none of the routers"),
        ({"margin": 2}, "margin must map names to values, got 2"),
        ({"margin": {"bpb": -1}}, "margin.bpb must be a positive number, got -1"),
    ],
)
def test_faults_are_named(write, changes, message):
    with pytest.raises(UserError, match=message):
        write(**changes)


def test_what_is_no_sweep_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read the sweep"):
        read_plan(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(UserError, match="is not a YAML file"):
        read_plan(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(UserError, match="describes no sweep"):
        read_plan(tmp_path / "list.yaml")


def test_costly_points_may_have_fewer_seeds(write):
    cells = list(write(fewer_seeds={"model.init_args.num_experts": {8: 1}}).cells())
    assert len(cells) == 7 * (2 + 1)
    assert {cell.seed for cell in cells if cell.settings == {"model.init_args.num_experts": 8}} == {0}


def test_dotted_keys_nest():
    assert nested({"a": {"b": 1}, "a.c": 2, "a.b": 3, "d": [4]}) == {"a": {"b": 3, "c": 2}, "d": [4]}


def test_values_for_all_reach_into_routers_that_are_named(write):
    router = "model.init_args.router.init_args.top_k"
    plan = write(set={router: 4}, routers=["LinearRouter", {"class_path": "HashRouter", "init_args": {"top_k": 1}}])
    linear, hashed = list(plan.cells())[:4:2]
    place = ("model", "init_args", "router")
    chosen = []
    for cell in (linear, hashed):
        value = cell.overlay
        for key in place:
            value = value[key]
        chosen.append(value)
    assert chosen == [
        {"init_args": {"top_k": 4}, "class_path": "LinearRouter"},
        {"class_path": "HashRouter", "init_args": {"top_k": 1}},
    ]
