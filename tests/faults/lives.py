"""Processes that run the command line and die, forked from one that has imported everything."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time

CONTEXT = multiprocessing.get_context("forkserver")
# As a sweep does it: a run starts within a second.
CONTEXT.set_forkserver_preload(["routerzoo.sweep.preloaded"])


def life(arguments, log, limit_bytes=None, torn=None, folder=None):
    """Run a command, with its output in a file.

    Args:
        arguments: of the command line.
        log: the file.
        limit_bytes: no file may become larger than that, as on a disk that is full.
        torn: number of the checkpoint in whose middle the process kills itself.
        folder: where to run it.
    """
    import torch

    torch.set_num_threads(1)
    if folder is not None:
        os.chdir(folder)
    with open(log, "a", encoding="utf-8") as out:
        sys.stdout = sys.stderr = out
        if limit_bytes is not None:
            import resource

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
        if torn is not None:
            _tear(torn)
        from routerzoo.cli.main import main

        try:
            main(arguments)
        except SystemExit as ended:
            if isinstance(ended.code, str):
                print(ended.code)  # as the interpreter would, once the log is closed
            raise


def _tear(number):
    """Kill the process in the middle of writing a checkpoint."""
    import torch

    save, written = torch.save, 0

    def half(content, file, *arguments, **options):
        nonlocal written
        written += 1
        if written < number:
            return save(content, file, *arguments, **options)
        save(content, file, *arguments, **options)
        with contextlib.suppress(AttributeError, OSError):
            file.truncate(file.tell() // 2)
            file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    torch.save = half


def start(*arguments, **options):
    process = CONTEXT.Process(target=life, args=arguments, kwargs=options)
    process.start()
    return process


def wait_for(what, process, seconds=120.0):
    """Wait until something holds, or the process has ended."""
    end = time.monotonic() + seconds
    while not what() and process.is_alive():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)
