"""The option parsers' errors in one sentence: the fault, the value and the way out."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentParser
from lightning import Callback, LightningDataModule, LightningModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from routerzoo import registry
from routerzoo.cli.arguments import unrecognized
from routerzoo.errors import UserError
from routerzoo.moe.experts import Experts
from routerzoo.optim import PLATEAU
from routerzoo.tasks.class_paths import LIBRARIES, refusal

FUNCTION = "takes a function, which no config can hold"
BUILT = "takes schedules that are built already, which no config can hold"
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
UNUSABLE = {
    "LambdaLR": FUNCTION,
    "MultiplicativeLR": FUNCTION,
    "SequentialLR": BUILT,
    "ChainedScheduler": BUILT,
    "ReduceLROnPlateau": PLATEAU,
}
"""Schedules that no config can describe, or that no task follows, and why."""
BASES = ("LightningModule", "LightningDataModule", "Callback")


@dataclass
class _Reason:
    """One of the reasons in a nested message.

    Args:
        option: that it is about.
        owner: class path of the class that takes the option, if any.
        text: what is wrong.
        value: that was given, if known.
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
    if unread := re.search(r"Unable to load config '([^']+)'", message):
        return f"the config {unread[1]} does not exist, or is not YAML"
    reasons = list(_reasons(message))
    first = reasons[0] if reasons else _Reason("", "", message)
    if refused := refusal(message):
        hint = "" if "is a function" in refused else ". If you trust it, name it on the command line, or add --trust"
        return f"{first.option or 'config'}: {refused}{hint}"
    option, text = first.option, first.text
    if option.endswith("lr_scheduler") and (unusable := re.search(rf"\b({'|'.join(UNUSABLE)})\b", text + first.value)):
        return f"{option}: {unusable[1]} {UNUSABLE[unusable[1]]}: take {' or '.join(class_names('lr_scheduler'))}"
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
    built = re.match(r"Namespace\(class_path='([^']+)'", reason.value)  # what a factory builds is no owner yet
    if owner := built[1] if built else reason.owner:
        cls = owner.rpartition(".")[2]
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
    if key == "lr_scheduler":  # other libraries have some that none but their own loop can step
        found = {cls for cls in found if cls.__module__.partition(".")[0] in LIBRARIES}
    return sorted({cls.__name__ for cls in found if not cls.__name__.startswith("_")} - UNUSABLE.keys())


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
    given = {"optimizer", "total_steps"} if issubclass(cls, LRScheduler) else {"spec"}
    found = ArgumentParser().add_class_arguments(cls, skip=given, fail_untyped=False, instantiate=False)
    return [argument for argument in found if "." not in argument]


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


def refused_class(error: BaseException | None) -> str | None:
    """Return why a class could not be built, such as a logger, where that is why an option was refused.

    The parser says no more than that its value is of another type.
    """
    while error is not None:
        told = " ".join(str(error).split())
        package = type(error).__module__.partition(".")[0]
        if package == "routerzoo":
            return None  # it says more than what it was raised from
        if isinstance(error, ModuleNotFoundError):
            return told.replace(". HINT: Try running", ": run")
        if package not in ("builtins", "argparse", "jsonargparse"):
            return f"{package}: {told}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def refused_by_libraries(error: Exception) -> str | None:
    """Return in a sentence what a library refuses: an option, or the content of a file; None for other errors."""
    told = " ".join(str(error).split())
    if isinstance(error, UnicodeDecodeError):
        return f"a file that the command names is not a text in UTF-8: {told}"
    *_, (module, function) = [("", ""), *_places(error)]
    called = [name for module, name in _places(error) if module.endswith("connectors.checkpoint_connector")]
    if any("restore" in name or "resume" in name for name in called):
        return f"the checkpoint does not fit the run, or is incomplete: {type(error).__name__}: {told}"
    if isinstance(error, MisconfigurationException):
        return told
    # What else they raise is a mistake of whoever calls them.
    refuses = module.startswith("lightning.") or (function == "__init__" and module.startswith(("torch.", "timm.")))
    return told if isinstance(error, (TypeError, ValueError)) and refuses else None


def _places(error: BaseException) -> Iterator[tuple[str, str]]:
    """Yield module and function of all that was called when an error was raised, the innermost last."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        yield str(frame.f_globals.get("__name__")), frame.f_code.co_name
