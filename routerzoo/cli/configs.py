"""Config files: found by name, also those that ship with the package, and refused in a sentence that names the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from routerzoo.cli.parser_errors import CommandParser
from routerzoo.errors import UserError, reason_of
from routerzoo.registry import did_you_mean

OPTIONS = ("--config", "-c")


def packaged_folder() -> Path:
    """Return the folder of the configs that ship with the package; in a checkout they lie beside it."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def packaged_names() -> list[str]:
    """Return the names of these configs, such as `language/HyperRouter`."""
    folder = packaged_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def find_config(name: str) -> Path:
    """Return the file of that name: one that exists, or one that ships with the package.

    `language/HyperRouter`, `language/HyperRouter.yaml` and `configs/language/HyperRouter.yaml` are the same.

    Raises:
        UserError: there is none.
    """
    if Path(name).exists():
        return Path(name)
    short = name.removeprefix("./").removeprefix("configs/").removesuffix(".yaml")
    if short in packaged_names():
        return packaged_folder() / f"{short}.yaml"
    meant = did_you_mean(short, packaged_names())
    raise UserError(
        f"the config {name} does not exist{meant} `python -m routerzoo configs` lists those that ship with the package"
    )


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML file of options.

    Raises:
        UserError: it cannot be read, or is no such file.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror or reason_of(error)}") from error
    except UnicodeDecodeError as error:
        where = f"byte {error.object[error.start]:#04x} at position {error.start}"
        raise UserError(f"the config {path} is not a text in UTF-8: {where}. Save it as UTF-8") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        told = getattr(error, "problem", None) or getattr(error, "reason", None) or " ".join(str(error).split())
        raise UserError(f"the config {path} is not YAML: {told}{where}") from error
    if not isinstance(content, dict):
        found = "is empty" if content is None else f"holds a {type(content).__name__}"
        raise UserError(f"the config {path} {found}; a config maps names of options to values")
    return content


def with_config_files(args: Sequence[str]) -> list[str]:
    """Replace the names of configs by the paths of their files, once each has been found to be readable.

    Raises:
        UserError: one is not; or two describe different tasks, of which the first would only leave its remains.
    """
    replaced, tasks = list(args), dict[str, str]()
    for place, arg in enumerate(args):
        option, assigned, value = arg.partition("=")
        if option not in OPTIONS or not (assigned or place + 1 < len(args)):
            continue
        name = value if assigned else args[place + 1]
        if not name or any(mark in name for mark in ":{\n"):
            continue  # options in YAML, instead of a file of them
        path = find_config(name)
        model = read_config(path).get("model")
        if isinstance(model, dict) and isinstance(model.get("class_path"), str):
            tasks.setdefault(model["class_path"].rpartition(".")[2], name)
        replaced[place if assigned else place + 1] = f"{option}={path}" if assigned else str(path)
    if len(tasks) > 1:
        told = " and ".join(f"{name} describes {task}" for task, name in tasks.items())
        raise UserError(f"{told}: give the config of one task")
    return replaced


def main(args: Sequence[str]) -> None:
    """List the packaged configs, or print one."""
    parser = CommandParser(
        prog="python -m routerzoo configs",
        description="List the configs that ship with routerzoo, for --config NAME; or print one, to start a file from.",
    )
    parser.add_argument("name", nargs="?", help="config to print")
    options = parser.parse_args(args)
    if options.name is not None:
        print(find_config(options.name).read_text(encoding="utf-8"), end="")
        return
    names = packaged_names()
    width = max(map(len, names), default=0)
    for name in names:
        first = (packaged_folder() / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
        print(f"{name:{width}}  {first.removeprefix('# ')}")
