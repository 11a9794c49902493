"""What a worker does: runs, one after the other, each into a row."""

from __future__ import annotations

import contextlib
import inspect
import os
import random
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from routerzoo import registry
from routerzoo.bench.protocol import Job
from routerzoo.bench.registry import list_tasks, task_class
from routerzoo.bench.rows import Row
from routerzoo.bench.run import Run
from routerzoo.sweep.code import expect_code
from routerzoo.tune_cpu import tune_cpu

# In the server that workers are forked from, so that all of them run the same code, whatever is edited meanwhile.
registry.load_plugins()
list_tasks()


def serve(jobs: Connection) -> None:
    """Do what comes through a pipe, and send the rows back, until its other end closes."""
    with contextlib.suppress(OSError):
        os.setsid()  # an interrupt of the terminal is the command's to handle
    with contextlib.suppress(EOFError, OSError):
        while True:
            jobs.send(do(jobs.recv()))


def do(job: Job) -> Row:
    """Make a run; return its row, also where it fails."""
    torch.set_num_threads(1)
    tune_cpu()
    started = time.process_time()
    try:
        task = task_class(job.task)(job.seed, job.steps)
        random.seed(task.seed_of("python"))  # of a router that draws from there, or from NumPy
        np.random.seed(task.seed_of("numpy") % 2**32)
        outcome = Run(task, job.choice, job.lr, job.aux_scale).outcome()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}{_place(error, job)}"
        return job.row(status="failed", reason=reason, seconds=time.process_time() - started)
    declared_k = job.choice.declared_k(task.top_k)
    return job.row(status="finished", k=declared_k, **vars(outcome), seconds=time.process_time() - started)


def do_elsewhere(job: Job) -> Row:
    """Make a run in a process that may have other sources than the one that hands it out.

    Raises:
        OtherCodeError: it has.
    """
    expect_code(job.code)
    return do(job)


def _place(error: Exception, job: Job) -> str:
    """Return in brackets the last line of the router's or the task's file that an error passed; nothing without one."""
    own: set[str] = set()
    with contextlib.suppress(Exception):  # of the class that could not be imported
        own = {inspect.getfile(cls) for cls in (task_class(job.task), job.choice.cls)}
    passed = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in own]
    return f" ({Path(passed[-1].filename).name}, line {passed[-1].lineno})" if passed else ""
