"""The option parsers' errors in one sentence: the fault, the value and the way out."""

from __future__ import annotations

import argparse
import inspect
import re
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from lightning import Callback, LightningDataModule, LightningModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from routerzoo import registry
from routerzoo.errors import UserError
from routerzoo.moe.experts import Experts
from routerzoo.tasks.class_paths import refusal

START = "--config language/HyperRouter, for example"
# What an option holds, by the last part of its name.
KINDS: dict[str, type] = {
    "experts": Experts,
    "model": LightningModule,
    "data": LightningDataModule,
    "callbacks": Callback,
    "logger": Logger,
    "lr_scheduler": LRScheduler,
    "optimizer": Optimizer,
}
BASES = ("LightningModule", "LightningDataModule", "Callback")


class CommandParser(argparse.ArgumentParser):
    """Argparse's parser, whose errors are one line: the reason, and where the options are explained."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        """Exit with the reason."""
        told = unrecognized(message, option_names(self)) or message
        self.exit(2, f"error: {told.removesuffix('?')}{'?' if told.endswith('?') else '.'} See {self.prog} --help\n")


@dataclass
class _Reason:
    """One of the reasons in a nested message.

    Args:
        option: that it is about.
        owner: class path of the class that takes the option, if any.
        text: what is wrong.
        value: that was given, if it is told.
    """

    option: str
    owner: str
    text: str
    value: str = ""


def explain(message: str, known: Iterable[str] = ()) -> str:
    """Turn jsonargparse's nested message into a sentence.

    A message is a tree of attempts: a line for each option and class on the way, and at the leaves what was wrong. The
    first leaf that is not about `None` is the reason, as the first type of an option is the one that is meant.

    Args:
        message: of the parser.
        known: options of the command, to suggest one.
    """
    if told := unrecognized(message, known):
        return told
    reasons = list(_reasons(message))
    first = reasons[0] if reasons else _Reason("", "", message)
    if refused := refusal(message):
        hint = "" if "is a function" in refused else ". If you trust it, name it on the command line, or add --trust"
        return f"{first.option or 'config'}: {refused}{hint}"
    option, text = first.option, first.text
    if required := re.match(r"the following arguments are required: (.*)", text):
        return _required(first, required[1])
    if missing := re.search(r"Dict must include a class_path.*?key='([^']+)'", text):
        return f"{option} is not chosen yet: put --{option} NAME before --{option}.{missing[1]}"
    if unaccepted := re.match(r"Option '([^']+)' is not accepted", text):
        return _unknown_option(first, unaccepted[1])
    if unfit := re.search(r"(?:Expected|Import path) '?([\w.]+)'? .*?(?:subclass of|returns) (?:<class ')?(\w+)", text):
        return f"{option}: {unfit[1]} is not a {unfit[2]}"
    if text.startswith(_NO_PATH):
        return _unknown_class(option, text.rpartition(": ")[2])
    expected = [r.text for r in reasons if r.option == option and r.text.startswith("Expected a")]
    if types := [_type_name(each) for each in expected if not each.startswith(_NO_PATH)]:
        return f"{option}: expected {' or '.join(dict.fromkeys(types))}, got {first.value!r}"
    return f"{option}: {text}" if option else text


def _reasons(message: str) -> Iterator[_Reason]:
    """Yield the leaves of a message, without those about `None` and about files."""
    found: list[tuple[int, _Reason]] = []
    above: list[tuple[int, str, str]] = []  # indentation, option and class of what we are in
    for line in filter(str.strip, message.splitlines()):
        indent = len(line) - len(line.lstrip(" "))
        text = line.strip().removeprefix("- ")
        while above and above[-1][0] >= indent:
            above.pop()
        option, owner = above[-1][1:] if above else ("", "")
        if given := re.match(r"Given value: (.*)", text):
            value = re.sub(r"^NestedArg\(key='[^']*', val=(.*)\)$", r"\1", given[1]).partition(". Got value: ")[0]
            for depth, reason in found:
                if depth >= indent and not reason.value:
                    reason.value = value.strip("'")
            continue
        while step := re.match(
            r"Type .*? expects a function or a callable class: |Problem with given class_path '(?P<owner>[^']+)':\s*"
            r"|Parser key \"(?P<key>[^\"]+)\"(?: element \d+)?:\s*|--(?P<help>[\w.]+)\.help: ",
            text,
        ):
            key = step["key"] or step["help"]
            option = ".".join(filter(None, (option, key)))
            owner = step["owner"] or owner
            text = text[step.end() :]
        above.append((indent, option, owner))
        if not text or re.match(_NO_REASON, text):
            continue
        text, _, rest = text.partition(" Got value: ")
        value, _, spec = rest.partition(". Got value: ")
        if inner := re.search(r"class_path='([^']+)'", spec or rest):
            owner = inner[1] if "is not accepted" in text else owner
            value = "" if rest.startswith("Namespace(") else value
        found.append((indent, _Reason(option, owner, text.rstrip("."), value)))
    yield from (reason for _, reason in found)


_NO_PATH = "Expected a dot import path string"
_NO_REASON = (
    r"Does not validate against|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|Expected a path but"
    r"|Not a valid subclass of|Subclass types expect|a class path \(str\)|a dict with|an? dict without|Unable to load"
)


def _type_name(text: str) -> str:
    """Return an expected type as a reader would write it."""
    if literal := re.search(r"Literal\[(.*)\]", text):
        return literal[1].replace("'", "").replace(", ", " or ")
    return re.sub(r"<class '([^']+)'>", r"\1", re.sub(r"^Expected an? ", "", text))


def _required(reason: _Reason, names: str) -> str:
    if reason.owner:
        cls = reason.owner.rpartition(".")[2]
        options = ", ".join(f"--{reason.option}.{name}" for name in names.split(", "))
        return f"{cls} also needs {names}: add {options}"
    command = names.partition(".")[0]
    missing = [name.rpartition(".")[2] for name in names.split(", ")]
    if command in ("validate", "test", "predict"):
        return f"{command} needs a checkpoint: --ckpt_path best, or the path of one"
    return f"there is no {' and no '.join(missing)}: give {START}, or {' and '.join(f'--{name}' for name in missing)}"


def _unknown_class(option: str, name: str) -> str:
    key = option.rpartition(".")[2].rstrip("+")
    if key == "router":
        return registry.unknown_router_message(name)
    if key not in KINDS:
        return f"{option}: no class is called {name!r}; give its import path"
    known = class_names(key)
    return f"{option}: no class is called {name!r}{registry.did_you_mean(name, known)} Known: {', '.join(known)}."


def class_names(key: str) -> list[str]:
    """Return the short names of the classes that an option may hold: `router`, `experts`, `model`, `data`."""
    if key == "router":
        return registry.list_routers()
    ours = "routerzoo" if key in ("experts", "model", "data") else ""
    found = {cls for cls in _subclasses(KINDS[key]) if not inspect.isabstract(cls) and ours in cls.__module__}
    return sorted({cls.__name__ for cls in found if not cls.__name__.startswith("_")})


def _subclasses(cls: type) -> Iterable[type]:
    direct: list[type] = cls.__subclasses__()
    for subclass in direct:
        yield subclass
        yield from _subclasses(subclass)


def _unknown_option(reason: _Reason, option: str) -> str:
    if not reason.owner:
        return f"there is no option {option!r}"
    leaf = option.rpartition(".")[2]
    name = reason.owner.rpartition(".")[2]
    if name in BASES:  # jsonargparse takes the base class where none was chosen
        return f"{reason.option} is not chosen yet, but {option} is set: put a config of a task before it, {START}"
    known = _arguments(reason.owner)
    return f"{name} has no option {leaf!r}{registry.did_you_mean(leaf, known)} It takes: {', '.join(known)}."


def _arguments(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    cls: Any = getattr(__import__(module, fromlist=[name]), name)
    # As the command line knows them: a class's `**kwargs` are the arguments of what it hands them to.
    found = ArgumentParser().add_class_arguments(cls, skip={"spec"}, fail_untyped=False, instantiate=False)
    return [argument for argument in found if "." not in argument]


def unrecognized(message: str, known: Iterable[str]) -> str:
    """Return what to say of options that no parser knows, where a message is about that; else nothing."""
    if not (found := re.match(r"unrecognized arguments: (\S+)", message)):
        return ""
    given = found[1].partition("=")[0]
    if not given.startswith("-"):
        hint = f": give --config {given}" if given.endswith((".yaml", ".yml")) else ""
        return f"{given!r} belongs to no option{hint}"
    return f"there is no option {given}{registry.did_you_mean(given, known).rstrip('.')}"


def option_names(parser: argparse.ArgumentParser) -> list[str]:
    """Return the options of a parser and of its subcommands."""
    found: list[str] = []
    for action in parser._actions:
        found += action.option_strings
        for choice in (action.choices or {}).values() if isinstance(action.choices, dict) else ():
            found += option_names(choice)
    return found


def explain_bare_help(arguments: Sequence[str]) -> None:
    """Name the classes where an option of help lacks one; the parser would only say that the option above it does.

    Raises:
        UserError: `--model.router.help` without a class.
    """
    for place, argument in enumerate(arguments):
        if (found := re.fullmatch(r"--(?:model|data)\.(\w+)\.help", argument)) is None:
            continue
        if place + 1 == len(arguments) or arguments[place + 1].startswith("-"):
            names = class_names(found[1]) if found[1] in ("router", "experts") else []
            raise UserError(f"{argument} explains a class: give it {' or '.join(names) or 'the name of one'}")


def refused_by_lightning(error: Exception) -> str | None:
    """Return in a sentence what Lightning refuses, an option or the content of a checkpoint; None for other errors."""
    told = " ".join(str(error).split())
    *_, innermost = [("", ""), *_places(error)]
    called = [name for module, name in _places(error) if module.endswith("connectors.checkpoint_connector")]
    if any("restore" in name or "resume" in name for name in called):
        return f"the checkpoint does not fit the run, or is incomplete: {type(error).__name__}: {told}"
    if isinstance(error, MisconfigurationException):
        return told
    return told if isinstance(error, ValueError) and innermost[0].startswith("lightning.") else None


def _places(error: BaseException) -> Iterator[tuple[str, str]]:
    """Yield module and function of all that was called when an error was raised, the innermost last."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        yield str(frame.f_globals.get("__name__")), frame.f_code.co_name
