"""Functions that build parts of a task: in forms that can be copied, pickled and kept in a checkpoint."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import torch

F = TypeVar("F")


def plain_factory(factory: F) -> F:
    """Return a function of the option parser's as `functools.partial(cls, **arguments)`; any other as it is.

    jsonargparse binds a class to an instantiator of its own, which holds the parser and its locks: a task that kept it
    could not be copied (weight averaging) or pickled (`ddp_spawn`).
    """
    if not isinstance(factory, functools.partial):
        return factory
    arguments = {name: plain_factory(value) for name, value in factory.keywords.items()}
    if factory.func.__module__.partition(".")[0] == "jsonargparse":
        return functools.partial(factory.args[-1], **arguments)  # type: ignore[return-value]
    return functools.partial(factory.func, *factory.args, **arguments)  # type: ignore[return-value]


def allow_in_checkpoints(*factories: Any) -> None:
    """Let checkpoints that hold these classes, or partial applications of them, be read with `weights_only=True`.

    A module built in Python keeps the classes it was given among its hyper-parameters, where reading with
    `weights_only=True` refuses what it does not know.
    """
    allowed: list[Any] = [functools.partial]
    for factory in factories:
        while isinstance(factory, functools.partial):
            factory = factory.func
        if isinstance(factory, type):
            allowed.append(factory)
    torch.serialization.add_safe_globals(allowed)
