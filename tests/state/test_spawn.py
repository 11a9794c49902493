"""`ddp_spawn`, which pickles the task, the trainer and its callbacks."""

import subprocess
import sys

import pytest
import torch


@pytest.mark.full
def test_the_command_line_trains_in_spawned_processes(tmp_path):
    sizes = {"d_model": 16, "num_blocks": 1, "num_heads": 2, "num_experts": 4, "router": "XMoERouter"}
    trainer = {"max_steps": 2, "devices": 2, "accelerator": "cpu", "strategy": "ddp_spawn", "limit_val_batches": 1}
    options = [
        *("--model", "LanguageModeling", "--data", "TextData", "--data.sequence_length", "16", "--run_dir", "run"),
        *(f"--model.{name}={value}" for name, value in sizes.items()),
        *(f"--trainer.{name}={value}" for name, value in trainer.items()),
    ]
    command = [sys.executable, "-m", "routerzoo", "fit", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Trained to step 2" in done.stdout
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
