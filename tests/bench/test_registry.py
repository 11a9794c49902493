from importlib.metadata import EntryPoint

import pytest
import torch

from routerzoo import registry as routers
from routerzoo.bench import registry
from routerzoo.bench.registry import list_tasks, register_task, task_class
from routerzoo.bench.run import check_passes
from routerzoo.bench.task import Batch, BenchTask, apply_maps, check_task, linear_maps
from routerzoo.bench.tasks.clusters import Clusters
from routerzoo.errors import UserError


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_tasks", dict(registry._tasks))


def test_tasks_are_known_by_name():
    assert "clusters" in list_tasks()
    assert task_class("clusters") is Clusters
    with pytest.raises(UserError, match="unknown task 'cluster'; did you mean 'clusters'"):
        task_class("cluster")


def test_a_file_is_a_task(small_task):
    cls = task_class(small_task)
    assert (cls.name, cls.__name__) == ("signs", "Signs")
    assert task_class(small_task) is cls
    check_task(cls)


def test_a_file_that_defines_no_task_is_refused(tmp_path):
    path = tmp_path / "mine.py"
    with pytest.raises(UserError, match=r"there is no task file .*mine\.py"):
        task_class(str(path))
    path.write_text("from routerzoo.bench.tasks.clusters import Clusters\n")
    with pytest.raises(UserError, match=r"a task file defines one BenchTask with a name, .*mine\.py defines none"):
        task_class(str(path))
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0\n")
    with pytest.raises(UserError, match=r"broken\.py cannot be imported: ZeroDivisionError"):
        task_class(str(broken))


def test_an_entry_point_is_a_task(monkeypatch, tmp_path):
    (tmp_path / "bench_plugin.py").write_text(
        "from routerzoo.bench.tasks.clusters import Clusters\n\n"
        "class Theirs(Clusters):\n    '''Another.'''\n    name = 'theirs'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    point = EntryPoint("theirs", "bench_plugin:Theirs", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(routers, "entry_points", lambda group: [point] if group == point.group else [])
    monkeypatch.setattr(
        routers._registry, "groups_loaded", routers._registry.groups_loaded - {registry.ENTRY_POINT_GROUP}
    )
    assert "theirs" in list_tasks()
    assert task_class("theirs").__name__ == "Theirs"


def test_names_are_unique():
    with pytest.raises(ValueError, match=r"a task called 'clusters' exists already: routerzoo\.bench\.tasks"):
        register_task(type("Mine", (Clusters,), {}))
    with pytest.raises(ValueError, match="BenchTask has no name, or does not implement batch"):
        register_task(BenchTask)


def batch_of(**changes):
    def batch(self, tokens, generator, progress):
        fields = dict.fromkeys(("domain_T", "token_ids_T"), torch.zeros(tokens, dtype=torch.int64))
        x_TD = torch.zeros(tokens, self.dim)
        return Batch(**{"x": x_TD, "target": x_TD, **fields, **{n: change(tokens) for n, change in changes.items()}})

    return {"batch": batch}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 100}, "wrong: tokens must be a multiple of sequence_length = 32"),
        (batch_of(domain_T=lambda tokens: torch.full((tokens,), 8)), "wrong: there is a domain 8, and only 8 of them"),
        (batch_of(token_ids_T=lambda tokens: torch.zeros(2)), "a batch of 64 tokens has token ids of shape [2]"),
        ({"oracle": lambda self, batch: batch.domain_T}, "oracle must return experts below 16, [tokens, k], got [64]"),
        ({"num_domains": 17}, "oracle must return experts below 16, [tokens, k], got [64, 0]"),
        (
            batch_of(domain_T=lambda tokens: torch.full((tokens,), -2)),
            "wrong: there is a domain -2, and only 8 of them",
        ),
        ({"batch": lambda self, *args: 1 / 0}, "the task wrong cannot be drawn: ZeroDivisionError"),
    ],
)
def test_a_task_that_is_wrong_says_so(changes, message):
    with pytest.raises(UserError) as error:
        check_task(type("Wrong", (Clusters,), {"name": "wrong", **changes}))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            batch_of(target=lambda tokens: torch.zeros(tokens, 3)),
            "the task wrong cannot be trained on: RuntimeError: The size of tensor a (32) must match",
        ),
        (
            {"token_losses": lambda self, output, batch: output.square().mean()},
            "wrong: token_losses must return a loss for each of 512 tokens, got []",
        ),
    ],
)
def test_a_task_whose_model_or_loss_is_wrong_says_so_before_the_runs(changes, message):
    with pytest.raises(UserError) as error:
        check_passes(type("Wrong", (Clusters,), {"name": "wrong", **changes}))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_maps_are_those_of_the_domain():
    generator = torch.Generator().manual_seed(0)
    maps_CDD = linear_maps(3, 4, generator, rank=2)
    assert torch.linalg.matrix_rank(maps_CDD).tolist() == [2, 2, 2]
    x_TD = torch.randn(4, 4, generator=generator)
    y_TD = apply_maps(maps_CDD, torch.tensor([2, 0, -1, 2]), x_TD)
    torch.testing.assert_close(y_TD[0], maps_CDD[2] @ x_TD[0])
    torch.testing.assert_close(y_TD[1], maps_CDD[0] @ x_TD[1])
    assert not y_TD[2].any()
