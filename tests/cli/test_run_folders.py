"""A run as the command line leaves it: never overwritten, stopped with a checkpoint, and ended with results."""

import csv
import json
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch
from lightning import Callback

from routerzoo.checkpoints.single import WholeCheckpoints
from routerzoo.cli import main as cli
from routerzoo.runs import checkpoint, folder

CONFIG = """
model:
  class_path: LanguageModeling
  init_args:
   {d_model: 16, num_blocks: 1, num_heads: 2, num_experts: 4, router: {class_path: LinearRouter, init_args: {top_k: 1}}}
data: {class_path: TextData, init_args: {sequence_length: 16, batch_size: 8}}
trainer:
  {accelerator: cpu, max_steps: 6, log_every_n_steps: 1, val_check_interval: 100, check_val_every_n_epoch: null,
   limit_val_batches: 2, limit_test_batches: 2, enable_progress_bar: false}
"""
RUN = Path("runs/tiny-shakespeare-LinearRouter/000")


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    return "config.yaml"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One trained run, to be copied."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "config.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cli.main(["fit", "--config", "config.yaml"])
    return folder


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return RUN


def fails(*args, code=None):
    """Run a command that must fail, and return what it says."""
    with pytest.raises(SystemExit) as ended:
        cli.main(args)
    assert ended.value.code not in (0, None)
    assert code is None or ended.value.code == code
    return str(ended.value.code)


def losses(folder):
    with (folder / "logs" / "metrics.csv").open() as file:
        rows = [(int(row["step"]), row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(dict(rows)) == len(rows), "a step is logged twice"
    return dict(rows)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_never_overwritten_unless_asked(run, config):
    before = contents(run)
    told = fails("fit", "--config", config, "--run_dir", str(run), "--model.router", "HashRouter")
    assert told.startswith(
        f"error: {run} holds a run: resume it with --run_dir {run} --ckpt_path last, replace it with "
    )
    # Nor does an evaluation without a checkpoint, or of another run's, write into it.
    told = fails("test", "--config", config, "--run_dir", str(run))
    assert "holds a run, which the command does not evaluate: evaluate it with --ckpt_path best, or" in told
    (elsewhere := Path("elsewhere/checkpoints")).mkdir(parents=True)
    shutil.copy(run / "checkpoints" / "best.ckpt", elsewhere / "best.ckpt")
    other = ["--config", config, "--ckpt_path", str(elsewhere / "best.ckpt")]
    assert "does not evaluate: evaluate it with" in fails("test", *other, "--run_dir", str(run))
    assert contents(run) == before
    for _ in range(2):  # evaluations may share a folder
        cli.main(["test", *other, "--run_dir", "results"])
    assert Path("results/results.json").is_file()
    replaced = ["--run_dir", str(run), "--overwrite", "--model.router", "HashRouter", "--trainer.max_steps", "2"]
    cli.main(["fit", "--config", config, *replaced])
    assert list(losses(run)) == [0, 1]
    assert "HashRouter" in (run / "config.yaml").read_text()
    assert "overwrite: true" not in (run / "config.yaml").read_text()
    assert list(json.loads((run / "results.json").read_text())) == ["fit"]
    assert len(list((run / "logs").glob("events.*"))) == 1
    for name in ("last", "best"):
        assert torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["global_step"] == 2


def test_a_run_that_fails_before_its_first_step_leaves_no_folder(config, tmp_path, capsys):
    lost = ["--config", config, "--model.loss_weights", "{balnce: 1.0}"]
    assert "has no loss 'balnce'" in fails("fit", *lost)
    assert f"removed {RUN}, where nothing was trained" in capsys.readouterr().err
    assert not Path("runs").exists()
    (mine := tmp_path / "mine").mkdir()
    (mine / "notes.md").touch()
    fails("fit", *lost, "--run_dir", str(mine))
    assert [path.name for path in mine.iterdir()] == ["notes.md"]


def test_a_failed_resume_leaves_the_run(run, config):
    before = contents(run)
    fails("fit", "--ckpt_path", "last", "--trainer.max_steps", "9", "--model.loss_weights", "{balnce: 1.0}")
    assert {path: before[path] for path in before if path.suffix == ".ckpt"}.items() <= contents(run).items()


def test_a_run_is_trained_by_one_process(run, config):
    held = folder.lock(run)
    for command in (["--ckpt_path", "last"], ["--config", config, "--run_dir", str(run), "--overwrite"]):
        told = fails("fit", *command, "--trainer.max_steps", "7")
        assert told == f"error: another process trains the run in {run}: wait until it ends, or stop it"
    held.release()
    cli.main(["fit", "--ckpt_path", "last", "--trainer.max_steps", "7"])
    assert list(losses(run)) == list(range(7))


def test_a_checkpoint_that_lies_elsewhere_starts_a_run_of_its_own(run, config, tmp_path):
    before = contents(run)
    shutil.copy(run / "checkpoints" / "last.ckpt", tmp_path / "shared.ckpt")
    cli.main(["fit", "--config", config, "--ckpt_path", "shared.ckpt", "--trainer.max_steps", "8"])
    assert contents(run) == before
    assert list(losses(run.with_name("001"))) == [6, 7]
    assert not (tmp_path / "checkpoints").exists()


class Interrupt(Callback):
    """Sends a signal in the training step after so many, or in the sanity check; perhaps twice."""

    def __init__(self, steps: int, times: int = 1, number: int = signal.SIGINT):
        self.steps, self.times, self.number = steps, times, number

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.steps + 1:
            self.press()

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if self.steps < 0:
            self.press()

    def press(self):
        for _ in range(self.times):
            signal.raise_signal(self.number)  # in this thread, at once
            sum(range(1000))  # handlers run between instructions


@pytest.fixture
def interrupted(config, monkeypatch):
    """Train, with a signal at a step."""

    def fit(steps, times=1, *options, number=signal.SIGINT):
        build = cli.RouterZooCLI.instantiate_trainer

        def with_interrupt(self, **kwargs):
            trainer = build(self, **kwargs)
            trainer.callbacks.insert(0, Interrupt(steps, times, number))
            return trainer

        handler = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        with monkeypatch.context() as patch:
            patch.setattr(cli.RouterZooCLI, "instantiate_trainer", with_interrupt)
            fails("fit", "--config", config, *options, code=128 + number)
        signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored

    return fit


def test_ctrl_c_saves_the_step_and_says_how_to_resume(interrupted, trained, capsys):
    handler = signal.getsignal(signal.SIGINT)
    interrupted(2)
    assert signal.getsignal(signal.SIGINT) is handler
    told = capsys.readouterr().err
    command = f"python -m routerzoo fit --run_dir {RUN} --ckpt_path last"
    assert f"stopped by SIGINT; step 3 is saved. Resume with: {command}\n" in told
    cli.main(shlex.split(command)[3:])
    assert f"resuming {RUN}/checkpoints/last.ckpt at step 3, epoch 0: LinearRouter." in capsys.readouterr().out
    assert losses(RUN) == losses(trained / RUN)
    assert not RUN.with_name("001").exists()


def test_a_second_ctrl_c_ends_at_once(interrupted, capsys):
    interrupted(2, 2)
    assert "stopped by SIGINT; step 1 is saved. Resume with: " in capsys.readouterr().err  # the first step always is


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_leaves_nothing(interrupted, number, capsys):
    interrupted(-1, number=number)
    assert f"stopped by {number.name}; removed {RUN}, where nothing was trained" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.full
def test_last_is_never_another_run(run, config, interrupted):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WholeCheckpoints, "save_checkpoint", lambda *_, **__: None)  # it is killed before it saves
        cli.main(["fit", "--config", config, "--trainer.max_steps", "1"])
    for command in (["fit", "--config", config], ["fit"]):
        told = fails(*command, "--ckpt_path", "last")
        assert told == (
            "error: no checkpoint to continue from: runs/tiny-shakespeare-LinearRouter/001, the run that was started "
            f"last, has no last.ckpt; choose one that has: --run_dir {run}"
        )


def saved_steps(monkeypatch, *options):
    """Return the steps at which `last` is written."""
    steps, save = [], WholeCheckpoints.save_checkpoint

    def record(self, content, path, storage_options=None):
        if Path(path).name == "last.ckpt":
            steps.append(content["global_step"])
        save(self, content, path, storage_options)

    with monkeypatch.context() as patch:
        patch.setattr(WholeCheckpoints, "save_checkpoint", record)
        cli.main(["fit", *options])
    return steps


@pytest.mark.full
def test_the_latest_is_saved_at_the_first_step_validations_intervals_and_the_end(config, monkeypatch):
    options = ["--config", config, "--trainer.max_steps", "12", "--trainer.val_check_interval", "5"]
    assert saved_steps(monkeypatch, *options) == [1, 5, 10, 12]
    assert saved_steps(monkeypatch, *options, "--checkpoint_every", "4") == [1, 4, 5, 8, 10, 12]


def test_the_latest_is_saved_by_time(config, monkeypatch):
    monkeypatch.setattr(checkpoint, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "SAVE_SHARE", 0)
    assert saved_steps(monkeypatch, "--config", config) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("options", "validated"),
    [
        ([], [6]),  # an interval of 100
        pytest.param(["--trainer.val_check_interval", "3"], [3, 6], marks=pytest.mark.full),  # once at the end
        pytest.param(["--trainer.val_check_interval", "4"], [4, 6], marks=pytest.mark.full),
        pytest.param(
            ["--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "8"],
            [4, 6],
            marks=pytest.mark.full,
        ),
        (
            [
                *("--trainer.max_steps=-1", "--trainer.max_epochs=3", "--trainer.limit_train_batches=2"),
                *("--trainer.val_check_interval=1.0", "--trainer.check_val_every_n_epoch=2"),
            ],
            [4, 6],
        ),
    ],
)
def test_a_fit_ends_with_a_validation(config, options, validated):
    cli.main(["fit", "--config", config, *options])
    with (RUN / "logs" / "metrics.csv").open() as file:
        steps = [int(row["step"]) + 1 for row in csv.DictReader(file) if row["val/bpb"]]
    assert steps == validated


def test_a_short_run_has_results_and_names_its_files(run, trained, capsys, config):
    cli.main(["fit", "--config", config, "--trainer.max_steps", "3"])
    shown = capsys.readouterr().out
    for column in ("step 0", "unigram", "best", "last (step 3)"):
        assert column in shown
    made = run.with_name("001")
    written = {path for path in made.iterdir() if path.name != folder.LOCK}
    assert {"routing.png", "results.json", "config.yaml", "checkpoints", "logs"} == {path.name for path in written}
    assert {line.rpartition(": ")[2] for line in shown.splitlines() if f": {made}/" in line} == set(map(str, written))
    assert (made / "checkpoints" / "best.ckpt").is_file()


def test_a_run_without_validation_says_so(config, capsys):
    cli.main(["fit", "--config", config, "--trainer.limit_val_batches", "0", "--trainer.max_steps", "2"])
    assert "Nothing was validated (trainer.limit_val_batches is 0): there is no best" in capsys.readouterr().out


def test_a_run_without_a_picture_of_its_routing_says_so(config, capsys):
    cli.main(["fit", "--config", config, "--trainer.log_every_n_steps", "0", "--trainer.max_steps", "1"])
    shown = capsys.readouterr().out
    assert "No step's routing was recorded (trainer.log_every_n_steps is 0): there is no picture" in shown


def test_results_at_several_k_say_which_and_outlive_a_later_test(run, capsys):
    command = ["test", "--ckpt_path", "best"]
    cli.main([*command, "--model.eval_top_k", "[2,1,4]", "--trainer.callbacks+", "ExpertSpecialization"])
    shown = capsys.readouterr().out
    assert f"test of {run}/checkpoints/best.ckpt at step 6, epoch 0: LinearRouter." in shown
    assert "test split at k = 2, the first of eval_top_k" in shown
    assert "relative FLOPs" in " ".join(shown.split())
    for name in ("results.json", "test_by_k.png", "test_specialization.png"):
        assert (run / name).is_file()
        assert f": {run / name}\n" in shown
    several = json.loads((run / "results.json").read_text())["test"]
    assert several["checkpoint"] == "best.ckpt"
    assert [row["k"] for row in several["by k"]] == [2, 1, 4]
    cli.main(command)
    cli.main(command)  # finds what it found, and repeats nothing
    results = json.loads((run / "results.json").read_text())
    assert results["test"]["k"] == 1
    assert results["earlier"] == [{"stage": "test", **several}]


def test_costs_do_not_depend_on_an_interruption(config, interrupted):
    grown = ["--trainer.callbacks+", "KSchedule", "--trainer.callbacks.start", "1", "--trainer.callbacks.end", "4"]
    cli.main(["fit", "--config", config, *grown, "--run_dir", "whole"])
    interrupted(4, 1, *grown, "--run_dir", "stopped")
    cli.main(["fit", "--run_dir", "stopped", "--ckpt_path", "last"])
    whole, stopped = (json.loads(Path(run, "results.json").read_text())["fit"] for run in ("whole", "stopped"))
    # k at the last of 6 steps is 1 + 3 * 5 / 6 = 3.5, rounded to 4: all of the experts are active.
    assert whole["active parameters"] == whole["total parameters"]
    assert whole["k"] == 4
    for results in (whole, stopped):
        del results["seconds"], results["peak memory, bytes"]
    assert whole == stopped


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (
            ["BatchSizeFinder"],
            "BatchSizeFinder trains with another batch size than the run's config says: leave it out",
        ),
        (["LearningRateFinder"], "LearningRateFinder finds no learning rate here, which is the optimizer's"),
    ],
)
def test_tuners_are_refused(config, callback, message):
    assert message in fails("fit", "--config", config, "--trainer.callbacks+", *callback)
    assert not Path("runs").exists()


@pytest.mark.full
def test_k_grows_to_the_end_where_accumulation_changes(config):
    options = [
        *("--trainer.max_steps=-1", "--trainer.max_epochs=4", "--trainer.limit_train_batches=8"),
        *("--trainer.check_val_every_n_epoch=1", "--trainer.val_check_interval=1.0"),
        *("--trainer.callbacks+=KSchedule", "--trainer.callbacks.start=1", "--trainer.callbacks.end=4"),
        *("--trainer.callbacks+=GradientAccumulationScheduler", "--trainer.callbacks.scheduling={0: 1, 1: 4}"),
    ]
    cli.main(["fit", "--config", config, *options])
    with (RUN / "logs" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/top_k"]]
    by_step = {int(row["step"]): float(row["train/top_k"]) for row in rows}
    # 8 + 3 * 2 = 14 steps, and k is 1 + 3 t / 14: 1.64 at 3, 2.5 (rounded to 2) at 7, 3.57 at 12.
    assert list(by_step.values()) == [1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4]


def test_a_checkpoint_resumes_with_the_same_global_batch_alone(run):
    resumed = ["fit", "--ckpt_path", "last", "--trainer.max_steps", "8"]
    told = fails(*resumed, "--data.batch_size", "4")
    assert "trained with batches of 8 samples over all processes, and data.batch_size times the processes is 4" in told
    told = fails(*resumed, "--trainer.accumulate_grad_batches", "2")
    assert "trained with trainer.accumulate_grad_batches 1, and it is 2 now" in told
    cli.main(resumed)
    assert list(losses(run)) == list(range(8))
