"""`Ledger`: the state of a sweep's runs, in an SQLite file that survives a kill at any moment.

It is ours because Optuna's studies neither let a grid grow nor identify a run by its resolved config.
"""

from __future__ import annotations

import atexit
import json
import shutil
import socket
import sqlite3
import time
import uuid
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from routerzoo.errors import UserError
from routerzoo.sweep.plan import Stage

FILE = "sweep.db"
LEASE_SECONDS = 120.0
"""A running run of another machine is taken over after this long without a heartbeat."""
THEN = ", then "
"""Between the versions of code that have had a part in one run."""

_TABLES = (
    """
CREATE TABLE IF NOT EXISTS runs (
    key TEXT PRIMARY KEY,        -- of the resolved config
    place INTEGER NOT NULL,      -- in the grid
    planned INTEGER NOT NULL,    -- 1 while the plan has it
    task TEXT NOT NULL, router TEXT NOT NULL, variant TEXT NOT NULL, seed INTEGER NOT NULL,
    stage TEXT NOT NULL,         -- final, or a trial of the tuning
    folder TEXT NOT NULL, config TEXT NOT NULL, test TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'waiting',
    reason TEXT NOT NULL DEFAULT '',
    owner TEXT NOT NULL DEFAULT '', heartbeat REAL NOT NULL DEFAULT 0,
    started REAL, seconds REAL, attempts INTEGER NOT NULL DEFAULT 0,
    code TEXT NOT NULL DEFAULT '',   -- that has had a part in it, in its order
    host TEXT NOT NULL DEFAULT '',
    results TEXT NOT NULL DEFAULT '{}'
)
""",
    "CREATE TABLE IF NOT EXISTS resolved (source TEXT PRIMARY KEY, config TEXT NOT NULL)",
)


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
    stage: Stage
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

    What a ledger has claimed is its own until it is finished or the object is deleted, with its process if need be.

    Args:
        folder: of the sweep.

    Raises:
        UserError: the file is not a ledger, or is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.owner = f"{socket.gethostname()}:{uuid.uuid4().hex}"
        self._alive = FileLock(self._lock_of(self.owner), timeout=0)
        folder.mkdir(parents=True, exist_ok=True)
        with self._open() as database:
            # A write-ahead log lets readers and one writer work at once, and is consistent after any kill.
            database.execute("PRAGMA journal_mode = WAL")
            (state,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if state != "ok":
                raise sqlite3.DatabaseError(state)
        with self._transaction() as database:
            for table in _TABLES:
                database.execute(table)
            columns = {column["name"] for column in database.execute("PRAGMA table_info(runs)")}
        if columns != Run.__dataclass_fields__.keys():
            raise UserError(f"{self.path} is a ledger of another version of routerzoo: choose another --folder")

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
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the latter of a message that quotes the damage
            raise UserError(f"{self.path} is not a sweep's ledger, or a damaged one: {error}") from error
        finally:
            database.close()  # and rolls back what is not committed

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Change the content, and with it the checksum, which SQLite keeps for us as the file's `user_version`."""
        with self._open() as database:
            database.execute("BEGIN IMMEDIATE")
            (expected,) = database.execute("PRAGMA user_version").fetchone()
            if _checksum(database) != expected:
                told = "does not match its checksum" if expected else "has no checksum, as in routerzoo 0.1"
                raise sqlite3.DatabaseError(f"its content {told}")
            yield database
            database.execute(f"PRAGMA user_version = {_checksum(database)}")
            database.execute("COMMIT")

    def resolved(self, source: str) -> str | None:
        """Return what a config resolves to, if that is known."""
        with self._open() as database:
            row = database.execute("SELECT config FROM resolved WHERE source = ?", (source,)).fetchone()
        return None if row is None else str(row["config"])

    def remember(self, configs: Mapping[str, str]) -> None:
        """Keep what configs resolve to."""
        with self._transaction() as database:
            database.executemany("INSERT OR REPLACE INTO resolved VALUES (?, ?)", configs.items())

    def plan(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Make these the planned runs; what is known of them stays, and what else there was is kept, unplanned."""
        with self._transaction() as database:
            database.execute("UPDATE runs SET planned = 0")
            for place, row in enumerate(rows):
                database.execute(
                    "INSERT INTO runs (key, place, planned, task, router, variant, seed, stage, folder, config, test) "
                    "VALUES (:key, :place, 1, :task, :router, :variant, :seed, :stage, :folder, :config, :test) "
                    "ON CONFLICT (key) DO UPDATE SET place = :place, planned = 1, task = :task, router = :router, "
                    "variant = :variant",
                    {**row, "place": place, "test": json.dumps(row["test"])},
                )

    def runs(self) -> list[Run]:
        """Return all runs, in the order of the grid."""
        with self._open() as database:
            return [_run(r) for r in database.execute("SELECT * FROM runs ORDER BY planned DESC, place").fetchall()]

    def claim(
        self, code: str, besides: Collection[str] = (), goes_on: Callable[[Path], bool] = lambda folder: False
    ) -> Run | None:
        """Claim the next unclaimed run; None if there is none.

        Args:
            code: that will make it, or what is left of it.
            besides: keys of runs to leave alone.
            goes_on: whether a run's folder holds something that it goes on from.
        """
        if not self._alive.is_locked:
            self._alive.acquire()
            atexit.register(self._lock_of(self.owner).unlink, missing_ok=True)
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

    def _lock_of(self, owner: str) -> Path:
        return self.path.with_name(f"sweep-{owner.rpartition(':')[2]}.lock")

    def _is_abandoned(self, owner: str, heartbeat: float, now: float) -> bool:
        if owner.rpartition(":")[0] != socket.gethostname():
            return now - heartbeat > LEASE_SECONDS
        try:
            with FileLock(lock := self._lock_of(owner), timeout=0):
                lock.unlink()  # nobody will ask for it again
        except Timeout:
            return False
        return True

    def is_worked_on(self) -> bool:
        """Whether some sweep is at the runs of this folder."""
        now = time.time()
        if any(
            run.status == "running" and not self._is_abandoned(run.owner, run.heartbeat, now) for run in self.runs()
        ):
            return True
        return any(_is_held(lock) for lock in self.path.parent.glob("sweep-*.lock"))

    def beat(self) -> None:
        """Renew the lease of this sweep's runs."""
        with self._transaction() as database:
            database.execute(
                "UPDATE runs SET heartbeat = ? WHERE owner = ? AND status = 'running'", (time.time(), self.owner)
            )

    def finish(self, key: str, status: str, reason: str = "", results: Mapping[str, Any] | None = None) -> None:
        """Record how a run ended: finished, failed, or waiting where it was interrupted."""
        with self._transaction() as database:
            database.execute(
                "UPDATE runs SET status = ?, reason = ?, results = ?, seconds = ? - started, owner = '' "
                "WHERE key = ? AND owner = ?",
                (status, reason, json.dumps(results or {}), time.time(), key, self.owner),
            )

    def retry_failed(self) -> int:
        """Let planned runs that failed resume from what they left; return how many."""
        with self._transaction() as database:
            return database.execute(
                "UPDATE runs SET status = 'waiting' WHERE planned = 1 AND status = 'failed'"
            ).rowcount

    def redo(self, code: str, set_aside: Callable[[Run], None]) -> list[Run]:
        """Let planned runs that other code has had a part in be made anew; return what was known of them.

        Args:
            code: the code that may stay.
            set_aside: takes away what a run has left, so that it does not go on from there.
        """
        with self._transaction() as database:
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


def _is_held(lock: Path) -> bool:
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def _also(codes: str, code: str) -> str:
    return codes + THEN + code if codes and codes.split(THEN)[-1] != code else codes or code


def _checksum(database: sqlite3.Connection) -> int:
    """Return 31 bits over all tables; 0 without any, as `user_version` is in a new file."""
    _, *statements, _ = database.iterdump()  # between BEGIN and COMMIT
    return zlib.crc32("".join(statements).encode()) & 0x7FFFFFFF


def _run(row: sqlite3.Row) -> Run:
    values = dict(row)
    return Run(
        **{
            **values,
            "planned": bool(values["planned"]),
            "test": json.loads(values["test"]),
            "results": json.loads(values["results"]),
        }
    )
