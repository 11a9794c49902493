import time
from pathlib import Path

import pytest

from routerzoo.bench import engine as engines
from routerzoo.bench.choices import RouterChoice
from routerzoo.bench.engine import LocalEngine, RayEngine
from routerzoo.bench.loop import work_through
from routerzoo.bench.protocol import Protocol, make_cell
from routerzoo.bench.rows import RowFile
from routerzoo.bench.work import do
from routerzoo.sweep.code import OtherCodeError, code_version

PROTOCOL = Protocol(seeds=3, tuning_seeds=0)
OWN = ["own_router.OwnRouter", "own_router.KilledRouter", "own_router.NaNRouter"]


def cells(task, names, protocol=PROTOCOL, code="code"):
    return [make_cell(task, RouterChoice(name), protocol, code) for name in names]


def work(folder, engine, task, names, protocol=PROTOCOL, code="code"):
    done = []
    try:
        with RowFile(folder) as file:
            work_through(
                cells(task, names, protocol, code), file, engine, lambda row, cell, end: done.append((row, end))
            )
            return done, dict(file.rows)
    finally:
        engine.close()


@pytest.mark.full
def test_a_run_that_is_killed_or_diverges_is_lost_alone_and_named(tmp_path, small_task, own_routers):
    done, rows = work(tmp_path, LocalEngine(2), small_task, OWN)
    assert len(rows) == len(done) == 9
    told = {}
    for row in rows.values():
        told.setdefault(row.router, set()).add((row.status, row.reason))
    assert told["OwnRouter"] == {("finished", "")}
    assert told["KilledRouter"] == {("failed", "killed by SIGKILL, as the system does when memory runs out")}
    assert told["NaNRouter"] == {("failed", "DivergedError: the training loss is nan at step 0")}
    assert sorted(row.router for row, end in done if end) == ["KilledRouter", "NaNRouter", "OwnRouter"]


def test_an_error_of_ones_own_router_is_named_with_its_line(small_task, own_routers):
    (cell,) = cells(small_task, ["own_router.RaisingRouter"], Protocol(seeds=1, tuning_seeds=0))
    row = do(cell.jobs({})[0])
    lines = (Path(__file__).parent / "own_router.py").read_text().splitlines()
    line = lines.index("        return gate_linear(x_TD, self.weight)") + 1
    assert row.status == "failed"
    assert row.reason.startswith("RuntimeError: ")
    assert row.reason.endswith(f" (own_router.py, line {line})")


@pytest.mark.full
def test_what_was_made_is_not_made_again_and_rows_do_not_depend_on_the_worker(tmp_path, small_task):
    protocol = Protocol(seeds=2, tuning_seeds=1, lrs=(0.1, 0.01))
    _, rows = work(tmp_path / "whole", LocalEngine(2), small_task, ["LinearRouter", "oracle"], protocol)
    assert len(rows) == (4 + 2 + 2) + (2 + 1 + 2)
    path = tmp_path / "part" / "rows.csv"
    path.parent.mkdir()
    lines = (tmp_path / "whole" / "rows.csv").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:6]) + lines[6][:30])  # five rows, and a torn one
    done, again = work(path.parent, LocalEngine(1), small_task, ["LinearRouter", "oracle"], protocol)
    assert len(done) == len(rows) - 5
    assert {key: row.loss for key, row in again.items()} == {key: row.loss for key, row in rows.items()}


@pytest.mark.full
def test_a_run_that_hangs_is_ended(tmp_path, small_task, monkeypatch):
    monkeypatch.setattr(engines, "RUN_SECONDS", 0.0)
    monkeypatch.setattr("routerzoo.bench.loop.WAIT_SECONDS", 0.001)
    _, rows = work(tmp_path, LocalEngine(1), small_task, ["LinearRouter"], Protocol(seeds=1, tuning_seeds=0))
    assert [row.reason for row in rows.values()] == ["took longer than 0 s"]


@pytest.mark.full
def test_workers_end_with_the_engine(small_task):
    engine = LocalEngine(1)
    (cell,) = cells(small_task, ["LinearRouter"])
    engine.start(cell.jobs({})[0])
    process = engine._workers[0].process
    engine.close()
    assert not process.is_alive()
    started = time.monotonic()
    assert engine.ended(0.0) == []
    assert time.monotonic() - started < 1


@pytest.mark.full
def test_ray_does_runs(tmp_path, small_task):
    pytest.importorskip("ray")
    protocol, names = Protocol(seeds=1, tuning_seeds=0), ["LinearRouter", "oracle"]
    _, rows = work(tmp_path / "same", RayEngine(2), small_task, names, protocol, code_version())
    assert {row.status for row in rows.values()} == {"finished"}
    with pytest.raises(OtherCodeError, match="has other code"):
        work(tmp_path / "other", RayEngine(2), small_task, names, protocol)
