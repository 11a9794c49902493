"""What `pip install` brings works from any folder, without the repository."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from routerzoo.__main__ import OVERVIEW

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return a folder into which a wheel has been installed, without the packages that it needs."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    for command in (
        [*pip, "wheel", "-q", "--no-deps", "-w", str(folder / "wheel"), str(ROOT)],
        [*pip, "install", "-q", "--no-deps", "--target", str(folder / "site"), "--no-index"],
    ):
        if "install" in command:
            command += map(str, (folder / "wheel").glob("*.whl"))
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.fixture
def command(installed, tmp_path):
    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "routerzoo", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_wheel_holds_every_config(command):
    listed = {line.split()[0] for line in command("configs").splitlines()}
    files = (ROOT / "configs").rglob("*.yaml")
    assert listed == {path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in files}


def test_the_first_example_of_the_help_runs(command, installed):
    shown = command("--help")
    assert shown == OVERVIEW
    example = shlex.split(re.search(r"python -m routerzoo (fit .*)", shown)[1])
    printed = command(*example, "--trainer.max_steps", "1", "--trainer.limit_val_batches", "1", "--run_dir", "run")
    assert "Trained to step 1" in printed
    assert "bpb" in command("test", "--run_dir", "run", "--ckpt_path", "last", "--trainer.limit_test_batches", "1")


def test_a_packaged_sweep_finds_its_packaged_configs(command):
    printed = command("sweep", "--config", "sweeps/quick", "--print")
    assert printed.count("routerzoo fit --config") >= 6
