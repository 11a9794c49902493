"""Reports of single runs, and of sweeps while they run."""

import json
from types import SimpleNamespace

import pytest
import yaml

from routerzoo.cli import report
from routerzoo.errors import UserError
from routerzoo.report import watch as watching
from routerzoo.report.collect import read_sweep
from routerzoo.report.single_runs import read_runs
from routerzoo.sweep.ledger import Ledger


@pytest.fixture
def run(tmp_path):
    """Return a function that makes up the folder of a run of `fit`."""

    def write(name, router="LinearRouter", seed=0, lr=0.001, loss=3.0, tested=True, dataset="tiny-shakespeare"):
        folder = tmp_path / name
        folder.mkdir()
        config = {"seed_everything": seed, "run_dir": name, "data": {"init_args": {"dataset": dataset, "seed": None}}}
        optimizer = {"init_args": {"lr": lr}}
        config["model"] = {"init_args": {"router": {"class_path": f"routerzoo.{router}"}, "optimizer": optimizer}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        metric = {"headline_metric": "bpb", "higher_is_better": False}
        found = {"fit": {**metric, "best bpb": loss - 0.1, "trained k": 2.0, "training FLOPs": 1e9}}
        if tested:
            found["test"] = {**metric, "bpb": loss}
        (folder / "results.json").write_text(json.dumps(found))
        return folder

    return write


def test_runs_become_variants_tasks_and_seeds(run, tmp_path):
    folders = [
        run(f"{name}-{seed}", name, seed, loss=3 + seed) for name in ("HashRouter", "LinearRouter") for seed in (0, 1)
    ]
    folders.append(run("other", dataset="enwik8", loss=1.0))
    sweep = read_runs(folders, tmp_path / "out")
    assert sweep.baseline == "LinearRouter"
    assert sweep.note == ""
    assert {task.name: dict(task.values) for task in sweep.tasks} == {
        "tiny-shakespeare": {"HashRouter": {0: 3.0, 1: 4.0}, "LinearRouter": {0: 3.0, 1: 4.0}},
        "enwik8": {"LinearRouter": {0: 1.0}},
    }
    assert sweep.runs[0].folder == "../HashRouter-0"


@pytest.mark.parametrize(
    ("dataset", "name"),
    [("p.jsonl", "p.jsonl"), ("corpora/p.jsonl", "p.jsonl"), (["play", "notes/p.jsonl"], "play+p.jsonl")],
)
def test_a_task_is_called_by_its_data(run, tmp_path, dataset, name):
    sweep = read_runs([run("a", dataset=dataset), run("b", "HashRouter", dataset=dataset)], tmp_path / "out")
    assert [task.name for task in sweep.tasks] == [name]


def test_data_of_one_name_in_different_folders_are_different_tasks(run, tmp_path):
    folders = [
        run("a", dataset="one/text.txt"),
        run("b", "HashRouter", dataset="two/text.txt"),
        run("c", dataset="x/y"),
    ]
    sweep = read_runs(folders, tmp_path / "out")
    assert [one.task for one in sweep.runs] == ["one/text.txt", "two/text.txt", "y"]


def test_runs_with_other_tokenizers_are_compared_by_bits_per_byte(run, tmp_path):
    def with_tokens(name, tokenizer, ppl, bpb, router):
        folder = run(name, router)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["data"]["init_args"]["tokenizer"] = tokenizer
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        found = json.loads((folder / "results.json").read_text())
        for stage in found.values():
            stage |= {"headline_metric": "ppl", "ppl": ppl, "best ppl": ppl, "bpb": bpb}
        (folder / "results.json").write_text(json.dumps(found))
        return folder

    large = with_tokens("large", "bpe-8192", 900.0, 1.25, "LinearRouter")
    small = with_tokens("small", "bpe-512", 20.0, 1.5, "HashRouter")
    same = with_tokens("same", "bpe-8192", 950.0, 1.375, "HashRouter")
    (task,) = read_runs([large, small], tmp_path / "out").tasks
    assert (task.metric, task.values) == ("bpb", {"LinearRouter": {0: 1.25}, "HashRouter": {0: 1.5}})
    report.main([str(large), str(same), "--out", str(tmp_path / "page")])
    page = (tmp_path / "page" / "report.md").read_text()
    assert "| router | ppl (lower is better) | bits per byte |" in page
    assert "| LinearRouter | 900.0000 | 1.2500 |" in page
    found = json.loads((small / "results.json").read_text())
    del found["test"]["bpb"]
    (small / "results.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"different tokenizers, and .*small has no bits per byte to compare them by"):
        read_runs([large, small], tmp_path / "out")


def test_what_differs_beside_the_router_is_said(run, tmp_path):
    folders = [run("a"), run("b", lr=0.002), run("c", "HashRouter", lr=0.002, tested=False)]
    sweep = read_runs(folders, tmp_path / "out")
    assert list(sweep.tasks[0].values) == ["LinearRouter lr=0.001", "LinearRouter lr=0.002", "HashRouter"]
    assert sweep.baseline == "LinearRouter lr=0.001"
    assert "differ in more than router and seed: model.init_args.optimizer.init_args.lr." in sweep.note
    assert "c was not tested, so that the best validation of each run is compared" in sweep.note
    assert sweep.tasks[0].values["HashRouter"] == {0: 2.9}


def test_what_is_no_run_is_named(run, tmp_path):
    folder = run("a")
    again = run("b")
    with pytest.raises(UserError, match="b has the config and the seed of another run"):
        read_runs([folder, again], tmp_path / "out")
    with pytest.raises(UserError, match="no run of the baseline 'XMoERouter'; there are LinearRouter"):
        read_runs([folder], tmp_path / "out", "XMoERouter")
    with pytest.raises(UserError, match="nothing is neither a sweep's folder nor a run's"):
        read_runs([tmp_path / "nothing"], tmp_path / "out")
    (folder / "results.json").unlink()
    with pytest.raises(UserError, match="has no results"):
        read_runs([folder], tmp_path / "out")


def test_the_command_tells_runs_from_sweeps(run, made_up, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("a"), run("b", "HashRouter")
    report.main(["a", "b"])
    out = capsys.readouterr().out
    assert "Nothing can be decided: one seed shows no spread. LinearRouter had the best run" in out
    page = (tmp_path / "reports/runs/report.html").read_text()
    assert 'href="../../a/config.yaml"' in page
    sweep = made_up(routers=("LinearRouter",), seeds=1, curves=False)
    for arguments, reason in (
        (["a", str(sweep)], "is a sweep's folder: report one sweep, or several runs"),
        (["a", "--watch"], "--watch is for the folder of a sweep"),
    ):
        with pytest.raises(SystemExit, match=reason):
            report.main(arguments)


def test_watching_ends_with_the_sweep(made_up, monkeypatch):
    waiting = ("language HashRouter seed 1",)
    folder = made_up(routers=("LinearRouter", "HashRouter"), seeds=2, waiting=waiting, curves=False)
    ledger = Ledger(folder)
    claimed = ledger.claim("1.0")
    written, slept = [], []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 2:
            done = next(run for run in read_sweep(folder).runs if run.seed == 0)
            ledger.finish(claimed.key, "finished", results=done.results)
            monkeypatch.setattr(Ledger, "is_worked_on", lambda self: False)

    monkeypatch.setattr(watching, "time", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(watching, "write_report", lambda sweep, refresh: written.append(refresh))
    assert Ledger(folder).is_worked_on()
    left = watching.watch(folder, 7.0, lambda report: None)
    assert left == 0
    assert slept == [7.0, 7.0, watching.IDLE_SECONDS]
    assert written == [7.0, 7.0, 7.0, None]


def test_a_sweep_that_nobody_works_on_is_not_watched_for_ever(made_up, monkeypatch):
    monkeypatch.setattr(watching, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(watching, "write_report", lambda sweep, refresh: refresh)
    folder = made_up(routers=("LinearRouter",), seeds=2, waiting=("language LinearRouter seed 1",), curves=False)
    refreshes = []
    assert watching.watch(folder, 7.0, refreshes.append) == 1
    assert refreshes == [7.0] * (watching.PATIENCE - 1) + [None]


def test_a_sweep_without_a_finished_run_has_a_page(made_up):
    labels = ("language LinearRouter seed 0",)
    folder = made_up(routers=("LinearRouter",), seeds=1, waiting=labels, curves=False)
    watching.write_report(read_sweep(folder, may_be_empty=True), refresh=5)
    page = (folder / "report.html").read_text()
    assert "No run has finished yet: there is nothing to decide." in page
    assert "Provisional: 1 of 1 runs are pending" in page
    assert '<meta http-equiv="refresh" content="5">' in page
    with pytest.raises(UserError, match=r"no run in .* has finished yet"):
        read_sweep(folder)
