"""`Room`: what the runs of a sweep take on the disk, and whether another one fits."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from routerzoo.runs.atomic import remove
from routerzoo.sweep.plan import Stage
from routerzoo.sweep.work import BEST, LAST

Keep = Literal["all", "best", "none"]
KEEP: tuple[Keep, ...] = ("all", "best", "none")
RESERVE = 64 * 2**20
"""Bytes that logs, the ledger and the report may need beside the runs."""


class Room:
    """Keeps a sweep from filling its disk, which would make every further run fail.

    What a run takes is known when the first has ended. From then on a run starts where there is room for the largest so
    far and half of that again, since a checkpoint is written beside the one that it replaces.

    Args:
        root: folder of the sweep.
        keep: which checkpoints of finished runs stay.
    """

    def __init__(self, root: Path, keep: Keep = "all") -> None:
        self.root, self.keep = root, keep
        self.largest = 0

    def ended(self, folder: Path, status: str, stage: Stage = "final") -> None:
        """Learn what a run has taken; once it has finished, remove checkpoints that need not stay, all of a trial."""
        self.largest = max(self.largest, size_of(folder))
        if status != "finished":
            return
        if self.keep == "none" or stage == "trial":
            remove((folder / LAST).parent)
        elif self.keep == "best" and (folder / BEST).exists():
            remove(folder / LAST)

    def lacks(self, running: Sequence[Path]) -> str:
        """Say why no further run should start, or nothing.

        Args:
            running: folders of the runs that are under way.
        """
        free = shutil.disk_usage(self.root).free
        needed = RESERVE + self.largest * 3 // 2
        if free < needed + self.largest * len(running):  # or else there is no need to look at what they have taken
            needed += sum(max(self.largest - size_of(folder), 0) for folder in running)
        if free >= needed:
            return ""
        hint = "" if self.keep != "all" else ", or let finished runs keep their best checkpoint alone (--keep best)"
        return (
            f"the disk of {self.root} has {shown_size(free)} left, and another run may need {shown_size(needed)}: "
            f"make room{hint}"
        )


def size_of(folder: Path) -> int:
    """Return what the files in a folder take, in bytes."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(place) / name).stat().st_size
            except OSError:  # renamed or removed meanwhile
                continue
    return total


def shown_size(size: float) -> str:
    """Show a number of bytes, short.

    Example:
        >>> shown_size(5 * 2**20), shown_size(3.5 * 2**30)
        ('5 MiB', '3.5 GiB')
    """
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
