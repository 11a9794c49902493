"""The option parser's errors in one sentence: the fault, the value and the way out."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

from jsonargparse import ArgumentParser
from lightning import LightningDataModule, LightningModule

from routerzoo import registry
from routerzoo.moe.experts import Experts
from routerzoo.tasks.class_paths import refusal


def explain(message: str) -> str:
    """Turn jsonargparse's nested message into a sentence.

    A message is a tree of attempts: for each option that holds a class, a line `Parser key "..."`; at the leaves what
    was wrong. The deepest leaf that is not about `None` is the reason.
    """
    keys = re.findall(r'Parser key "([^"]+)"', message)
    option = ".".join(keys)
    if refused := refusal(message):
        hint = "" if "is a function" in refused else ". If you trust it, name it on the command line, or add --trust"
        return f"{option or 'config'}: {refused}{hint}"
    if unknown := re.search(r"Expected a dot import path string: (\S+)", message):
        return _unknown_class(option, unknown[1])
    if unaccepted := re.search(r"Option '([^']+)' is not accepted", message):
        return _unknown_option(message, unaccepted[1])
    if missing := re.search(r"Dict must include a class_path.*?key='([^']+)'", message):
        return f"{option} is not chosen yet: put --{option} NAME before --{option}.{missing[1]}"
    leaves = re.findall(r"(Expected an? .*?|Expected .*?)(?:\.\s+)?Got value: (.*)", message)
    leaves = [leaf for leaf in leaves if "NoneType" not in leaf[0]]
    if option and leaves:
        expected = re.sub(r"<class '([^']+)'>", r"\1", leaves[-1][0])
        expected = re.sub(r"^Expected an? ", "expected ", expected)
        return f"{option}: {expected[0].lower()}{expected[1:]}, got {leaves[-1][1].strip()!r}"
    if message.startswith("Does not validate against any of the Union subtypes"):
        # Raised while an object is built: the attempts are the class that was asked for, and None.
        listed = message.partition("Errors:")[2].partition("\nGiven value type")[0]
        attempts = [attempt.strip() for attempt in re.split(r"\n\s+- ", listed) if attempt.strip()]
        meant = [attempt for attempt in attempts if "NoneType" not in attempt.partition("\n")[0]]
        message = meant[0] if meant else message
    message = re.sub(r'^Parser key "([^"]+)":', r"\1:", message)
    return re.sub(r"\s*\n\s*", " ", message).strip()


def _unknown_class(option: str, name: str) -> str:
    key = option.rpartition(".")[2]
    if key == "router":
        return registry.unknown_router_message(name)
    bases: dict[str, type] = {"experts": Experts, "model": LightningModule, "data": LightningDataModule}
    if key not in bases:
        return f"{option}: no class is called {name!r}; give its import path"
    known = sorted(
        cls.__name__ for cls in _subclasses(bases[key]) if not inspect.isabstract(cls) and "routerzoo" in cls.__module__
    )
    return f"{option}: no class is called {name!r}{registry.did_you_mean(name, known)} Known: {', '.join(known)}."


def _subclasses(cls: type) -> Iterable[type]:
    direct: list[type] = cls.__subclasses__()
    for subclass in direct:
        yield subclass
        yield from _subclasses(subclass)


def _unknown_option(message: str, option: str) -> str:
    owner = re.search(
        rf"Option '{re.escape(option)}' is not accepted\. Got value: Namespace\(class_path='([^']+)'", message
    ) or re.search(rf"class_path '([^']+)':\s+Option '{re.escape(option)}'", message)
    if owner is None:
        return f"there is no option {option!r}"
    known = _arguments(owner[1])
    leaf = option.rpartition(".")[2]
    name = owner[1].rpartition(".")[2]
    return f"{name} has no option {leaf!r}{registry.did_you_mean(leaf, known)} It takes: {', '.join(known)}."


def _arguments(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    cls: Any = getattr(__import__(module, fromlist=[name]), name)
    # As the command line knows them: a class's `**kwargs` are the arguments of what it hands them to.
    found = ArgumentParser().add_class_arguments(cls, skip={"spec"}, fail_untyped=False, instantiate=False)
    return [argument for argument in found if "." not in argument]
