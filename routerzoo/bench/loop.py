"""`work_through`: hands the runs of all cells to an engine, and writes their rows."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence

from routerzoo.bench.engine import Engine
from routerzoo.bench.protocol import Cell, Job
from routerzoo.bench.registry import task_class
from routerzoo.bench.rows import Row, RowFile

WAIT_SECONDS = 1.0


def work_through(
    cells: Sequence[Cell], file: RowFile, engine: Engine, ended: Callable[[Row, Cell, bool], None]
) -> None:
    """Make all runs that the file does not hold, cell after cell, so that what is interrupted is whole as far as it is.

    Args:
        cells: in the order in which they are worked on.
        file: takes the rows.
        engine: does the runs.
        ended: called with each row, its cell, and whether the cell is done by it.
    """
    waiting = iter(enumerate(cells))
    ready: list[tuple[int, int, Job]] = []
    running = 0
    left: Counter[int] = Counter()  # runs of a cell that are ready or running
    number = 0
    place = {(task_class(cell.task).name, cell.choice.label): index for index, cell in enumerate(cells)}

    def open_up(index: int) -> bool:
        """Make the next runs of a cell ready; return whether there are any."""
        nonlocal number
        jobs = cells[index].jobs(file.rows)
        if not jobs:
            for row in cells[index].given_up(file.rows):
                ended(file.append(row), cells[index], False)
        for job in jobs:
            number += 1
            heapq.heappush(ready, (index, number, job))
        left[index] += len(jobs)
        return bool(jobs)

    while True:
        while running < engine.slots:
            while not ready and (following := next(waiting, None)) is not None:
                open_up(following[0])
            if not ready:
                break
            engine.start(heapq.heappop(ready)[2])
            running += 1
        if not running:
            return
        for row in engine.ended(WAIT_SECONDS):
            row = file.append(row)
            running -= 1
            index = place[row.task, row.router]
            left[index] -= 1
            done = left[index] == 0 and not open_up(index)
            ended(row, cells[index], done)
