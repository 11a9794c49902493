"""The packages under plugins/: each router trains, from the command that its config names."""

import shlex
import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml

import routerzoo
from routerzoo.cli import main as cli

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[1]
PLUGINS = sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))


def is_installed(package):
    try:
        distribution(package.name)
    except PackageNotFoundError:
        return False
    return True


CONFIGS = [config for package in PLUGINS if is_installed(package) for config in sorted(package.glob("configs/*.yaml"))]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parents[1].name}/{path.stem}")
def test_config_trains_by_the_command_that_it_names(config, tmp_path):
    lines = config.read_text().splitlines()
    assert lines[0].startswith("# ")
    words = shlex.split(lines[1].removeprefix("#"))
    assert words[:4] == ["python", "-m", "routerzoo", "fit"]
    assert words[-1] == str(config.relative_to(ROOT))
    arguments = [str(ROOT / word) if word.endswith(".yaml") else word for word in words[3:]]
    quick = yaml.safe_dump(
        {
            "data": {"init_args": {"batch_size": 2}},
            "trainer": {
                "accelerator": "cpu",
                "max_epochs": None,
                "max_steps": 2,
                "val_check_interval": 2,
                "limit_val_batches": 1,
                "num_sanity_val_steps": 0,
                "enable_progress_bar": False,
            },
        }
    )
    (tmp_path / "quick.yaml").write_text(quick)
    shutil.copy(ROOT / "README.md", tmp_path)  # a corpus of one of the configs
    cli.main([*arguments, "--config", str(tmp_path / "quick.yaml")])
    router = yaml.safe_load(config.read_text())["model"]["init_args"]["router"]["class_path"]
    assert any(router in str(folder) for folder in tmp_path.rglob("checkpoints"))


def test_every_router_of_every_plugin_has_a_config():
    used = {yaml.safe_load(config.read_text())["model"]["init_args"]["router"]["class_path"] for config in CONFIGS}
    names = {n for n in routerzoo.list_routers() if routerzoo.registry.router_package(n) in {p.name for p in PLUGINS}}
    assert used >= names
