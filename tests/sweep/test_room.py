"""A sweep does not fill its disk."""

import shutil
from collections import namedtuple

import pytest

from routerzoo.sweep.room import RESERVE, Room, size_of

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def disk(monkeypatch):
    state = {"free": 0}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, state["free"]))
    return state


def make(folder, size):
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    for name in ("best.ckpt", "last.ckpt"):
        (folder / "checkpoints" / name).write_bytes(b"0" * (size // 2))
    return folder


def test_a_run_starts_where_there_is_room_for_the_largest_so_far(tmp_path, disk):
    room = Room(tmp_path)
    disk["free"] = RESERVE
    assert room.lacks([]) == ""  # nothing is known yet
    disk["free"] = RESERVE - 1
    assert "make room" in room.lacks([])
    room.ended(make(tmp_path / "a", 1000), "finished")
    room.ended(make(tmp_path / "b", 600), "failed")
    disk["free"] = RESERVE + 1500
    assert room.lacks([]) == ""
    disk["free"] -= 1
    assert "make room" in room.lacks([])
    assert "--keep best" in room.lacks([])


def test_what_others_will_still_take_is_not_to_be_had(tmp_path, disk):
    room = Room(tmp_path)
    room.ended(make(tmp_path / "a", 1000), "finished")
    running = [make(tmp_path / "b", 400), make(tmp_path / "c", 1200)]
    disk["free"] = RESERVE + 1500 + 600
    assert room.lacks(running) == ""
    disk["free"] -= 1
    assert room.lacks(running) != ""


@pytest.mark.parametrize(("keep", "left"), [("all", 1000), ("best", 500), ("none", 0)])
def test_finished_runs_keep_what_was_asked_for(tmp_path, keep, left):
    room = Room(tmp_path, keep)
    finished, failed = make(tmp_path / "a", 1000), make(tmp_path / "b", 1000)
    room.ended(finished, "finished")
    room.ended(failed, "failed")
    assert (size_of(finished), size_of(failed)) == (left, 1000)
    assert room.largest == 1000  # the next one takes that much before it has finished


def test_the_latest_checkpoint_stays_where_there_is_no_best_one(tmp_path):
    folder = make(tmp_path / "a", 1000)
    (folder / "checkpoints" / "best.ckpt").unlink()
    Room(tmp_path, "best").ended(folder, "finished")
    assert size_of(folder) == 500
