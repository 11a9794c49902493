"""Sweeps as a user runs them: processes, kills, failures, and the same numbers by hand."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from filelock import FileLock, Timeout

from routerzoo.report.collect import read_sweep
from routerzoo.sweep import work
from routerzoo.sweep.engine import LocalEngine
from routerzoo.sweep.ledger import Ledger

BASE = {
    "model": {
        "class_path": "LanguageModeling",
        "init_args": {
            "d_model": 16,
            "num_blocks": 1,
            "num_heads": 2,
            "num_experts": 4,
            "dropout": 0.1,
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}},
            "experts": {"class_path": "MLPExperts", "init_args": {"hidden_dim": 16}},
        },
    },
    "data": {"class_path": "TextData", "init_args": {"sequence_length": 16, "batch_size": 2}},
    "checkpoint_every": 5,
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 40,
        "val_check_interval": 20,
        "check_val_every_n_epoch": None,
        "limit_val_batches": 2,
        "limit_test_batches": 2,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 5,
    },
}


@pytest.fixture
def write(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))

    def plan(name="sweep", **content):
        known = {"tasks": {"text": "base.yaml"}, "routers": ["LinearRouter", "HyperRouter"], "seeds": [0, 1]}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**known, **content}))
        return ["sweep", "--config", f"{name}.yaml", "--folder", "out"]

    return plan


def start(folder, arguments):
    command = [sys.executable, "-m", "routerzoo", *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(folder, arguments, code=0):
    process = start(folder, arguments)
    out, _ = process.communicate(timeout=500)
    assert process.returncode == code, out
    return out


def runs(folder):
    return {run.label: run for run in Ledger(folder / "out").runs() if run.planned}


def measured(results):
    """Return what does not depend on the machine's mood."""
    return {
        stage: {name: value for name, value in values.items() if not name.startswith(("seconds", "peak"))}
        for stage, values in results.items()
    }


@pytest.mark.full
def test_a_sweep_finishes_what_can_be_and_says_why_the_rest_is_not(write, tmp_path):
    routers = [
        "LinearRouter",
        {"label": "too fast", "class_path": "LinearRouter", "set": {"model.init_args.optimizer.init_args.lr": 1e30}},
        {"label": "impossible", "class_path": "LinearRouter", "init_args": {"rank": 3}},
    ]
    command = write(routers=routers, seeds=[0], test={"model.init_args.eval_top_k": [2, 1]})
    out = run(tmp_path, command, code=1)
    found = runs(tmp_path)
    assert found["text LinearRouter seed 0"].status == "finished"
    lost = found["text too fast seed 0"]
    assert lost.status == "failed"
    assert "the loss is" in lost.reason
    assert "at step" in lost.reason
    assert "rank" in out  # refused when it was read
    assert "text impossible seed 0" not in found
    assert "the loss is" in (tmp_path / "out" / lost.folder / work.LOG).read_text()

    # The same command repeats nothing.
    before = (tmp_path / "out" / found["text LinearRouter seed 0"].folder / "results.json").stat().st_mtime_ns
    again = run(tmp_path, command, code=1)
    assert "1 finished before, 1 failed before" in again
    after = (tmp_path / "out" / found["text LinearRouter seed 0"].folder / "results.json").stat().st_mtime_ns
    assert before == after

    # A point is a config; by hand it gives the same numbers.
    printed = run(tmp_path, [*command, "--print"])
    fit, test = _commands(printed)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for arguments in (fit, test):
        done = subprocess.run(
            [sys.executable, "-m", "routerzoo", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "by-hand").glob("*/results.json")
    by_hand = json.loads(results.read_text())
    assert measured(by_hand) == measured(found["text LinearRouter seed 0"].results)

    # The report says it all, while runs are missing too.
    told = run(tmp_path, ["report", "out"])
    assert "1 of 2 runs failed; they count as the worst of their task" in told
    page = (tmp_path / "out" / "report.html").read_text()
    for expected in ("too fast", "the loss is", "impossible", "Missing and failed", "<svg", "Quality and k"):
        assert expected in page
    rows = list(csv.DictReader((tmp_path / "out" / "runs.csv").read_text().splitlines()))
    assert Counter(row["status"] for row in rows) == {"finished": 1, "failed": 1}
    # What is drawn is there in numbers too.
    tested = {2: by_hand["test"]["by k"][0]["bpb"], 1: by_hand["test"]["by k"][1]["bpb"]}
    by_k = list(csv.DictReader((tmp_path / "out" / "by_k.csv").read_text().splitlines()))
    assert {float(row["k"]): float(row["value"]) for row in by_k} == tested
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert f"| LinearRouter | {tested[1]:.4f} | {tested[2]:.4f} |" in markdown
    curves = list(csv.DictReader((tmp_path / "out" / "curves.csv").read_text().splitlines()))
    assert {"validation bpb", "entropy of the load"} <= {row["curve"] for row in curves}
    last = [float(row["value"]) for row in curves if row["curve"] == "validation bpb"][-1]
    assert last == pytest.approx(by_hand["fit"]["bpb"], rel=1e-5)


def _commands(printed):
    (line,) = (line for line in printed.splitlines() if line.startswith("OMP_NUM_THREADS=1") and "too-fast" not in line)
    return [shlex.split(command)[4:] for command in line.split(" && ")]


@pytest.mark.full
def test_a_killed_sweep_goes_on_where_it_was(write, tmp_path):
    command = write(set={"trainer.max_steps": 120})
    (tmp_path / "whole").mkdir()
    for name in ("base.yaml", "sweep.yaml"):
        (tmp_path / "whole" / name).write_text((tmp_path / name).read_text())
    run(tmp_path / "whole", command)
    expected = {label: measured(run.results) for label, run in runs(tmp_path / "whole").items()}

    kills = 0
    for _ in range(4):
        process = start(tmp_path, command)
        deadline = time.monotonic() + 120
        # Kill it while a run is under way that has left a checkpoint.
        while process.poll() is None and time.monotonic() < deadline:
            if any(_under_way(tmp_path)):
                time.sleep(0.3 * kills)
                process.send_signal(signal.SIGKILL)
                kills += process.wait() == -signal.SIGKILL
                break
            time.sleep(0.05)
        process.communicate()
        time.sleep(0.5)
        assert not _alive(tmp_path), "a killed sweep left runs behind"
    assert kills >= 2
    out = run(tmp_path, command)
    found = runs(tmp_path)
    assert {label: run.status for label, run in found.items()} == dict.fromkeys(expected, "finished"), out
    assert {label: measured(run.results) for label, run in found.items()} == expected
    logs = [(tmp_path / "out" / run.folder / work.LOG).read_text() for run in found.values()]
    assert any("resuming" in log for log in logs)


def _under_way(folder):
    for path in (folder / "out" / "runs").glob("*/checkpoints/last.ckpt"):
        if "fit" not in work.results(path.parent.parent):
            yield path


def _alive(folder):
    """Return the locks of runs that a process holds."""
    held = []
    for path in (folder / "out" / "runs").glob("*/lock"):
        try:
            with FileLock(path, timeout=0):
                pass
        except Timeout:
            held.append(path)
    return held


@pytest.mark.full
def test_two_sweeps_share_a_folder(write, tmp_path):
    command = write(seeds=[0, 1, 2], set={"trainer.max_steps": 15})
    both = [start(tmp_path, [*command, "--workers", "1"]) for _ in range(2)]
    for process in both:
        out, _ = process.communicate(timeout=500)
        assert process.returncode == 0, out
    run(tmp_path, command)  # whatever one left to the other is done now
    assert Counter((run.status, run.attempts) for run in runs(tmp_path).values()) == {("finished", 1): 6}


@pytest.mark.full
def test_changed_configs_make_new_runs_and_the_report_says_what_differs(write, tmp_path):
    run(tmp_path, write(routers=["LinearRouter"], seeds=[0], set={"trainer.max_steps": 5}))
    command = write(routers=["LinearRouter"], seeds=[0], set={"trainer.max_steps": 10})
    run(tmp_path, command)
    sweep = read_sweep(tmp_path / "out")
    assert [run.results["fit"]["step"] for run in sweep.runs] == [10]
    assert [run.results["fit"]["step"] for run in sweep.earlier] == [5]
    run(tmp_path, ["report", "out"])
    assert "trainer.max_steps: 5 became 10" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.full
def test_old_runs_are_made_anew_when_asked(write, tmp_path):
    command = write(routers=["LinearRouter"], seeds=[0], set={"trainer.max_steps": 5})
    run(tmp_path, command)
    (made,) = runs(tmp_path).values()
    with Ledger(tmp_path / "out")._transaction() as database:
        database.execute("UPDATE runs SET code = 'older'")
    assert "1 finished runs were made by other code (older" in run(tmp_path, command)
    run(tmp_path, [*command, "--redo-old"])
    (again,) = runs(tmp_path).values()
    assert (again.status, again.attempts, again.code) == ("finished", 2, made.code)
    assert measured(again.results) == measured(made.results)
    place = tmp_path / "out" / made.folder
    assert "resuming" not in (place / work.LOG).read_text()  # trained again, not tested again
    aside = place.with_name(f"{place.name}.by-older")
    assert json.loads((aside / "results.json").read_text()) == made.results


@pytest.mark.full
def test_checkpoints_of_finished_runs_go_when_asked(write, tmp_path):
    command = write(routers=["LinearRouter"], seeds=[0], set={"trainer.max_steps": 20})
    run(tmp_path, command)
    (made,) = runs(tmp_path).values()
    checkpoints = tmp_path / "out" / made.folder / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"best.ckpt", "last.ckpt"}
    out = run(tmp_path, [*command, "--keep", "best"])
    assert "1 finished before" in out
    assert "MiB in out" in out
    assert {path.name for path in checkpoints.iterdir()} == {"best.ckpt"}
    run(tmp_path, [*command, "--keep", "none"])
    assert not checkpoints.exists()
    assert "resumed" not in run(tmp_path, command)


@pytest.mark.full
def test_interrupted_runs_wait(write, tmp_path):
    process = start(tmp_path, write(seeds=[0], set={"trainer.max_steps": 5000}))
    deadline = time.monotonic() + 120
    while not any(_under_way(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "interrupted; the same command goes on from here" in out
    assert {run.status for run in runs(tmp_path).values()} == {"waiting"}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (-9, "killed by SIGKILL, as the system does when memory runs out"),
        (-11, "killed by SIGSEGV"),
        (3, "with code 3"),
    ],
)
def test_a_process_that_left_no_word_is_judged_by_how_it_ended(tmp_path, code, expected):
    status, reason = work.outcome(tmp_path, code)
    assert status == "failed"
    assert expected in reason


@pytest.mark.parametrize(
    ("trainer", "refused"),
    [
        ({"devices": "auto", "num_nodes": 1}, ""),
        ({"devices": 1}, ""),
        ({"devices": 2}, "trainer.devices is 2"),
        ({"devices": -1}, "trainer.devices is -1"),
        ({"devices": [0, 1]}, r"trainer.devices is [0, 1]"),
        ({"devices": 1, "num_nodes": 2}, "trainer.num_nodes is 2"),
    ],
)
def test_a_run_of_several_processes_is_refused(trainer, refused):
    reason = work.needs_more_processes(yaml.safe_dump({"trainer": trainer}))
    assert bool(reason) == bool(refused)
    assert refused in reason


def _tell_gpu(folder, test, threads, sweep, gpu):
    (Path(folder) / "gpu").write_text(str(gpu))
    time.sleep(1.0)


@pytest.mark.full
def test_runs_take_turns_on_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "run", _tell_gpu)
    engine, ledger = LocalEngine(4, 1, gpus=2), Ledger(tmp_path)
    row = {"task": "t", "router": "R", "variant": "R", "seed": 0, "config": "", "test": []}
    ledger.plan([{**row, "key": key, "folder": key} for key in "abcd"])
    for key in "abcd":
        (tmp_path / key).mkdir()
        engine.start(ledger.claim("code"), tmp_path / key)
    deadline, ended = time.monotonic() + 60, []
    while len(ended) < 4 and time.monotonic() < deadline:
        ended += engine.ended()
        time.sleep(0.05)
    assert sorted((tmp_path / key / "gpu").read_text() for key in "abcd") == ["0", "0", "1", "1"]


def test_a_run_that_was_asked_to_end_says_how_it_goes_on(tmp_path, monkeypatch):
    def asked_to_end(arguments):
        raise SystemExit(143)

    monkeypatch.setattr("routerzoo.cli.main.main", asked_to_end)
    monkeypatch.setenv("ROUTERZOO_TUNE_CPU", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ROUTERZOO_PROGRESS_FILE", "")
    ended = work._outcome(tmp_path, [], 1)
    assert ended["status"] == "failed"
    assert "SIGTERM" in ended["reason"]
    assert "--retry-failed" in ended["reason"]


def _die(folder, test, threads, sweep, gpu):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.full
def test_a_run_that_is_killed_takes_nobody_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "run", _die)
    engine = LocalEngine(1, 1)
    ledger = Ledger(tmp_path)
    row = {"task": "t", "router": "R", "variant": "R", "seed": 0, "folder": ".", "config": "", "test": []}
    ledger.plan([{**row, "key": "a"}])
    engine.start(ledger.claim("code"), tmp_path)
    deadline = time.monotonic() + 60
    while not (ended := engine.ended()) and time.monotonic() < deadline:
        time.sleep(0.05)
    ((_, status, reason),) = ended
    assert (status, reason.split(",")[0]) == ("failed", "killed by SIGKILL")
