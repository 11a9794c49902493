"""Names to router classes: built-in ones by decorator, anyone's by the entry-point group `routerzoo.routers`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import threading
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from routerzoo.router import Router
from routerzoo.routing import LayerSpec

ENTRY_POINT_GROUP = "routerzoo.routers"
DISABLE_PLUGINS = "ROUTERZOO_DISABLE_PLUGINS"
"""Set this environment variable to anything but 0 to leave installed plugins out."""

SLOW_SECONDS = 5.0
"""A plugin whose import takes longer is named, so that nobody has to guess what a command waits for."""

R = TypeVar("R", bound=type[Router])


@dataclass(frozen=True)
class BrokenPlugin:
    """An entry point that gives no usable router, or no class of another kind.

    Args:
        name: the entry point's name.
        package: the distribution that declares it.
        reason: what is wrong, in a sentence.
    """

    name: str
    package: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} of package {self.package}: {self.reason}"


class _Registry:
    """What this process knows. Entry points are read once, on first need."""

    def __init__(self) -> None:
        self.routers: dict[str, type[Router]] = {}
        self.packages: dict[str, str] = {}
        self.broken: list[BrokenPlugin] = []
        self.builtin_loaded = False
        self.groups_loaded: set[str] = set()


_registry = _Registry()


def register_router(cls: R) -> R:
    """Make a router known by its class name.

    A class decorator. Packages that others install should declare an entry point too, so that nobody has to import
    them: `[project.entry-points."routerzoo.routers"]`, `MyRouter = "my_package:MyRouter"`.

    Raises:
        TypeError: not a concrete subclass of `Router`.
        ValueError: another router has that name.
    """
    reason = _not_a_router(cls)
    if reason:
        raise TypeError(reason)
    known = _registry.routers.get(cls.__name__)
    # Reloading a module defines the same class anew, which is no clash.
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(
            f"a router called {cls.__name__} exists already: {known.__module__}.{known.__qualname__}. Names are "
            "unique, since configs use them; rename the new one"
        )
    if known is not None:
        known.is_registered = False
    cls.is_registered = True
    _registry.routers[cls.__name__] = cls
    return cls


def list_routers(*, plugins: bool = True) -> list[str]:
    """Return the names of all usable routers, sorted.

    Args:
        plugins: load installed plugins first. One that is broken is reported by a warning, once.
    """
    _load_builtin()
    if plugins:
        load_plugins()
    return sorted(_registry.routers)


def router_class(name: str) -> type[Router]:
    """Return the router class of that name.

    Raises:
        KeyError: no router has it; the message lists the known names and the nearest spelling.
    """
    _load_builtin()
    if name not in _registry.routers:
        load_plugins()
    if name not in _registry.routers:
        raise UnknownRouterError(unknown_router_message(name))
    return _registry.routers[name]


class UnknownRouterError(KeyError):
    """No router has the name asked for."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show it quoted


def unknown_router_message(name: str) -> str:
    """Say that no router has this name, which ones there are and which one may be meant."""
    known = list_routers()
    message = f"unknown router {name!r}{did_you_mean(name, known)} Known routers: {', '.join(known)}."
    for plugin in broken_plugins():
        message += f" Broken plugin: {plugin}."
    return message


def create_router(name: str, spec: LayerSpec | None = None, **arguments: Any) -> Router:
    """Build a router by name.

    Args:
        name: class name of a built-in router or of an installed plugin's.
        spec: sizes of the layer. Without one, those keyword arguments that are fields of `LayerSpec` make it.
        arguments: the router's own arguments.

    Raises:
        UnknownRouterError: no such router.
        TypeError: an argument that the router does not take; the message lists those it takes.
        ValueError: a value that the router refuses.

    Example:
        >>> create_router("LinearRouter", d_model=8, num_experts=4, top_k=2)
        LinearRouter(d_model=8, num_experts=4, top_k=2)
    """
    cls = router_class(name)
    sizes = {field.name for field in fields(LayerSpec)}
    if spec is None:
        given = {key: arguments.pop(key) for key in list(arguments) if key in sizes}
        if missing := [key for key in ("d_model", "num_experts") if key not in given]:
            raise TypeError(f"create_router({name!r}) needs {' and '.join(missing)}, or a LayerSpec")
        spec = LayerSpec(**given)
    known = router_arguments(cls)
    for key in arguments:
        if key not in known:
            meant = did_you_mean(key, [*known, *sizes])
            raise TypeError(f"{name} has no argument {key!r}{meant} It takes: {', '.join(known)}.")
    return cls(spec, **arguments)


def router_arguments(cls: type[Router]) -> list[str]:
    """Return the names of a router class's own arguments."""
    parameters = inspect.signature(cls).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown name: the nearest known one, if any is near."""
    # Routers share an ending that says nothing of which is meant.
    by_stem = {candidate.lower().removesuffix("router"): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower().removesuffix("router"), by_stem, n=1, cutoff=0.6)
    return f"; did you mean {by_stem[near[0]]!r}?" if near else "."


def broken_plugins() -> list[BrokenPlugin]:
    """Return the installed entry points that give nothing usable."""
    load_plugins()
    return list(_registry.broken)


def router_package(name: str) -> str:
    """Return the distribution that a router comes from."""
    return _registry.packages.get(name, _registry.routers[name].__module__.partition(".")[0])


def load_plugins() -> None:
    """Import the routers of all installed packages, once per process.

    A plugin that cannot be imported, gives something else than a router, or takes a name that exists is left out; a
    warning names it and the rest still work.
    """
    _load_builtin()
    for point in _points_to_load(ENTRY_POINT_GROUP):
        # Checked before the import: two visible classes of one name would make the name unusable in configs.
        if point.name in _registry.routers:
            if _gives(point, _registry.routers[point.name]):
                _registry.packages[point.name] = _package(point)
                continue  # imported before, by hand or with another router of its package
            reason = f"the name {point.name} exists already, from {router_package(point.name)}; one must be renamed"
        else:
            reason = _load_plugin(point)
        _report(point, reason)


def load_group(group: str, base: type) -> list[type]:
    """Import the classes of another entry-point group, once per process; broken ones are left out with a warning.

    Args:
        group: name of the group.
        base: what the classes must be.

    Returns:
        The classes that this call has imported.
    """
    loaded: list[type] = []
    for point in _points_to_load(group):
        cls, reason = _import(point)
        if not reason and not (isinstance(cls, type) and issubclass(cls, base)):
            reason = f"{cls!r} is not a subclass of {base.__name__}"
        _report(point, reason)
        if not reason and isinstance(cls, type):
            loaded.append(cls)
    return loaded


def _points_to_load(group: str) -> list[EntryPoint]:
    if group in _registry.groups_loaded or os.environ.get(DISABLE_PLUGINS, "0") != "0":
        return []
    _registry.groups_loaded.add(group)
    return sorted(entry_points(group=group), key=lambda point: (point.name, _package(point)))


def _report(point: EntryPoint, reason: str) -> None:
    if reason:
        broken = BrokenPlugin(point.name, _package(point), reason)
        _registry.broken.append(broken)
        warnings.warn(f"routerzoo ignores the plugin {broken}", stacklevel=3)


def _import(point: EntryPoint) -> tuple[object, str]:
    """Return what an entry point gives, and why it gives nothing."""
    slow = f"still importing the plugin {point.name} of package {_package(point)} after {SLOW_SECONDS:g} s\n"
    timer = threading.Timer(SLOW_SECONDS, lambda: sys.stderr.write(slow))
    timer.daemon = True
    timer.start()
    try:
        return point.load(), ""
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # it may fail in any way, `sys.exit` included, and must not take the others with it
        return None, f"cannot be imported ({type(error).__name__}: {error})"
    finally:
        timer.cancel()
        timer.join()  # before anybody forks


def _gives(point: EntryPoint, known: type[Router]) -> bool:
    """Whether an entry point is that of a class that is registered already."""
    if point.value.partition(":")[0].partition(".")[0] != known.__module__.partition(".")[0]:
        return False
    return _import(point)[0] is known  # what fails is reported as a name that is taken


def _load_plugin(point: EntryPoint) -> str:
    """Register a plugin's router, or say why not."""
    cls, reason = _import(point)
    if reason := reason or _not_a_router(cls):
        return reason
    assert isinstance(cls, type)
    if cls.__name__ != point.name:
        return f"the entry point gives a class called {cls.__name__}; the two names must be equal"
    register_router(cls)
    _registry.packages[point.name] = _package(point)
    return ""


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value.partition(":")[0]


def _not_a_router(cls: object) -> str:
    if not (isinstance(cls, type) and issubclass(cls, Router)):
        return f"{cls!r} is not a subclass of routerzoo.Router"
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        return f"{cls.__name__} is abstract: it does not implement {missing}"
    return ""


def _load_builtin() -> None:
    if not _registry.builtin_loaded:
        _registry.builtin_loaded = True
        importlib.import_module("routerzoo.routers")
