"""`Ledger`: what a sweep has done, in an SQLite file that survives a kill at any moment."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routerzoo.errors import UserError

FILE = "sweep.db"
LEASE_SECONDS = 120.0
"""A running run whose sweep has not been heard of for so long is taken over."""
THEN = ", then "
"""Between the versions of code that have had a part in one run."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    key TEXT PRIMARY KEY,        -- of the resolved config
    place INTEGER NOT NULL,      -- in the grid
    planned INTEGER NOT NULL,    -- 1 while the plan has it
    task TEXT NOT NULL, router TEXT NOT NULL, variant TEXT NOT NULL, seed INTEGER NOT NULL,
    folder TEXT NOT NULL, config TEXT NOT NULL, test TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'waiting',
    reason TEXT NOT NULL DEFAULT '',
    owner TEXT NOT NULL DEFAULT '', heartbeat REAL NOT NULL DEFAULT 0,
    started REAL, seconds REAL, attempts INTEGER NOT NULL DEFAULT 0,
    code TEXT NOT NULL DEFAULT '',   -- that has had a part in it, in its order
    host TEXT NOT NULL DEFAULT '',
    results TEXT NOT NULL DEFAULT '{}',
    seal INTEGER NOT NULL DEFAULT 0  -- checksum of what came of it
);
CREATE TABLE IF NOT EXISTS resolved (source TEXT PRIMARY KEY, config TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Run:
    """A row: one run, planned or from an earlier plan.

    `status` is waiting, running, finished or failed. The others are as in the table.
    """

    key: str
    place: int
    planned: bool
    task: str
    router: str
    variant: str
    seed: int
    folder: str
    config: str
    test: list[str]
    status: str
    reason: str
    owner: str
    heartbeat: float
    started: float | None
    seconds: float | None
    attempts: int
    code: str
    host: str
    results: dict[str, Any]

    @property
    def label(self) -> str:
        """What to call it, in a line."""
        return f"{self.task} {self.variant} seed {self.seed}"


class Ledger:
    """The runs of one folder. Several sweeps may use it at once; each run belongs to one of them.

    Args:
        folder: of the sweep.

    Raises:
        UserError: the file is not a ledger, or is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with self._open() as database:
                # A write-ahead log lets readers and one writer work at once, and is whole after any kill.
                database.execute("PRAGMA journal_mode = WAL")
                database.executescript(_SCHEMA)
                (state,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if state != "ok":
                raise sqlite3.DatabaseError(state)
        except sqlite3.DatabaseError as error:
            raise UserError(f"{self.path} is not a sweep's ledger, or a damaged one: {error}") from error

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        database = sqlite3.connect(self.path, timeout=60.0, isolation_level=None)
        database.row_factory = sqlite3.Row
        try:
            yield database
        except sqlite3.OperationalError as error:  # no room, no permission, or locked for a minute
            # SQLite may call a full disk an I/O error.
            full = shutil.disk_usage(self.path.parent).free < 2**20
            raise UserError(f"cannot use {self.path}: {error}{'; its disk is full' if full else ''}") from error
        finally:
            database.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._open() as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
            except BaseException:
                if database.in_transaction:  # SQLite itself has ended it where the disk is full
                    database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")

    def resolved(self, source: str) -> str | None:
        """Return what a config resolves to, if that is known."""
        with self._open() as database:
            row = database.execute("SELECT config FROM resolved WHERE source = ?", (source,)).fetchone()
        return None if row is None else str(row["config"])

    def remember(self, source: str, config: str) -> None:
        """Keep what a config resolves to."""
        with self._open() as database:
            database.execute("INSERT OR REPLACE INTO resolved VALUES (?, ?)", (source, config))

    def plan(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Make these the planned runs; what is known of them stays, and what else there was is kept, unplanned."""
        with self._transaction() as database:
            database.execute("UPDATE runs SET planned = 0")
            for place, row in enumerate(rows):
                database.execute(
                    "INSERT INTO runs (key, place, planned, task, router, variant, seed, folder, config, test) "
                    "VALUES (:key, :place, 1, :task, :router, :variant, :seed, :folder, :config, :test) "
                    "ON CONFLICT (key) DO UPDATE SET place = :place, planned = 1, task = :task, router = :router, "
                    "variant = :variant",
                    {**row, "place": place, "test": json.dumps(row["test"])},
                )

    def runs(self) -> list[Run]:
        """Return all runs, in the order of the grid."""
        with self._told_of_damage(), self._open() as database:
            return [_run(r) for r in database.execute("SELECT * FROM runs ORDER BY planned DESC, place").fetchall()]

    @contextmanager
    def _told_of_damage(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.DatabaseError, ValueError, TypeError) as error:
            raise UserError(f"{self.path} is damaged: {error}") from error

    def claim(
        self, code: str, besides: Collection[str] = (), goes_on: Callable[[Path], bool] = lambda folder: False
    ) -> Run | None:
        """Take the next run that nobody is at, or None.

        Args:
            code: that will make it, or what is left of it.
            besides: keys of runs to leave alone.
            goes_on: whether a run's folder holds something that it goes on from.
        """
        with self._transaction() as database:
            now = time.time()
            for row in database.execute(
                "SELECT * FROM runs WHERE planned = 1 AND status IN ('waiting', 'running') ORDER BY place"
            ).fetchall():
                if row["key"] in besides:
                    continue
                if row["status"] == "running" and not self._is_abandoned(row["owner"], row["heartbeat"], now):
                    continue
                made_by = code
                if goes_on(self.path.parent / row["folder"]):
                    made_by = _also(row["code"], code)
                database.execute(
                    "UPDATE runs SET status = 'running', reason = '', owner = ?, heartbeat = ?, started = ?, "
                    "attempts = attempts + 1, code = ?, host = ? WHERE key = ?",
                    (self.owner, now, now, made_by, socket.gethostname(), row["key"]),
                )
                return _run(database.execute("SELECT * FROM runs WHERE key = ?", (row["key"],)).fetchone())
        return None

    def _is_abandoned(self, owner: str, heartbeat: float, now: float) -> bool:
        if owner == self.owner:
            return False
        host, _, process = owner.partition(":")
        if host == socket.gethostname():
            pid, _, started = process.partition(":")
            return not pid.isdigit() or _started(int(pid)) != started
        return now - heartbeat > LEASE_SECONDS

    def beat(self) -> None:
        """Say that this sweep is alive."""
        with self._open() as database:
            database.execute(
                "UPDATE runs SET heartbeat = ? WHERE owner = ? AND status = 'running'", (time.time(), self.owner)
            )

    def finish(self, key: str, status: str, reason: str = "", results: Mapping[str, Any] | None = None) -> None:
        """Write down what came of a run: finished, failed, or waiting where it was interrupted."""
        told = json.dumps(results or {})
        with self._open() as database:
            database.execute(
                "UPDATE runs SET status = ?, reason = ?, results = ?, seal = ?, seconds = ? - started, owner = '' "
                "WHERE key = ? AND owner = ?",
                (status, reason, told, _seal(key, status, reason, told), time.time(), key, self.owner),
            )

    def retry_failed(self) -> int:
        """Let planned runs that failed go on from what they left; return how many."""
        with self._open() as database:
            return database.execute(
                "UPDATE runs SET status = 'waiting' WHERE planned = 1 AND status = 'failed'"
            ).rowcount

    def redo(self, code: str, set_aside: Callable[[Run], None]) -> list[Run]:
        """Let planned runs that other code has had a part in be made anew; return what was known of them.

        Args:
            code: the code that may stay.
            set_aside: takes away what a run has left, so that it does not go on from there.
        """
        with self._told_of_damage(), self._transaction() as database:
            now = time.time()
            rows = database.execute("SELECT * FROM runs WHERE planned = 1 AND code NOT IN ('', ?)", (code,)).fetchall()
            old = [
                _run(row)
                for row in rows
                if row["status"] != "running" or self._is_abandoned(row["owner"], row["heartbeat"], now)
            ]
            for run in old:
                set_aside(run)
                database.execute("UPDATE runs SET status = 'waiting', code = '' WHERE key = ?", (run.key,))
        return old


def _also(codes: str, code: str) -> str:
    return codes + THEN + code if codes and codes.split(THEN)[-1] != code else codes or code


def _seal(key: str, status: str, reason: str, results: str) -> int:
    return zlib.crc32(json.dumps([key, status, reason, results]).encode())


def _run(row: sqlite3.Row) -> Run:
    values = dict(row)
    seal = values.pop("seal")
    told = [values[name] for name in ("key", "status", "reason", "results")]
    if values["status"] in ("finished", "failed") and seal != _seal(*told):
        raise ValueError(f"what it says of {values['folder']} has changed since it was written")
    return Run(
        **{
            **values,
            "planned": bool(values["planned"]),
            "test": json.loads(values["test"]),
            "results": json.loads(values["results"]),
        }
    )


def _started(pid: int) -> str:
    """Return when a process started, as the system counts; empty if there is no such process."""
    try:
        # A process number is given anew; with its start it is unique. Fields follow the name, which is in parentheses.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        pass
    if Path("/proc/self").exists():
        return ""
    try:  # without /proc: whether it lives must do
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return "alive"
