"""Runs of sharded models: what they compute, and who reads their checkpoints."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from routerzoo.cli.main import main
from tests.test_resume import stop_after

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
CONFIG = """
model:
  class_path: LanguageModeling
  init_args: {d_model: 32, num_blocks: 2, num_heads: 2, num_experts: 4, num_shared_experts: 1, router: StableMoERouter}
data: {class_path: TextData, init_args: {sequence_length: 16, batch_size: 8}}
trainer:
  {accelerator: cpu, max_steps: 12, enable_progress_bar: false, limit_val_batches: 2, num_sanity_val_steps: 0,
   log_every_n_steps: 1, gradient_clip_val: 1.0}
"""
SHARED_EXPERTS = """
trainer: {devices: 2, strategy: {class_path: routerzoo.ShardedStrategy, init_args: {expert_parallel: 2}}}
data: {init_args: {batch_size: 4}}
"""


def losses(folder):
    with (folder / "logs" / "metrics.csv").open() as file:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}


def fit(folder, *options):
    main(["fit", "--config", "config.yaml", "--run_dir", str(folder), "--checkpoint_every", "6", *options])


def fit_on_two(folder, *options):
    command = [sys.executable, "-m", "routerzoo", "fit", "--config", "config.yaml", "--config", "shared.yaml"]
    return subprocess.run(
        [*command, "--run_dir", str(folder), "--checkpoint_every", "6", *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "shared.yaml").write_text(SHARED_EXPERTS)
    fit(tmp_path / "whole")
    return tmp_path


def test_a_run_of_two_processes_that_was_killed_goes_on_in_one(folder):
    killed = fit_on_two(
        folder / "run",
        "--trainer.callbacks+=tests.distributed.killed.KillAfter",
        "--trainer.callbacks.steps=8",
    )
    assert killed.returncode != 0
    assert (folder / "run/checkpoints/last.ckpt/meta.pt").is_file(), killed.stderr
    fit(folder / "run", "--ckpt_path", "last")
    assert losses(folder / "run") == pytest.approx(losses(folder / "whole"), rel=1e-5)


def test_all_processes_end_together_when_one_is_asked_to(folder):
    validated = ["--trainer.val_check_interval", "4", "--trainer.check_val_every_n_epoch", "null"]
    asked = fit_on_two(
        folder / "run",
        *validated,
        "--trainer.callbacks+=tests.distributed.killed.AskedToEndInValidation",
        "--trainer.callbacks.steps=8",
        "--trainer.callbacks.rank=1",
    )
    assert "stopped by SIGTERM" in asked.stderr
    assert asked.returncode == 143
    fit(folder / "run", "--ckpt_path", "last", *validated)
    assert losses(folder / "run") == pytest.approx(losses(folder / "whole"), rel=1e-5)


def test_a_run_of_one_process_goes_on_in_two(folder):
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 8)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            fit(folder / "run")
    done = fit_on_two(folder / "run", "--ckpt_path", "last")
    assert done.returncode == 0, done.stderr
    assert "at step 6" in done.stdout
    assert "Warning" not in done.stderr
    assert losses(folder / "run") == pytest.approx(losses(folder / "whole"), rel=1e-5)
    assert (folder / "run/checkpoints/last.ckpt/meta.pt").is_file()
    # Whoever evaluates it needs no second process.
    alone = ["--trainer.devices", "1", "--trainer.strategy", "auto", "--trainer.limit_test_batches", "2"]
    main(["test", "--ckpt_path", str(folder / "run/checkpoints/last.ckpt"), *alone])


def test_the_strategy_has_a_name(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "shared.yaml").write_text("trainer: {devices: 2, strategy: sharded}")
    done = fit_on_two(tmp_path / "run", "--trainer.max_steps", "2")
    assert done.returncode == 0, done.stderr
    assert "Trained to step 2" in done.stdout


def test_numbers_that_do_not_divide_are_refused(folder):
    done = fit_on_two(folder / "run", "--model.num_experts", "3")
    assert "error: expert_parallel = 2 must divide num_experts = 3" in done.stderr
