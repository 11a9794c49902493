"""Whenever a run is killed, it goes on from a whole checkpoint to where it would have gone."""

import csv
import json
import os
import random
import signal

import pytest
import torch

from tests.faults.lives import start, wait_for

pytestmark = pytest.mark.full

LANGUAGE = """
model:
  class_path: LanguageModeling
  init_args: {d_model: 16, num_blocks: 2, num_heads: 2, num_experts: 4, dropout: 0.1, router: StableMoERouter}
data: {class_path: TextData, init_args: {sequence_length: 16, batch_size: 8}}
"""
VISION = """
model:
  class_path: ImageClassification
  init_args:
    router: HyperRouter
    num_experts: 4
    backbone_arguments: {patch_size: 14, embed_dim: 12, depth: 2, num_heads: 2}
data: {class_path: ImageData, init_args: {batch_size: 8, augment: true}}
"""
TRAINER = """
trainer:
  accelerator: cpu
  max_steps: 200
  limit_train_batches: 37
  enable_progress_bar: false
  limit_val_batches: 2
  num_sanity_val_steps: 0
  log_every_n_steps: 1
  val_check_interval: 10
  check_val_every_n_epoch: null
checkpoint_every: 3
"""


def rows(folder):
    """Return everything that was logged of each step, once."""
    found = {}
    with (folder / "logs" / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            step = found.setdefault(int(row["step"]), {})
            for name, value in row.items():
                if value and name != "step":
                    assert step.get(name, value) == value, f"step {row['step']} has two values of {name}"
                    step[name] = value
    return found


def checkpoint(folder, name="last"):
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def assert_same(one, other, where=""):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for place, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{where}[{place}]")
    else:
        assert one == other, where


def assert_same_run(folder, whole):
    assert rows(folder) == rows(whole)
    for name in ("last", "best"):
        mine, theirs = checkpoint(folder, name), checkpoint(whole, name)
        for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "random_state"):
            assert_same(mine[part], theirs[part], f"{name}.{part}")
    assert results(folder) == results(whole)


def results(folder):
    """Return the results of the training, without what depends on the machine's mood."""
    found = json.loads((folder / "results.json").read_text())["fit"]
    return {name: value for name, value in found.items() if not name.startswith(("seconds", "peak"))}


@pytest.fixture
def command(tmp_path, domain):
    (tmp_path / "config.yaml").write_text((LANGUAGE if domain == "language" else VISION) + TRAINER)

    def build(folder):
        arguments = ["fit", "--config", str(tmp_path / "config.yaml"), "--run_dir", str(folder)]
        started = (folder / "checkpoints" / "last.ckpt").exists()
        return [*arguments, *(["--ckpt_path", "last"] if started else ["--overwrite"])]

    return build


@pytest.mark.parametrize("domain", ["language", "vision"])
def test_a_run_that_is_killed_over_and_over(command, domain, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    uninterrupted = start(command(whole), tmp_path / "whole.log")
    last = folder / "checkpoints" / "last.ckpt"
    draw = random.Random(domain)
    kills, torn = 0, 0
    while True:
        before = last.stat().st_mtime_ns if last.exists() else 0
        # Every third death comes in the middle of writing a checkpoint.
        tears = kills % 3 == 2
        process = start(command(folder), tmp_path / "killed.log", torn=draw.randint(1, 4) if tears else None)
        # The others at a random moment after a first sign of life, if not before.
        if draw.random() < 0.8:
            wait_for(lambda before=before: last.exists() and last.stat().st_mtime_ns > before, process)
        if not tears:
            process.join(draw.uniform(0.0, 0.3))
        else:
            process.join(300)
        if process.exitcode == 0:
            break
        process.kill()
        process.join()
        if process.exitcode == 0:
            break  # it ended by itself in the meantime
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "killed.log").read_text()[-2000:]
        kills, torn = kills + 1, torn + tears
        if last.exists():
            checkpoint(folder)  # whole at any moment
    uninterrupted.join()
    assert uninterrupted.exitcode == 0, (tmp_path / "whole.log").read_text()[-2000:]
    assert kills >= 20, f"only {kills} kills: the run was too short"
    assert torn >= 5
    assert_same_run(folder, whole)
    assert not list(folder.rglob("*.part")), "litter"


@pytest.mark.parametrize("domain", ["language"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_saves_and_exits(command, domain, number, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    last = folder / "checkpoints" / "last.ckpt"
    for turn in range(3):
        before = last.stat().st_mtime_ns if last.exists() else 0
        log = tmp_path / f"{turn}.log"
        process = start(command(folder), log)
        wait_for(lambda before=before: last.exists() and last.stat().st_mtime_ns > before, process)
        os.kill(process.pid, number)
        process.join(300)
        assert process.exitcode == 128 + number, log.read_text()[-2000:]
        # What was logged is what is saved: no step was lost.
        step = checkpoint(folder)["global_step"]
        assert max(rows(folder)) + 1 == step
        assert (
            f"stopped by {number.name}; step {step} is saved. Resume with: "
            f"python -m routerzoo fit --run_dir {folder} --ckpt_path last"
        ) in log.read_text()
        assert "Traceback" not in log.read_text()
    for one in (folder, whole):
        process = start(command(one), tmp_path / "rest.log")
        process.join(300)
        assert process.exitcode == 0
    assert_same_run(folder, whole)


@pytest.mark.parametrize("domain", ["language"])
def test_sigterm_in_the_middle_of_a_validation_lets_it_end(command, domain, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    short = ["--trainer.max_steps", "30"]
    asked = ["--trainer.callbacks+=tests.distributed.killed.AskedToEndInValidation", "--trainer.callbacks.steps=20"]
    for one, options, code in ((whole, [], 0), (folder, asked, 143), (folder, [], 0)):
        process = start([*command(one), *short, *options], tmp_path / "log")
        process.join(300)
        assert process.exitcode == code, (tmp_path / "log").read_text()[-2000:]
        assert checkpoint(one)["global_step"] == (20 if code else 30)
    assert_same_run(folder, whole)


@pytest.mark.parametrize("domain", ["vision"])
def test_a_killed_accumulation_goes_on_at_a_whole_step(command, domain, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    # An epoch of 37 batches ends with a step of one; validation comes in the middle of others.
    options = ["--trainer.max_steps", "28", "--trainer.accumulate_grad_batches", "3", "--checkpoint_every", "1"]
    uninterrupted = start([*command(whole), *options], tmp_path / "whole.log")
    last = folder / "checkpoints" / "last.ckpt"
    draw = random.Random(0)
    for _ in range(5):
        before = last.stat().st_mtime_ns if last.exists() else 0
        process = start([*command(folder), *options], tmp_path / "killed.log")
        wait_for(lambda before=before: last.exists() and last.stat().st_mtime_ns > before, process)
        process.join(draw.uniform(0.0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "killed.log").read_text()[-2000:]
    rest = start([*command(folder), *options], tmp_path / "killed.log")
    for process in (rest, uninterrupted):
        process.join()
        assert process.exitcode == 0, (tmp_path / "killed.log").read_text()[-2000:]
    assert_same_run(folder, whole)


@pytest.mark.parametrize("domain", ["language"])
def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(command, domain, tmp_path):
    folder = tmp_path / "full"
    last = folder / "checkpoints" / "last.ckpt"
    process = start(command(folder), tmp_path / "fits.log")
    wait_for(last.exists, process)
    process.kill()
    process.join()
    before = last.read_bytes()
    log = tmp_path / "full.log"
    process = start(command(folder), log, limit_bytes=len(before) // 2)
    process.join(300)
    assert process.exitcode == 1
    (error,) = [line for line in log.read_text().splitlines() if line.startswith("error:")]
    assert "cannot write the checkpoint" in error
    assert "File too large" in error
    assert "is still the one before" in error
    assert "Traceback" not in log.read_text()
    assert last.read_bytes() == before
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("domain", ["language"])
def test_a_run_that_is_killed_before_its_first_checkpoint_leaves_nothing_in_the_next_ones_log(
    command, domain, tmp_path
):
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(command(folder), tmp_path / "killed.log", torn=1)  # in the middle of writing the first
    process.join(300)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "killed.log").read_text()[-2000:]
    assert not (folder / "checkpoints" / "last.ckpt").exists()
    refused = start(["fit", "--config", str(tmp_path / "config.yaml"), "--run_dir", str(folder)], tmp_path / "log")
    refused.join(300)
    assert "holds a run: replace it with --overwrite" in (tmp_path / "log").read_text()
    for one in (folder, whole):
        process = start([*command(one), "--trainer.max_steps", "30"], tmp_path / "log")
        process.join(300)
        assert process.exitcode == 0, (tmp_path / "log").read_text()[-2000:]
    assert_same_run(folder, whole)
    with (folder / "logs" / "metrics.csv").open(newline="") as file:
        steps = [row["step"] for row in csv.DictReader(file) if row["train/loss"]]
    assert len(steps) == len(set(steps)) == 30


@pytest.mark.parametrize("domain", ["language"])
def test_runs_that_start_in_one_second_have_folders_of_their_own(command, domain, tmp_path):
    arguments = ["fit", "--config", str(tmp_path / "config.yaml"), "--trainer.max_steps", "3"]
    started = [start(arguments, tmp_path / f"{seed}.log", folder=tmp_path) for seed in range(4)]
    for process in started:
        process.join(300)
        assert process.exitcode == 0
    folders = sorted((tmp_path / "runs" / "tiny-shakespeare-StableMoERouter").iterdir())
    assert [folder.name for folder in folders] == ["000", "001", "002", "003"]
    for folder in folders:
        assert_same_run(folder, folders[0])
        assert len(list((folder / "logs").glob("events.*"))) == 1
