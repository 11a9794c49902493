"""What the README names is there."""

import re
from pathlib import Path

import routerzoo
from routerzoo.__main__ import OVERVIEW

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_config_that_it_names_exists():
    named = set(re.findall(r"configs/[\w./-]+\.yaml", README + OVERVIEW))
    assert named
    for name in named:
        assert (ROOT / name).is_file(), name


def test_every_router_is_named():
    for name in routerzoo.list_routers():
        assert name in README or routerzoo.registry.router_package(name) != "routerzoo"


def test_ci_runs_the_test_command_and_nothing_else_of_its_own():
    command = next(line for line in README.splitlines() if ".venv-test/bin/python -m pytest" in line)
    assert command.strip() in (ROOT / ".ci" / "run").read_text()


def test_python_examples_run():
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})
