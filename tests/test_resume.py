"""A run that stops and resumes is the run that never stopped, bit for bit."""

import csv

import pytest
import torch
from lightning import Callback

from routerzoo.cli.main import main

pytestmark = pytest.mark.full

LANGUAGE = """
model:
  class_path: LanguageModeling
  init_args: {d_model: 16, num_blocks: 2, num_heads: 2, num_experts: 4, dropout: 0.1}
data: {class_path: TextData, init_args: {sequence_length: 16, batch_size: 16}}
"""
VISION = """
model:
  class_path: ImageClassification
  init_args:
    {num_experts: 4, patch_ids: lsh, backbone_arguments: {patch_size: 14, embed_dim: 12, depth: 2, num_heads: 2}}
data: {class_path: ImageData, init_args: {batch_size: 16}}
"""
TRAINER = """
trainer:
  accelerator: cpu
  enable_progress_bar: false
  limit_train_batches: 8
  limit_val_batches: 1
  num_sanity_val_steps: 0
  log_every_n_steps: 1
  val_check_interval: 7
  check_val_every_n_epoch: null
  callbacks:
    - {class_path: routerzoo.KSchedule, init_args: {start: 1, end: 4}}
    - {class_path: routerzoo.StabilityMonitor, init_args: {every_n_steps: 9, picture: null}}
    - {class_path: routerzoo.RoutingMonitor, init_args: {picture: null}}
"""


def losses(folder):
    with (folder / "logs" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(set(steps)), "a step is logged twice"
    return {int(row["step"]): row["train/loss"] for row in rows}


def fit(folder, config, router, steps, *options):
    # The schedules need the whole length from the start, so an interruption is a limit of another kind.
    arguments = ["--trainer.max_steps", "66", "--checkpoint_every", "2", "--run_dir", str(folder), *options]
    with pytest.MonkeyPatch.context() as patch:
        if steps is not None:
            stop_after(patch, steps)
        main(["fit", "--config", str(config), "--model.router", router, "--model.router.top_k", "1", *arguments])


def stop_after(patch, steps):
    from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

    advance = _TrainingEpochLoop.advance

    def stopping(self, data_fetcher):
        advance(self, data_fetcher)
        if self.trainer.global_step >= steps:
            raise KeyboardInterrupt

    patch.setattr(_TrainingEpochLoop, "advance", stopping)


@pytest.mark.parametrize("domain", ["language", "vision"])
def test_stop_and_resume(router_name, domain, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text((LANGUAGE if domain == "language" else VISION) + TRAINER)
    fit(tmp_path / "whole", config, router_name, None)
    # StableMoE switches at step 7, k changes at 11, 33 and 55; an epoch has 8 batches. The first resumed part is of 54
    # steps across all of it.
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path / "resumed", config, router_name, 4)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path / "resumed", config, router_name, 58, "--ckpt_path", "last")
    fit(tmp_path / "resumed", config, router_name, None, "--ckpt_path", "last")
    assert len(losses(tmp_path / "whole")) == 66
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
    whole, resumed = (
        torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True) for run in ("whole", "resumed")
    )
    for name, value in whole["state_dict"].items():
        other = resumed["state_dict"][name]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    records = [
        next(state for name, state in checkpoint["callbacks"].items() if name.startswith("StabilityMonitor"))
        for checkpoint in (whole, resumed)
    ]
    assert records[0]["steps"] == records[1]["steps"] == [*range(0, 64, 9), 66][: len(records[0]["steps"])]
    assert all(torch.equal(*experts) for experts in zip(*(record["experts"] for record in records), strict=True))


class StopAt(Callback):
    """Ends the run as Lightning's `Timer` and `EarlyStopping` do."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step == self.step


# In the middle of an epoch of 8 batches and at its end.
@pytest.mark.parametrize(
    "stop", [["--trainer.callbacks.step=5"], ["--trainer.callbacks.step=8"]], ids=["middle", "end"]
)
def test_a_run_that_a_callback_ended_without_validation_resumes_bit_for_bit(stop, tmp_path):
    (tmp_path / "config.yaml").write_text(LANGUAGE + TRAINER.partition("  callbacks:")[0])
    short = ["fit", "--config", str(tmp_path / "config.yaml"), "--trainer.limit_val_batches", "0"]
    short += ["--trainer.max_steps", "12"]
    main([*short, "--run_dir", str(tmp_path / "whole")])
    resumed = [*short, "--run_dir", str(tmp_path / "resumed")]
    main([*resumed, "--trainer.callbacks+=tests.test_resume.StopAt", *stop])
    main([*resumed, "--ckpt_path", "last"])
    assert len(losses(tmp_path / "whole")) == 12
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
