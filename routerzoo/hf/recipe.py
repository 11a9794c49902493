"""Routers in a config: names and arguments as JSON, and back."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from routerzoo.moe.experts import EXPERTS
from routerzoo.moe.layer import RouterFactory
from routerzoo.registry import did_you_mean, router_arguments, router_class
from routerzoo.router import Router


def described(factory: str | Callable[..., Any]) -> dict[str, Any]:
    """Return a factory as its name and arguments, so that a config can keep it.

    Raises:
        ValueError: a function without a registered name, or arguments that are not JSON.
    """
    arguments: dict[str, Any] = {}
    while isinstance(factory, partial):
        if factory.args:
            raise ValueError(f"give {factory.func} its arguments by name, so that a config can keep them")
        arguments = {**factory.keywords, **arguments}
        factory = factory.func
    name = factory if isinstance(factory, str) else getattr(factory, "__name__", "")
    registered = EXPERTS[name] if name in EXPERTS else router_class(name) if name.isidentifier() else None
    if registered is None or factory not in (name, registered):
        raise ValueError(f"{factory!r} is no registered router, which a saved model could not name: register it")
    given = {key: described(value) if callable(value) else value for key, value in arguments.items()}
    try:
        json.dumps(given)
    except TypeError as error:
        raise ValueError(f"the arguments of {name} are not JSON, so that a config cannot keep them: {error}") from error
    return {"name": name, **({"arguments": given} if given else {})}


def factory_of(description: Mapping[str, Any]) -> partial[Any]:
    """Return the factory that was described.

    Raises:
        ValueError: an argument that the class does not take.
    """
    name, arguments = description["name"], dict(description.get("arguments", {}))
    built: Any = EXPERTS[name] if name in EXPERTS else router_class(name)
    known = list(inspect.signature(built).parameters)[1:] if name in EXPERTS else router_arguments(built)
    for key, value in arguments.items():
        if key not in known:
            raise ValueError(f"{name} has no argument {key!r}{did_you_mean(key, known)} It takes: {', '.join(known)}.")
        if isinstance(value, Mapping) and "name" in value:
            arguments[key] = factory_of(value)
    return partial(built, **arguments)


def with_top_k(factory: str | RouterFactory, top_k: int) -> RouterFactory:
    """Return a factory of routers that select as many experts as the released model's, unless it says how many."""
    outer: Any = factory
    given: dict[str, Any] = {}
    while isinstance(outer, partial):
        given, outer = {**outer.keywords, **given}, outer.func
    cls = router_class(outer) if isinstance(outer, str) else outer
    build = partial(cls, **given)
    if not (isinstance(cls, type) and issubclass(cls, Router)):
        return build
    known = router_arguments(cls)
    if "top_k" in known and "top_k" not in given:
        return partial(build, top_k=top_k)
    if "router" in known:  # a wrapper
        inner = given.get("router", inspect.signature(cls).parameters["router"].default)
        return partial(build, router=with_top_k(inner, top_k))
    return build
