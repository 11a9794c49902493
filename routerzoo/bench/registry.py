"""Names to tasks: built-in ones by module, anyone's by the entry-point group `routerzoo.bench_tasks` or by a file."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from pathlib import Path
from typing import TypeVar

from routerzoo.bench.task import BenchTask
from routerzoo.errors import UserError
from routerzoo.registry import did_you_mean, load_group

ENTRY_POINT_GROUP = "routerzoo.bench_tasks"

_tasks: dict[str, type[BenchTask]] = {}

C = TypeVar("C", bound=type[BenchTask])


def register_task(cls: C) -> C:
    """Make a task known by its name; a class decorator.

    A package declares an entry point beside it: `[project.entry-points."routerzoo.bench_tasks"]`,
    `my-task = "my_package:MyTask"`. A file that is given by its path (`--tasks my_task.py`) needs neither.

    Raises:
        ValueError: no name, or the name of another task.
    """
    if not cls.name or inspect.isabstract(cls):
        raise ValueError(f"{cls.__name__} has no name, or does not implement batch")
    known = _tasks.get(cls.name)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(
            f"a task called {cls.name!r} exists already: {known.__module__}.{known.__qualname__}; rename the new one"
        )
    _tasks[cls.name] = cls
    return cls


def list_tasks(tier: str = "exact") -> list[str]:
    """Return the names of a tier's tasks, those of installed packages included."""
    _load()
    return sorted(name for name, cls in _tasks.items() if cls.tier == tier)


def task_class(name: str) -> type[BenchTask]:
    """Return the task of a name, of a file's path, or of a name and options (`bytes:play,mine=text.txt`).

    Raises:
        UserError: there is none; the message lists the names.
    """
    if name.endswith(".py"):
        return _task_of_file(Path(name))
    _load()
    plain, with_options, options = name.partition(":")
    if with_options and plain in _tasks:
        return _with_options(plain, options)
    if name not in _tasks:
        raise UserError(
            f"unknown task {name!r}{did_you_mean(name, _tasks)} There are {', '.join(sorted(_tasks))}; the path of a "
            ".py file with a BenchTask is a task, too"
        )
    return _tasks[name]


@functools.cache
def _with_options(name: str, options: str) -> type[BenchTask]:
    return _tasks[name].with_options(options)


def _load() -> None:
    for tier in ("tasks", "realistic"):
        folder = importlib.import_module(f"routerzoo.bench.{tier}")
        for module in pkgutil.iter_modules(folder.__path__):
            importlib.import_module(f"{folder.__name__}.{module.name}")
    for cls in load_group(ENTRY_POINT_GROUP, BenchTask):
        assert issubclass(cls, BenchTask)
        register_task(cls)


def _task_of_file(path: Path) -> type[BenchTask]:
    """Import a file once, and return the task that it defines.

    Raises:
        UserError: no such file, one that cannot be imported, or one that defines no task or several.
    """
    path = path.resolve()
    if not path.is_file():
        raise UserError(f"there is no task file {path}")
    module_name = f"routerzoo_bench_task_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise UserError(f"the task file {path} cannot be imported: {type(error).__name__}: {error}") from error
    found = [
        cls
        for cls in vars(module).values()
        if inspect.isclass(cls) and issubclass(cls, BenchTask) and cls.__module__ == module_name and cls.name
    ]
    if len(found) != 1:
        what = ", ".join(cls.__name__ for cls in found) or "none"
        raise UserError(f"a task file defines one BenchTask with a name, {path} defines {what}")
    return register_task(found[0])
