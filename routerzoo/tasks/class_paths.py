"""Which classes a config or a checkpoint can name, and so what it can run: the one place that judges a class path."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings
from jsonargparse._common import parsing_settings
from lightning import Callback, LightningDataModule, LightningModule
from torch.optim import Optimizer

from routerzoo import registry
from routerzoo.moe.experts import Experts
from routerzoo.router import Router

LIBRARIES = ("lightning", "routerzoo", "timm", "torch")
GROUPS: dict[str, type] = {
    "routerzoo.tasks": LightningModule,
    "routerzoo.experts": Experts,
    "routerzoo.data": LightningDataModule,
}
"""Entry-point groups of classes, beside that of routers, and what they must be."""
KINDS = (Router, *GROUPS.values(), Callback, Optimizer)


def load_plugins() -> None:
    """Import what all installed packages register: routers, tasks, experts and data modules."""
    registry.load_plugins()
    for group, base in GROUPS.items():
        registry.load_group(group, base)


def known_packages() -> set[str]:
    """Return the packages whose classes may be named: the libraries, and all whose classes have been imported.

    The latter are installed packages that register their classes by entry point, and whatever the program that calls
    this has imported by itself.
    """
    load_plugins()
    return {*LIBRARIES, *(cls.__module__.partition(".")[0] for kind in KINDS for cls in _subclasses(kind))}


def _subclasses(cls: type) -> Iterator[type]:
    direct: list[type] = cls.__subclasses__()
    for subclass in direct:
        yield subclass
        yield from _subclasses(subclass)


@contextmanager
def known_classes_only(named: Iterable[str] = (), *, trust: bool = False) -> Iterator[None]:
    """Let class paths name classes of known packages alone, and functions never.

    jsonargparse imports what a class path names, and calls it with the arguments beside it. It refuses a class that is
    not of the kind asked for, but calls any function.

    Args:
        named: more packages, which the command itself names.
        trust: let class paths name any package's classes.
    """
    parser: Any = ArgumentParser
    before, add_function_arguments = dict(parsing_settings), parser.add_function_arguments
    known = known_packages()
    beyond = _beyond_known.set(trust or not known.issuperset(named))
    if not trust:
        allowed = {*known, *named} - {"jsonargparse", "builtins"}
        set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=sorted(allowed))
    # A value of no particular type is a value, whatever it looks like.
    set_parsing_settings(instantiate_subclass_spec_in_any=False)
    parser.add_function_arguments = _refuse_function
    try:
        yield
    finally:
        parsing_settings.update(before)
        parser.add_function_arguments = add_function_arguments
        _beyond_known.reset(beyond)


_beyond_known: ContextVar[bool] = ContextVar("beyond_known", default=False)


def goes_beyond_known() -> bool:
    """Whether class paths may name more than known packages here, so that a resumed run must be trusted again."""
    return _beyond_known.get()


def _refuse_function(self: ArgumentParser, function: Any, *arguments: Any, **options: Any) -> list[str]:
    name = f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', function)}"
    raise ValueError(f"{name} is a function, and a class_path names a class")


def refusal(message: str) -> str | None:
    """Return why a class path was refused, in a sentence, if a message of jsonargparse's is about that."""
    if denied := re.search(r"Importing '([^']+)' is not allowed", message):
        return (
            f"{denied[1]} is of no known package ({', '.join(LIBRARIES)} and those that register their classes by "
            "entry point), and a class runs whatever it likes"
        )
    function = re.search(r"(\S+) is a function, and a class_path", message)
    function = function or re.search(r"Expected '(\S+)' to be a function that returns", message)
    return f"{function[1]} is a function, and a class_path names a class" if function else None


def packages_named(arguments: Iterable[str]) -> set[str]:
    """Return the packages of the classes that a command names by itself, not in a file.

    Example:
        >>> sorted(packages_named(["fit", "--model=mine.Model", "--data", "{class_path: ours.Data}"]))
        ['mine', 'ours']
    """
    found = set()
    for argument in arguments:
        for value in (argument, argument.partition("=")[2]):
            if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", value) and not Path(value).exists():
                found.add(value.partition(".")[0])
            found.update(re.findall(r"class_path\W+([A-Za-z_]\w*)\.", value))
    return found
