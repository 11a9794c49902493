"""Commands in folders that cannot be written to, and on disks that are full: each does what it can, in one sentence."""

import logging
import shutil
from pathlib import Path

import pytest

from routerzoo.__main__ import main
from routerzoo.sweep.ledger import Ledger
from tests.cli.test_main import CONFIG, RUN
from tests.cli.test_main import run as run  # fixtures
from tests.cli.test_main import trained as trained
from tests.faults.refusals import full_disk, read_only

BEST = str(RUN / "checkpoints" / "best.ckpt")
EVALUATIONS = {
    "validate": "results.json",
    "test": "results.json",
    "predict": "predictions.jsonl",
    "look": "look.html",
}
OPTIONS = {"predict": ["--model.predict_tokens", "3", "--data.prompts", '["To be"]'], "look": ["--batches", "1"]}


@pytest.fixture(autouse=True)
def logs_that_pytest_keeps_in_files_may_fail(monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)


def said(capsys, *arguments):
    """Run a command that must fail, and return the last line that it says."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code not in (0, None)
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    line = str(ended.value.code) if isinstance(ended.value.code, str) else printed.strip().splitlines()[-1]
    assert "\n" not in line
    assert line.startswith("error: ")
    return line


def files(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", EVALUATIONS)
def test_a_run_that_is_read_only_is_evaluated_all_the_same(run, capsys, command):
    shutil.move("runs", "shared")
    shared = Path("shared", *RUN.parts[1:])
    before = files(shared)
    with read_only(Path("shared")):
        main([command, "--ckpt_path", str(shared / "checkpoints" / "best.ckpt"), *OPTIONS.get(command, [])])
    shown = capsys.readouterr().out
    assert f"{shared} cannot be written to: what this command writes goes to {RUN}" in shown
    assert (RUN / EVALUATIONS[command]).is_file()
    assert files(shared) == before


@pytest.mark.parametrize("command", EVALUATIONS)
def test_an_evaluation_that_can_write_nowhere_says_so(run, capsys, tmp_path, command):
    with read_only(tmp_path):
        line = said(capsys, command, "--ckpt_path", BEST, *OPTIONS.get(command, []))
    assert "cannot create the run folder" in line
    assert "Permission denied" in line
    assert "choose another with --run_dir" in line


@pytest.mark.parametrize("resumed", [False, True])
def test_training_that_can_write_nowhere_says_so(run, capsys, tmp_path, resumed):
    (tmp_path / "config.yaml").write_text(CONFIG)
    resume = ["--ckpt_path", "last", "--run_dir", str(RUN), "--trainer.max_steps", "6"]
    with read_only(tmp_path):
        line = said(capsys, "fit", "--config", "config.yaml", *(resume if resumed else []))
    assert "Permission denied" in line
    assert "runs" in line
    assert "choose another with --run_dir" in line


@pytest.mark.parametrize("arguments", [["sweep", "--config", "sweeps/quick"], ["report", "sweeps/quick"]])
def test_sweeps_that_can_write_nowhere_say_so(capsys, tmp_path, arguments):
    (tmp_path / "sweeps" / "quick").mkdir(parents=True)
    with read_only(tmp_path):
        line = said(capsys, *arguments)
    assert "sweeps/quick" in line


@pytest.mark.parametrize("command", ["validate", "test", "predict", "look"])
def test_an_evaluation_on_a_full_disk_says_what_is_full(run, capsys, command):
    before = (RUN / "config.yaml").read_bytes()
    with full_disk(0):
        line = said(capsys, command, "--ckpt_path", BEST, *OPTIONS.get(command, []))
    assert "File too large" in line
    assert str(RUN) in line
    assert (RUN / "config.yaml").read_bytes() == before
    assert not list(RUN.glob("*.part"))


@pytest.mark.parametrize("size", [0, 1000, 20_000])
def test_training_on_a_full_disk_says_what_is_full(capsys, tmp_path, size):
    (tmp_path / "config.yaml").write_text(CONFIG)
    with full_disk(size):
        line = said(capsys, "fit", "--config", "config.yaml", "--run_dir", "out")
    assert "File too large" in line
    assert "out" in line
    assert not list(Path("out").rglob("*.part"))


def test_commands_that_write_nothing_run_where_nothing_can_be_written(capsys, tmp_path):
    with read_only(tmp_path), full_disk(0):
        main(["routers", "--names"])
        main(["configs"])
        main(["plan", "--config", "language/LinearRouter", "--json"])
    assert "LinearRouter" in capsys.readouterr().out


@pytest.fixture
def sweep(tmp_path):
    """Make a sweep of two finished runs, in the folder `shared`."""
    ledger = Ledger(Path("shared"))
    row = {
        "stage": "final",
        "task": "text",
        "router": "LinearRouter",
        "variant": "LinearRouter",
        "config": "{}",
        "test": [],
    }
    ledger.plan([{**row, "key": f"{seed}", "seed": seed, "folder": f"runs/{seed}"} for seed in range(2)])
    results = {"headline_metric": "bpb", "higher_is_better": False, "seconds": 1.0, "peak memory, bytes": 1}
    for value in (1.0, 2.0):
        run = ledger.claim("code")
        ledger.finish(run.key, "finished", results={"fit": results, "test": {**results, "bpb": value}})
    Path("shared", "plan.json").write_text('{"config": "s.yaml", "baseline": "LinearRouter", "margins": {}}')


def test_a_sweep_that_is_read_only_is_reported_elsewhere(sweep, capsys, tmp_path):
    before = files("shared")
    with read_only(tmp_path / "shared"):
        main(["report", "shared"])
    shown = capsys.readouterr().out
    assert "shared cannot be written to: the report goes to reports/shared" in shown
    assert "1.5" in Path("reports", "shared", "report.md").read_text()
    assert files("shared") == before


def test_a_report_on_a_full_disk_says_what_is_full(sweep, capsys):
    with full_disk(1000):
        line = said(capsys, "report", "shared")
    assert "shared" in line


def test_a_sweep_on_a_full_disk_says_what_is_full(capsys):
    with full_disk(0):
        line = said(capsys, "sweep", "--config", "sweeps/quick", "--folder", "out")
    assert "out" in line


@pytest.mark.full
def test_checks_write_nothing(capsys, tmp_path):
    with read_only(tmp_path), full_disk(0):
        main(["check", "LinearRouter", "--examples", "1"])
    assert "LinearRouter passes all" in capsys.readouterr().out
