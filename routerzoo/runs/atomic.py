"""Atomic writes: temporary file, fsync, rename."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

TEMPORARY, BACKUP = ".part", ".backup"
"""Suffixes of what is being written, and of a folder that is being replaced."""


def atomic_write(path: Path, text: str) -> None:
    """Write a text file in UTF-8. Several processes may write the same one; a reader sees the old or the new text.

    Raises:
        OSError: the system refuses; what was there is as it was.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, f"cannot write it: {error.strerror}", str(path)) from error


def is_writable(folder: Path) -> bool:
    """Whether files can be created in a folder; its mode alone does not say, as on a disk that is mounted read-only."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def atomic_replace(temporary: Path, path: Path) -> None:
    """Rename a finished file or folder, and remove what had the name; one of the two exists at any moment.

    A rename replaces a file, but not a folder: that is renamed to its backup first (see `recover`).
    """
    backup = path.with_name(path.name + BACKUP)
    if path.exists() and (path.is_dir() or temporary.is_dir()):
        remove(backup)
        path.rename(backup)
    temporary.replace(path)
    remove(backup)


def recover(path: Path) -> bool:
    """Restore a folder from its backup where its replacement was interrupted; return whether the path exists."""
    backup = path.with_name(path.name + BACKUP)
    if not path.exists() and backup.exists():
        backup.rename(path)
    return path.exists()


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
