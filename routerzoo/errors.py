"""`UserError`: an error that the user can fix. The command line prints its one sentence instead of a traceback."""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input: a file, a value or a combination of options, named in the message together with the way out."""


def reason_of(error: OSError) -> str:
    """Return what the system refuses, and of which file, in a sentence."""
    reason = error.strerror or str(error) or type(error).__name__
    files = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return f"{': '.join(files)}: {reason}" if files else reason


@contextmanager
def in_a_sentence() -> Iterator[None]:
    """End the process with one sentence where the user, or the system, is the cause.

    Raises:
        SystemExit: with that sentence.
    """
    hook = threading.excepthook
    threading.excepthook = functools.partial(_in_thread, hook)
    try:
        yield
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except BrokenPipeError:  # the reader of the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor can the rest be written at exit
        raise SystemExit(1) from None
    except OSError as error:
        raise SystemExit(f"error: {reason_of(error)}") from None
    finally:
        threading.excepthook = hook


def _in_thread(otherwise: Callable[[threading.ExceptHookArgs], object], args: threading.ExceptHookArgs) -> None:
    """Report what the system refuses to a thread, as TensorBoard's writer, in a sentence too."""
    if isinstance(args.exc_value, OSError):
        sys.stderr.write(f"error: {reason_of(args.exc_value)}\n")
    else:
        otherwise(args)
