"""What is written is there as a whole or not at all, whenever its writer is killed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

# Of what is being written, and of the folder before until the new one has its name.
PART, BEFORE = ".part", ".before"


def write_whole(path: Path, text: str) -> None:
    """Write a text file beside its place, then rename it; several processes may do so at once."""
    part = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    part.write_text(text, encoding="utf-8", newline="")
    part.replace(path)


def put_in_place(part: Path, path: Path) -> None:
    """Give what is whole its name, and remove what had it; one of the two is there at any moment.

    A file replaces a file at once. Nothing replaces a folder so, which goes out of the way first (see `is_there`).
    """
    before = path.with_name(path.name + BEFORE)
    if path.exists() and (path.is_dir() or part.is_dir()):
        remove(before)
        path.rename(before)
    part.replace(path)
    remove(before)


def is_there(path: Path) -> bool:
    """Whether a path exists; a folder that was being replaced when its writer died gets its name back."""
    before = path.with_name(path.name + BEFORE)
    if not path.exists() and before.exists():
        before.rename(path)
    return path.exists()


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
