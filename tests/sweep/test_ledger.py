"""The ledger loses nothing, and gives a run to one sweep alone."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sqlite3
import time

import pytest

from routerzoo.errors import UserError
from routerzoo.sweep.ledger import FILE, LEASE_SECONDS, Ledger


def row(key, **changes):
    known = {"task": "t", "router": "R", "variant": "R", "seed": 0, "stage": "final", "config": "", "test": []}
    return {"key": key, "folder": f"runs/{key}", **known, **changes}


def test_runs_are_claimed_in_order_and_once(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.plan([row("a"), row("b")])
    first = ledger.claim("code")
    assert (first.key, first.status, first.attempts, first.code) == ("a", "running", 1, "code")
    assert ledger.claim("code").key == "b"
    assert ledger.claim("code") is None
    ledger.finish("a", "finished", results={"test": {"loss": 1.0}})
    ledger.finish("b", "failed", "out of memory")
    one, other = ledger.runs()
    assert (one.status, one.results, other.status, other.reason) == (
        "finished",
        {"test": {"loss": 1.0}},
        "failed",
        "out of memory",
    )
    assert one.seconds >= 0


def test_a_changed_plan_keeps_what_is_done(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.plan([row("a"), row("b")])
    ledger.claim("code")
    ledger.finish("a", "finished")
    ledger.plan([row("c"), row("a", variant="renamed")])
    runs = {run.key: run for run in ledger.runs()}
    assert runs["a"].status == "finished"
    assert runs["a"].variant == "renamed"
    assert not runs["b"].planned
    assert ledger.claim("code").key == "c"
    assert ledger.claim("code") is None


def test_failed_and_old_runs_are_done_again_when_asked(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.plan([row("a"), row("b")])
    for key, code in (("a", "old"), ("b", "new")):
        ledger.claim(code)
        ledger.finish(key, "finished")
    assert ledger.retry_failed() == 0
    aside = []
    assert [run.key for run in ledger.redo("new", aside.append)] == ["a"]
    assert [(run.key, run.code) for run in aside] == [("a", "old")]
    claimed = ledger.claim("new")
    assert (claimed.key, claimed.code) == ("a", "new")


def test_a_run_that_goes_on_names_all_code_that_had_a_part_in_it(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.plan([row("a")])
    left = tmp_path / "runs" / "a" / "checkpoint"
    codes = []
    for code in ("one", "two", "two", "three"):
        codes.append(ledger.claim(code, goes_on=lambda folder: (folder / left.name).exists()).code)
        ledger.finish("a", "waiting", "interrupted")
        if code == "two":  # what the first left was no checkpoint
            left.parent.mkdir(parents=True, exist_ok=True)
            left.touch()
    assert codes == ["one", "two", "two", "two, then three"]
    assert [run.code for run in ledger.redo("three", lambda run: left.unlink())] == ["two, then three"]
    assert ledger.claim("three", goes_on=lambda folder: (folder / left.name).exists()).code == "three"


def test_what_the_system_refuses_is_said(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path)
    ledger.plan([row("a")])
    with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as database:
        # As many pages as it has: what SQLite says of a disk without room.
        (pages,) = database.execute("PRAGMA page_count").fetchone()
    connect = sqlite3.connect

    def in_a_full_disk(*args, **kwargs):
        database = connect(*args, **kwargs)
        database.execute(f"PRAGMA max_page_count = {pages}")
        return database

    monkeypatch.setattr(sqlite3, "connect", in_a_full_disk)
    with pytest.raises(UserError, match=r"cannot use .*sweep\.db: database or disk is full"):
        ledger.plan([row("b", config="x" * 100_000)])
    assert [run.key for run in ledger.runs()] == ["a"]


def _claim_and_wait(folder, ready):
    ledger = Ledger(folder)
    ledger.claim("code")
    ready.set()
    time.sleep(60)


@pytest.mark.full
def test_the_runs_of_a_killed_sweep_are_taken_over_at_once(tmp_path):
    Ledger(tmp_path).plan([row("a")])
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_claim_and_wait, args=(tmp_path, ready))
    process.start()
    assert ready.wait(60)
    assert Ledger(tmp_path).claim("code") is None  # it lives
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    again = Ledger(tmp_path).claim("code")
    assert (again.key, again.attempts) == ("a", 2)


def test_claims_end_with_their_ledger_and_leave_no_locks(tmp_path):
    one, other = Ledger(tmp_path), Ledger(tmp_path)
    one.plan([row("a")])
    assert one.claim("code").key == "a"
    assert one.claim("code") is other.claim("code") is None
    del one
    assert other.claim("code").key == "a"
    assert [str(path) for path in tmp_path.glob("*.lock")] == [other._alive.lock_file]


def test_the_runs_of_another_machine_are_taken_over_when_it_is_silent(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.plan([row("a")])
    for age, expected in ((LEASE_SECONDS - 60, None), (LEASE_SECONDS + 1, "a")):
        with ledger._transaction() as database:
            database.execute(
                "UPDATE runs SET status = 'running', owner = 'elsewhere:1:2', heartbeat = ?", (time.time() - age,)
            )
        claimed = ledger.claim("code")
        assert (claimed and claimed.key) == expected
    assert claimed.host == socket.gethostname()


def test_what_belongs_to_another_sweep_is_not_finished_by_this_one(tmp_path):
    one, other = Ledger(tmp_path), Ledger(tmp_path)
    other.owner = "elsewhere:1:2"
    one.plan([row("a")])
    other.claim("code")
    one.finish("a", "finished")
    assert one.runs()[0].status == "running"


def _claim_all(folder, taken):
    ledger = Ledger(folder)
    while (run := ledger.claim("code")) is not None:
        taken.put(run.key)
        ledger.finish(run.key, "finished")


@pytest.mark.full
def test_sweeps_side_by_side_share_the_runs(tmp_path):
    keys = {f"run{number}" for number in range(40)}
    Ledger(tmp_path).plan([row(key) for key in keys])
    context = multiprocessing.get_context("spawn")
    taken = context.Queue()
    processes = [context.Process(target=_claim_all, args=(tmp_path, taken)) for _ in range(3)]
    for process in processes:
        process.start()
    got = [taken.get(timeout=100) for _ in keys]
    for process in processes:
        process.join()
    assert sorted(got) == sorted(keys)
    assert all(run.status == "finished" and run.attempts == 1 for run in Ledger(tmp_path).runs())


@pytest.mark.parametrize("damage", ["not a database at all", ""])
def test_a_broken_file_is_named(tmp_path, damage):
    Ledger(tmp_path).plan([row("a")])
    path = tmp_path / FILE
    for extra in tmp_path.glob(f"{FILE}-*"):
        extra.unlink()
    path.write_text(damage or "x" * 5000)
    with pytest.raises(UserError, match=rf"{FILE} is not a sweep's ledger, or a damaged one"):
        Ledger(tmp_path)


@pytest.mark.parametrize("table", ["runs", "resolved"])
def test_a_changed_row_is_reported_at_every_later_use(tmp_path, table):
    ledger = Ledger(tmp_path)
    ledger.plan([row("a")])
    ledger.remember({"source": "config"})
    with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as database, database:
        database.execute(f"UPDATE {table} SET config = 'another'")
    for use in (lambda: Ledger(tmp_path), lambda: ledger.claim("code"), lambda: ledger.finish("a", "finished")):
        with pytest.raises(
            UserError, match=rf"{FILE} is not a sweep's ledger.*its content does not match its checksum"
        ):
            use()


def test_a_ledger_of_an_older_version_is_refused(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / FILE)) as database, database:
        database.execute("CREATE TABLE runs (key TEXT PRIMARY KEY, seal INTEGER)")
    with pytest.raises(UserError, match=r"its content has no checksum, as in routerzoo 0\.1"):
        Ledger(tmp_path)


def test_a_ledger_with_other_columns_is_of_another_version(tmp_path):
    with Ledger(tmp_path)._transaction() as database:
        database.execute("ALTER TABLE runs DROP COLUMN stage")
    with pytest.raises(UserError, match="is a ledger of another version of routerzoo: choose another --folder"):
        Ledger(tmp_path)
