"""What the README names is there."""

import re
import sys
import tomllib
import types
from pathlib import Path

import pytest

import routerzoo
from routerzoo import metrics
from routerzoo.__main__ import OVERVIEW
from routerzoo.testing import CHECKS
from tests.conftest import BUILT_IN

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PLUGINS = sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))
DOCS = {path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}


def test_every_config_that_it_names_exists():
    named = set(re.findall(r"configs/[\w./-]+\.yaml", README + OVERVIEW))
    assert named
    for name in named:
        assert (ROOT / name).is_file(), name


def test_every_router_is_named():
    for name in BUILT_IN:
        assert f"`{name}`" in README


@pytest.mark.parametrize("package", PLUGINS, ids=lambda package: package.name)
def test_every_plugin_documents_its_routers_and_configs(package):
    told = (package / "README.md").read_text(encoding="utf-8")
    assert f"`plugins/{package.name}`" in README
    points = tomllib.loads((package / "pyproject.toml").read_text())["project"]["entry-points"]["routerzoo.routers"]
    for name in points:
        assert f"`{name}`" in told
        assert f"`{name}`" in DOCS["fidelity.md"]
    for config in (package / "configs").glob("*.yaml"):
        assert config.name in told


def test_ci_runs_the_test_command():
    command = next(line for line in README.splitlines() if ".venv-test/bin/python -m pytest" in line)
    assert command.strip() in (ROOT / ".ci" / "run").read_text()  # verbatim


@pytest.mark.parametrize("name", DOCS)
@pytest.mark.full
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
