import signal
import subprocess
import sys
import time

import pytest

from routerzoo.__main__ import main
from routerzoo.bench.protocol import Protocol
from routerzoo.bench.registry import list_tasks
from routerzoo.bench.rows import Row, read_rows
from routerzoo.bench.scores import Score, Summary
from routerzoo.cli.bench import CORE, QUICK_TASKS, _at_edges, _lost_in_tuning, _unmatched
from routerzoo.registry import list_routers

SMALL = ["--seeds", "2", "--tuning-seeds", "0"]


def bench(*args):
    main(["bench", *map(str, args)])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tasks", "cluster"], "unknown task 'cluster'; did you mean 'clusters'"),
        (["--routers", "HyperRoute"], "unknown router 'HyperRoute'; did you mean 'HyperRouter'"),
        (["--tasks", "clusters", "clusters"], "two tasks are called 'clusters'"),
        (["--tasks", "mine.py"], "there is no task file"),
    ],
)
def test_errors_are_a_sentence(args, message, tmp_path):
    with pytest.raises(SystemExit) as error:
        bench(*args, "--folder", tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        (0, "--seeds must be at least 1, got 0"),
        (1001, "--seeds must be at most 1000, where those of tuning begin, got"),
    ],
)
def test_numbers_out_of_range_are_refused(seeds, message, capsys):
    with pytest.raises(SystemExit) as error:
        bench("--seeds", seeds)
    assert error.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_learning_rates_at_the_edge_of_those_tried_are_named():
    lrs = {"a": 0.1, "b": 0.03, "c": 0.01, "d": 0.1}
    found = [
        Summary("clusters", name, (Score(Row("clusters", name, "final", 0, 200, lr, 1.0, "finished"), 0.5, 9),))
        for name, lr in lrs.items()
    ]
    assert _at_edges(found, Protocol()) == "0.01 by c; 0.1 by a, d"
    assert _at_edges(found[1:2], Protocol()) == ""
    assert _at_edges(found, Protocol(tuning_seeds=0)) == ""


def test_tasks_are_listed_with_what_is_predicted(capsys):
    bench("--list", "--tasks", "clusters")
    told = capsys.readouterr().out
    assert told.startswith("clusters: Eight Gaussian clusters")
    assert "LinearRouter below RandomFrozenRouter: a learned gate finds the centers (Chen et al. 2022)" in told


def test_the_overview_names_the_command_and_quick_what_there_is(capsys):
    assert set(QUICK_TASKS) <= set(list_tasks())
    assert set(CORE) <= set(list_routers())
    main([])
    assert "python -m routerzoo bench --quick" in capsys.readouterr().out


def test_flops_that_are_not_those_that_were_matched_are_named():
    flops = {"dense": 2.8e9, "HashRouter": 2.79e9, "TopPRouter": 1.12e9, "failed": None}
    found = {}
    for name, value in flops.items():
        row = Row("clusters", name, "final", 0, 200, 0.03, 1.0, "finished", train_flops=value)
        found[name] = Summary("clusters", name, (Score(row, 0.5, 9),))
    assert _unmatched(found) == "TopPRouter 0.40 times"


def test_runs_that_failed_in_tuning_are_named_where_others_did_not():
    def row(router, lr, status):
        return Row("clusters", router, "tuning", 1000, 100, lr, 1.0, status, "killed" if status == "failed" else "")

    partly = [row("A", 0.1, "failed"), row("A", 0.03, "finished")]
    assert _lost_in_tuning([*partly, row("B", 0.1, "finished"), row("C", 0.1, "failed")]) == {"A": partly[:1]}


@pytest.mark.full
def test_a_third_partys_routers_and_tasks(tmp_path, small_task, own_routers, capsys):
    noisy = "{class_path: LinearRouter, init_args: {noisy: true}, label: noisy}"
    routers = ["own_router.OwnRouter", "TemplateRouter", noisy, "HashRouter", "TaskRouter"]
    bench("--tasks", small_task, "--routers", *routers, "LinearRouter", "--folder", tmp_path, *SMALL)
    told = capsys.readouterr().out
    assert "signs: sign of the first coordinate" in told
    for label in ("OwnRouter", "TemplateRouter", "noisy", "oracle", "blind", "dense"):
        assert f"\n {label} " in told
    assert "predicted: LinearRouter below HashRouter: " in told
    assert "not applicable: TaskRouter in signs: TaskRouter requires task_ids, which the task does not provide" in told
    rows = read_rows(tmp_path / "rows.csv")
    assert len(rows) == 8 * 2 + 1
    assert {row.router for row in rows if row.status == "finished"} >= {"OwnRouter", "TemplateRouter", "noisy"}

    bench("--tasks", small_task, "--routers", "LinearRouter", "--folder", tmp_path, *SMALL)
    assert "8 runs made before, 0 of them failed" in capsys.readouterr().out
    other = "{class_path: HashRouter, label: noisy}"
    for args, message in (
        (["--routers", other, *SMALL], "has rows of another noisy in signs, with other arguments, or of another size"),
        (["--routers", "LinearRouter", "--seeds", "2"], "have another protocol"),
    ):
        with pytest.raises(SystemExit) as error:
            bench("--tasks", small_task, "--folder", tmp_path, *args)
        assert message in str(error.value)


@pytest.mark.full
def test_rows_of_other_code_stay_until_they_are_asked_for_again(tmp_path, small_task, capsys):
    args = ["--tasks", small_task, "--routers", "LinearRouter", "--folder", tmp_path, *SMALL]
    bench(*args)
    path = tmp_path / "rows.csv"
    (code,) = {row.code for row in read_rows(path)}
    path.write_text(path.read_text().replace(code, "0.1+old"))
    capsys.readouterr()
    bench(*args)
    assert "8 runs were made by other code and stay; --redo-old makes them again" in capsys.readouterr().out
    assert {row.code for row in read_rows(path)} == {"0.1+old"}
    bench(*args, "--redo-old")
    assert {row.code for row in read_rows(path)} == {code}


@pytest.mark.full
def test_failed_runs_are_named_count_as_one_and_can_be_made_again(tmp_path, small_task, own_routers, capsys):
    args = ["--tasks", small_task, "--routers", "own_router.NaNRouter", "--folder", tmp_path, *SMALL]
    for again in ([], ["--retry-failed"]):
        with pytest.raises(SystemExit) as error:
            bench(*args, *again)
        assert error.value.code == 1
        told = capsys.readouterr().out
        assert "failed: NaNRouter in signs, 2 of its runs: DivergedError: the training loss is nan at step 0" in told
        assert "NaNRouter   1.000 ± 0.000" in told
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 1 + 4 * 2
    assert len((tmp_path / "replaced.csv").read_text().splitlines()) == 1 + 2


@pytest.mark.full
def test_a_constructor_that_ends_its_process_fails_the_runs_of_its_router_alone(
    tmp_path, small_task, own_routers, capsys
):
    with pytest.raises(SystemExit) as error:
        bench("--tasks", small_task, "--routers", "own_router.ExitingRouter", "--folder", tmp_path, *SMALL)
    assert error.value.code == 1
    told = capsys.readouterr().out
    assert "failed: ExitingRouter in signs, 2 of its runs: its process ended with code 4" in told
    assert len([row for row in read_rows(tmp_path / "rows.csv") if row.status == "finished"]) == 3 * 2


@pytest.mark.full
def test_what_fails_in_tuning_gets_no_final_runs_and_budgets_may_be_of_flops(tmp_path, small_task, own_routers, capsys):
    args = ["--tasks", small_task, "--folder", tmp_path, "--seeds", 2, "--tuning-seeds", 1, "--budget", "flops"]
    with pytest.raises(SystemExit):
        bench(*args, "--routers", "own_router.NaNRouter")
    told = capsys.readouterr().out
    assert "failed: NaNRouter in signs, 2 of its runs: not made, since all tuning runs failed: DivergedError" in told
    rows = {row.key: row for row in read_rows(tmp_path / "rows.csv")}
    final = [row for row in rows.values() if row.stage == "final"]
    assert {row.seconds is None for row in final if row.router == "NaNRouter"} == {True}
    # A token's two experts take 512 operations, the linear gate 64 more: 20 * 576 / 512 steps.
    assert {row.steps for row in final if row.router == "oracle"} == {22}
    assert {row.train_flops for row in final if row.router == "oracle"} == {3 * 512 * 64 * 22}


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_bench_that_is_stopped_goes_on(tmp_path, small_task, number, capsys):
    args = ["--tasks", small_task, "--routers", "LinearRouter", "--folder", str(tmp_path)]
    args += ["--seeds", "12", "--tuning-seeds", "0", "--slots", "1"]
    command = [sys.executable, "-m", "routerzoo", "bench", *args]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    path, deadline = tmp_path / "rows.csv", time.monotonic() + 120
    while not path.exists() or len(path.read_text().splitlines()) < 5:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert number == signal.SIGKILL or told == "error: interrupted; the same command goes on from here\n"
    made = len(read_rows(path))
    assert 4 <= made < 48
    bench(*args)
    assert f"{made} runs made before" in capsys.readouterr().out
    assert len(read_rows(path)) == 48
