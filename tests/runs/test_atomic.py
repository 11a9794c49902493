"""Atomic writes, also where the writer is killed between two steps."""

import errno
import os

import pytest

from routerzoo.runs.atomic import BACKUP, atomic_replace, atomic_write, recover, remove


def test_a_failed_write_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write(path, "old\n")
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(fsync(descriptor)))
    atomic_write(path, "new\r\n")
    assert path.read_bytes() == b"new\r\n"
    assert len(synced) == 1

    def fails(descriptor):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="no space left"):
        atomic_write(path, "newer")
    assert path.read_bytes() == b"new\r\n"


def test_a_folder_whose_replacement_was_interrupted_is_recovered(tmp_path):
    path, new = tmp_path / "checkpoint", tmp_path / "new"
    for folder in (path, new):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    path.rename(tmp_path / f"checkpoint{BACKUP}")  # killed before the second rename
    assert recover(path)
    assert (path / "file").read_text() == "checkpoint"
    atomic_replace(new, path)
    assert (path / "file").read_text() == "new"
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint"]
    remove(path)
    assert not recover(path)
    remove(path)
