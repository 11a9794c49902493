"""Two processes on the CPU."""

import subprocess
import sys

import pytest

from tests.cli.test_main import CONFIG

pytestmark = pytest.mark.full


# One whose parameters stop learning on the way, and one with frozen buffers; each takes half a minute to start.
@pytest.mark.parametrize("router_name", ["StableMoERouter", "HyperRouter"])
def test_routers_train_on_two_processes(router_name, tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    options = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--model.router", router_name]
    done = subprocess.run(
        [sys.executable, "-m", "routerzoo", "fit", "--config", "config.yaml", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    assert "Trained to step 4" in done.stdout
    assert "sync_dist" not in done.stderr
    assert (tmp_path / f"runs/tiny-shakespeare-{router_name}/000/checkpoints/last.ckpt").is_file()
