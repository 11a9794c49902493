"""`PretrainedLanguageModeling` on two processes: what one computes on the same batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from routerzoo.cli.main import main

pytest.importorskip("transformers")
pytest.importorskip("peft")

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
SHORT = {
    "--trainer.accelerator": "cpu",
    "--trainer.max_steps": "4",
    "--trainer.val_check_interval": "4",
    "--trainer.limit_val_batches": "2",
    "--trainer.enable_progress_bar": "false",
    "--data.sequence_length": "16",
    "--model.lr_scheduler": "null",
}
STRATEGIES = {
    "ddp": ["--config", str(CONFIGS / "trainer" / "ddp.yaml")],
    "sharded": ["--config", str(CONFIGS / "trainer" / "sharded.yaml")],
    "expert-parallel": ["--config", str(CONFIGS / "trainer" / "expert-parallel.yaml")],
}


def options_of(config, batch_size, *more):
    short = [word for option in {**SHORT, "--data.batch_size": str(batch_size)}.items() for word in option]
    return ["fit", "--config", str(CONFIGS / "pretrained" / f"{config}.yaml"), *more, *short]


def on_two(*words):
    done = subprocess.run(
        [sys.executable, "-m", "routerzoo", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def loss_of(folder):
    return json.loads((folder / "results.json").read_text())["fit"]["bpb"]


@pytest.mark.parametrize(
    ("config", "strategy"),
    [("upcycle", "ddp"), ("upcycle", "sharded"), ("keep", "expert-parallel"), ("lora-experts", "sharded")],
)
def test_two_processes_train_as_one_does(config, strategy, tmp_path):
    main([*options_of(config, 4), "--run_dir", str(tmp_path / "one")])
    two = [*STRATEGIES[strategy], "--trainer.devices", "2"]
    on_two(*options_of(config, 2, *two), "--run_dir", str(tmp_path / "two"))
    assert loss_of(tmp_path / "two") == pytest.approx(loss_of(tmp_path / "one"), rel=1e-6)


def test_one_process_continues_what_two_have_sharded(tmp_path):
    main([*options_of("upcycle", 4), "--trainer.max_steps", "6", "--run_dir", str(tmp_path / "one")])
    two = [*STRATEGIES["sharded"], "--trainer.devices", "2"]
    on_two(*options_of("upcycle", 2, *two), "--run_dir", str(tmp_path / "two"))
    alone = ["--run_dir", str(tmp_path / "two"), "--ckpt_path", "last", "--trainer.devices", "1"]
    alone += ["--trainer.strategy", "auto", "--trainer.enable_progress_bar", "false"]
    main(["fit", *alone, "--data.batch_size", "4", "--trainer.max_steps", "6"])
    assert loss_of(tmp_path / "two") == pytest.approx(loss_of(tmp_path / "one"), rel=1e-6)
    main(["predict", *alone, "--model.predict_tokens", "2"])
    assert (tmp_path / "two" / "predictions.jsonl").is_file()
