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
from routerzoo.sweep.processes import gpus_needed, num_processes

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
    printed = run(tmp_path, [*command, "--print"], code=1)
    assert "# refused: text impossible seed 0: " in printed
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
def test_a_key_of_the_tuning_that_no_config_has_is_an_error_before_any_run(write, tmp_path):
    tune = {"space": {"model.init_args.nonsense": [1, 2]}, "seeds": [100]}
    out = run(tmp_path, write(tune=tune), code=1)
    assert "no trial of tune can be made: " in out
    assert "nonsense" in out
    assert not Ledger(tmp_path / "out").runs()


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


LOST = "[rank0]: RuntimeError: [/__w/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error: Connection reset\n"


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (f"step 1\n{LOST}", "one of its processes was killed, as the system does when memory runs out"),
        (f"[rank1]: ValueError: a bad batch\n{LOST}{LOST}", "ValueError: a bad batch"),
        (f"error: the loss is nan at step 3\n{LOST}", "the loss is nan at step 3"),
        ("no such thing\n\n", "no such thing"),
    ],
)
def test_what_lost_the_connection_is_not_the_reason(log, expected):
    assert work.reason_of_group(log) == expected


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({"devices": "auto"}, 4),
        ({"devices": -1, "accelerator": "cpu"}, 1),
        ({"devices": 2, "accelerator": "cpu"}, 2),
        ({"devices": "3"}, 3),
        ({"devices": [0, 1]}, 2),
        ({}, 4),
    ],
)
def test_the_processes_of_a_run_are_those_of_its_devices(trainer, expected):
    assert num_processes(trainer, gpus=4) == expected
    assert gpus_needed(trainer) == (0 if trainer.get("accelerator") == "cpu" else expected if expected != 4 else 1)


def test_a_run_on_several_machines_is_refused():
    assert work.needs_more_machines("trainer: {devices: 2, num_nodes: 1}") == ""
    assert "trainer.num_nodes is 2" in work.needs_more_machines("trainer: {num_nodes: 2}")


def _tell_gpu(folder, test, threads, sweep, gpus):
    (Path(folder) / "gpu").write_text(str(gpus))
    time.sleep(1.0)


@pytest.mark.full
@pytest.mark.parametrize(("each", "expected"), [(1, ["[0]", "[0]", "[1]", "[1]"]), (2, ["[0, 1]"] * 4)])
def test_runs_take_turns_on_gpus(tmp_path, monkeypatch, each, expected):
    monkeypatch.setattr(work, "run", _tell_gpu)
    engine, ledger = LocalEngine(4, 1, gpus=2), Ledger(tmp_path)
    config = f"trainer: {{devices: {each}}}"
    row = {"task": "t", "router": "R", "variant": "R", "seed": 0, "stage": "final", "config": config, "test": []}
    ledger.plan([{**row, "key": key, "folder": key} for key in "abcd"])
    for key in "abcd":
        (tmp_path / key).mkdir()
        engine.start(ledger.claim("code"), tmp_path / key)
    deadline, ended = time.monotonic() + 60, []
    while len(ended) < 4 and time.monotonic() < deadline:
        ended += engine.ended()
        time.sleep(0.05)
    assert sorted((tmp_path / key / "gpu").read_text() for key in "abcd") == expected


def test_a_run_that_was_asked_to_end_says_how_it_goes_on(tmp_path, monkeypatch):
    def asked_to_end(arguments):
        raise SystemExit(143)

    (tmp_path / work.CELL).write_text("{}")
    monkeypatch.setattr("routerzoo.cli.main.main", asked_to_end)
    monkeypatch.setenv("ROUTERZOO_TUNE_CPU", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ROUTERZOO_PROGRESS_FILE", "")
    ended = work._outcome(tmp_path, [], 1)
    assert ended["status"] == "failed"
    assert "SIGTERM" in ended["reason"]
    assert "--retry-failed" in ended["reason"]


def _die(folder, test, threads, sweep, gpus):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.full
def test_a_run_that_is_killed_takes_nobody_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "run", _die)
    engine = LocalEngine(1, 1)
    ledger = Ledger(tmp_path)
    row = {"task": "t", "router": "R", "variant": "R", "seed": 0, "folder": ".", "config": "", "test": []}
    ledger.plan([{**row, "key": "a", "stage": "final"}])
    engine.start(ledger.claim("code"), tmp_path)
    deadline = time.monotonic() + 60
    while not (ended := engine.ended()) and time.monotonic() < deadline:
        time.sleep(0.05)
    ((_, status, reason),) = ended
    assert (status, reason.split(",")[0]) == ("failed", "killed by SIGKILL")


TUNED = {
    "tune": {"space": {"model.init_args.optimizer.init_args.lr": [0.001, 0.01]}, "seeds": [100], "untuned": False},
    "seeds": [0],
}


@pytest.mark.full
def test_a_tuned_sweep_that_is_killed_again_and_again_gives_the_same_numbers(write, tmp_path):
    command = write(**TUNED)
    (tmp_path / "whole").mkdir()
    for name in ("base.yaml", "sweep.yaml"):
        (tmp_path / "whole" / name).write_text((tmp_path / name).read_text())
    out = run(tmp_path / "whole", command)
    assert "2 finished, 6 trials" in out
    expected = {label: measured(found.results) for label, found in runs(tmp_path / "whole").items()}
    assert {"text LinearRouter tuned seed 0", "text LinearRouter lr=0.01 max_steps=20 trial seed 100"} < set(expected)
    assert "test" not in expected["text LinearRouter lr=0.01 max_steps=20 trial seed 100"]

    kills = 0
    for ended in (1, 3, 5, 7):  # in the first rung, between, in the second, in the final runs
        process = start(tmp_path, command)
        while process.poll() is None:
            found = Ledger(tmp_path / "out").runs() if (tmp_path / "out" / "sweep.db").exists() else []
            if sum(r.status == "finished" for r in found) >= ended and any(_under_way(tmp_path)):
                process.send_signal(signal.SIGKILL)
                kills += process.wait() == -signal.SIGKILL
            time.sleep(0.05)
        process.communicate()
    assert kills >= 2
    run(tmp_path, command)
    assert {label: measured(found.results) for label, found in runs(tmp_path).items()} == expected
    table = (tmp_path / "out" / "tuning.csv").read_text()
    assert table == (tmp_path / "whole" / "out" / "tuning.csv").read_text()
    rows = list(csv.DictReader(table.splitlines()))
    assert [(row["rung"], row["steps"]) for row in rows if row["router"] == "LinearRouter"] == [
        ("1", "20"),
        ("1", "20"),
        ("2", "40"),
    ]
    # What was kept is what the final runs have, and what they are compared with is tuned too.
    lr = next(row["model.init_args.optimizer.init_args.lr"] for row in rows if row["rung"] == "2")
    final = runs(tmp_path)["text LinearRouter tuned seed 0"]
    assert str(yaml.safe_load(final.config)["model"]["init_args"]["optimizer"]["init_args"]["lr"]) == lr
    (task,) = read_sweep(tmp_path / "out").main_tasks()
    assert (task.name, list(task.values)) == ("text tuned", ["LinearRouter", "HyperRouter"])


@pytest.mark.full
def test_a_run_of_two_processes_is_killed_as_a_whole_and_resumes(write, tmp_path):
    steps = {"trainer.max_steps": 300, "trainer.devices": 2, "trainer.val_check_interval": 300}
    command = write(routers=["LinearRouter"], seeds=[0], set=steps)
    process = start(tmp_path, command)
    while not any(_under_way(tmp_path)) and process.poll() is None:
        time.sleep(0.05)
    group = _ranks(tmp_path)
    assert len(group) == 2
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    deadline = time.monotonic() + 30
    while _ranks(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _ranks(tmp_path), "a killed sweep left processes behind"
    run(tmp_path, command)
    (found,) = runs(tmp_path).values()
    assert found.results["fit"]["training tokens"] == 300 * 2 * 2 * 16
    assert "resuming" in (tmp_path / "out" / found.folder / work.LOG).read_text()
    by_hand = [*command, "--print"]
    fit = _commands(run(tmp_path, by_hand))[0]
    run(tmp_path, fit)
    (results,) = (tmp_path / "by-hand").glob("*/results.json")
    assert measured(json.loads(results.read_text()))["fit"] == measured(found.results)["fit"]


def _ranks(folder):
    """Return the processes that train in a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command, where = (path / "cmdline").read_bytes().split(b"\0"), (path / "cwd").readlink()
        except OSError:
            continue
        if where == folder and b"fit" in command:
            found.append(int(path.name))
    return found


@pytest.mark.full
def test_unequal_k_is_refused_and_equal_flops_are_made(write, tmp_path):
    routers = ["LinearRouter", "HashRouter"]
    out = run(tmp_path, write(routers=routers, seeds=[0]), code=1)
    assert "in text, HashRouter trains at k = 1 and LinearRouter at 2: give all one k" in out
    settings = {"routers": routers, "seeds": [0], "set": {"trainer.max_steps": 40}}
    out = run(tmp_path, [*write(**settings, allow_unequal=True), "--print"])
    assert "Budgets differ: in text, HashRouter trains at k = 1 and LinearRouter at 2; and 1 more." in out
    run(tmp_path, write(**settings, budget="flops"))
    found = {run.router: run.results["fit"] for run in Ledger(tmp_path / "out").runs() if run.planned}
    linear, hashed = found["LinearRouter"], found["HashRouter"]
    assert (linear["step"], linear["trained k"], hashed["trained k"]) == (40, 2, 1)
    assert hashed["step"] == round(40 * linear["FLOPs per token"] / hashed["FLOPs per token"]) > 40
    assert hashed["training FLOPs"] == pytest.approx(linear["training FLOPs"], rel=0.02)
