"""A long run takes no more memory, files or processes than a short one."""

import json
import os

import pytest
from lightning import Callback

from tests.faults.lives import start

pytestmark = pytest.mark.full

CONFIG = """
model:
  class_path: LanguageModeling
  init_args: {d_model: 16, num_blocks: 2, num_heads: 2, num_experts: 4}
data: {class_path: TextData, init_args: {sequence_length: 16, batch_size: 4}}
trainer:
  accelerator: cpu
  max_steps: 2000
  enable_progress_bar: false
  limit_val_batches: 2
  num_sanity_val_steps: 0
  log_every_n_steps: 1
  val_check_interval: 50
  check_val_every_n_epoch: null
  callbacks:
    - {class_path: KSchedule, init_args: {start: 1, end: 4}}
    - {class_path: StabilityMonitor, init_args: {every_n_steps: 100}}
    - {class_path: ExpertSpecialization, init_args: {while_training: true}}
    - {class_path: StopOnNonFiniteLoss, init_args: {skip: 3}}
    - {class_path: RoutingPictures, init_args: {every_n_validations: 10}}
    - {class_path: tests.faults.test_long_runs.Measure}
checkpoint_every: 20
"""


class Measure(Callback):
    """Writes down what the process holds."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step % 100 == 0:
            pages = int(open("/proc/self/statm").read().split()[1])  # noqa: SIM115
            held = {
                "step": trainer.global_step,
                "memory": pages * os.sysconf("SC_PAGE_SIZE"),
                "files": len(os.listdir("/proc/self/fd")),
                "threads": len(os.listdir("/proc/self/task")),
                "children": len(open(f"/proc/self/task/{os.getpid()}/children").read().split()),  # noqa: SIM115
            }
            with open("held.jsonl", "a") as file:
                file.write(json.dumps(held) + "\n")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="counts by /proc")
def test_two_thousand_steps_with_all_callbacks(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    process = start(["fit", "--config", "config.yaml", "--trust", "--run_dir", "run"], "log.txt")
    process.join(500)
    assert process.exitcode == 0, (tmp_path / "log.txt").read_text()[-2000:]
    held = [json.loads(line) for line in (tmp_path / "held.jsonl").read_text().splitlines()]
    assert [row["step"] for row in held] == list(range(0, 2000, 100))
    # By step 600 everything has happened once: validation, pictures, checkpoints.
    early, late = held[6:9], held[-3:]
    for name in ("files", "threads", "children"):
        assert max(row[name] for row in late) <= max(row[name] for row in early), name
    # What is kept on purpose, the load of each expert at each step, is 2000 times 2 layers of 4 numbers.
    grown = min(row["memory"] for row in late) - max(row["memory"] for row in early)
    assert grown < 30e6, f"{grown / 1e6:.0f} MB more"
