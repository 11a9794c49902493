"""What the README names is there."""

import re
import sys
import types
from pathlib import Path

import pytest

import routerzoo
from routerzoo import metrics
from routerzoo.__main__ import OVERVIEW
from routerzoo.testing import CHECKS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}


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


@pytest.mark.parametrize("name", DOCS)
def test_python_examples_run(name, monkeypatch):
    module = types.ModuleType("example")  # one example after the other, as in a reader's file
    monkeypatch.setitem(sys.modules, "example", module)
    for block in re.findall(r"```python\n(.*?)```", DOCS[name], re.DOTALL):
        if "my_package" not in block:
            exec(compile(block, name, "exec"), module.__dict__)


@pytest.mark.parametrize("name", DOCS)
def test_links_lead_somewhere(name):
    folder = ROOT if name == "README.md" else ROOT / "docs"
    for target in re.findall(r"\]\(([\w./-]+)\)", DOCS[name]):
        assert (folder / target).exists(), target


def test_every_check_metric_and_router_is_documented():
    assert all(f"`{check}`" in DOCS["check_router.md"] for check in CHECKS)
    assert all(f"`{name}`" in DOCS["metrics.md"] for name in set(metrics.__all__) - {"expert_sets"})
    assert all(f"`{name}`" in DOCS["fidelity.md"] for name in routerzoo.list_routers() if name != "BilinearRouter")
