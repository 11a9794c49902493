"""Real text that every installation has: the bundled play, Python's own modules, and PyTorch's C++ headers."""

from __future__ import annotations

import importlib.resources
import platform
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from routerzoo.errors import UserError

TEST_SHARE = 0.1
"""Of a text, its end; of several files, every tenth."""


class Text(NamedTuple):
    """A domain's text.

    Args:
        train: what is trained on.
        test: what is evaluated on.
        source: where it is from, with a version where the text depends on one.
    """

    train: bytes
    test: bytes
    source: str


def play() -> Text:
    """The Shakespeare that ships with the package."""
    path = importlib.resources.files("routerzoo.data") / "bundled" / "tiny-shakespeare.txt"
    return of_one(path.read_bytes(), "Tiny Shakespeare")


def python() -> Text:
    """The modules that lie at the top of Python's standard library; names with an underscore may be generated."""
    folder = Path(sysconfig.get_path("stdlib"))
    source = f"standard library of Python {platform.python_version()}"
    return of_files(sorted(folder.glob("[a-z]*.py")), source, "python")


def cpp() -> Text:
    """The headers of PyTorch's core library, c10."""
    folder = Path(torch.__file__).parent / "include" / "c10"
    return of_files(sorted(folder.rglob("*.h")), f"C++ headers of PyTorch {torch.__version__}", "cpp")


REAL: dict[str, Callable[[], Text]] = {"play": play, "python": python, "cpp": cpp}
"""Texts by the domain's name."""


def own(name: str, path: str) -> Text:
    """Read a user's domain: a file, or all files of a folder in the order of their names.

    Raises:
        UserError: nothing is there to read.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        return of_files(sorted(file for file in place.rglob("*") if file.is_file()), f"folder {path}", name)
    try:
        return of_one(place.read_bytes(), f"file {place.name}")
    except OSError as error:
        raise UserError(f"cannot read {path} of the domain {name}: {error.strerror or error}") from error


def of_one(text: bytes, source: str) -> Text:
    """Cut one text by position."""
    cut = round(len(text) * (1 - TEST_SHARE))
    return Text(text[:cut], text[cut:], source)


def of_files(paths: Sequence[Path], source: str, name: str) -> Text:
    """Put every tenth file into the test split; a single one is cut.

    Raises:
        UserError: there is no file.
    """
    if not paths:
        raise UserError(f"the domain {name} has no file ({source}): name other domains with --domains")
    texts = [path.read_bytes() for path in paths]
    if len(texts) < 10:
        return of_one(b"".join(texts), source)
    every = round(1 / TEST_SHARE)
    train = b"".join(text for place, text in enumerate(texts) if place % every)
    return Text(train, b"".join(texts[::every]), source)
