"""Options of the commands beside `LightningCLI`, and what is said of those that no command has."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from routerzoo import registry

TRUST, TRUST_VARIABLE = "--trust", "ROUTERZOO_TRUST"
"""The option, or the environment variable, that lets configs name any package's classes. No config can set it."""


class CommandParser(argparse.ArgumentParser):
    """Argparse's parser, whose errors are one line: the reason, and where the options are explained."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        """Exit with the reason."""
        told = unrecognized(message, option_names(self)) or message
        self.exit(2, f"error: {told.removesuffix('?')}{'?' if told.endswith('?') else '.'} See {self.prog} --help\n")


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
