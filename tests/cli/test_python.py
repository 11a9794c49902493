"""The command line from Python, and callbacks and trainers that Lightning allows."""

from pathlib import Path

import pytest
import torch
import yaml
from lightning import Trainer

from routerzoo import LanguageModeling, StabilityMonitor, TextData
from routerzoo.callbacks import ExpertSpecialization
from routerzoo.cli.main import RouterZooCLI, main
from routerzoo.runs.folder import CONFIG as CONFIG_FILE
from tests.cli.test_run_folders import CONFIG

FOREIGN = """
import torch
from lightning import LightningDataModule, LightningModule
from routerzoo import MoE

class Foreign(LightningModule):
    free_arguments = ("lr",)

    def __init__(self, width: int = 8, lr: float = 0.1):
        super().__init__()
        self.save_hyperparameters()
        self.layer = MoE(d_model=width, num_experts=4)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)

class Rows(LightningDataModule):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(8, 8), batch_size=4)
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    return str(tmp_path / "config.yaml")


def monitors(cli):
    return [callback for callback in cli.trainer.callbacks if isinstance(callback, StabilityMonitor)]


def test_without_a_run_there_are_trainer_model_and_data(config):
    cli = RouterZooCLI(["--config", config, "--trainer.max_steps", "2", "--run_dir", "here"], run=False)
    assert isinstance(cli.model, LanguageModeling)
    assert isinstance(cli.datamodule, TextData)
    assert isinstance(cli.trainer, Trainer)
    assert cli.trainer.global_step == 0
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert cli.trainer.global_step == 2
    assert torch.load("here/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("run", [True, False])
def test_options_may_be_a_dict(config, run):
    options = yaml.safe_load(CONFIG)
    options["trainer"]["max_steps"] = 1
    args = {"subcommand": "fit", "fit": options} if run else options
    assert RouterZooCLI(args, run=run).trainer.global_step == (1 if run else 0)


@pytest.mark.filterwarnings("ignore:.*self.log")
def test_barebones_runs(config):
    options = ["--trainer.barebones", "true", "--trainer.log_every_n_steps", "10", "--trainer.max_steps", "2"]
    cli = RouterZooCLI(["fit", "--config", config, "--run_dir", "bare", *options])
    assert cli.trainer.global_step == 2
    assert not cli.trainer.loggers
    assert not Path("bare", "checkpoints").exists()
    with pytest.raises(SystemExit, match=r"barebones=True, log_every_n_steps=1\)` was passed. Logging can impact raw"):
        main(["fit", "--config", config, "--trainer.barebones", "true"])


@pytest.mark.full
def test_a_callback_that_is_named_again_is_there_once(config, capsys):
    more = ["--trainer.callbacks+", "StabilityMonitor", "--trainer.callbacks.every_n_steps", "2"]
    main(["fit", "--config", config, "--run_dir", "run", *more])
    assert "twice" not in capsys.readouterr().out
    resumed = ["fit", "--run_dir", "run", "--ckpt_path", "last", "--trainer.max_steps", "8", *more]
    main(resumed)
    assert "StabilityMonitor is named twice: the last one counts" in capsys.readouterr().out
    saved = torch.load("run/checkpoints/last.ckpt", weights_only=True)["callbacks"]
    (state,) = [value for key, value in saved.items() if key.startswith("StabilityMonitor")]
    assert state["steps"] == [0, 2, 4, 6, 8]
    assert yaml.safe_load(Path("run", CONFIG_FILE).read_text())["trainer"]["max_steps"] == 8


def test_callbacks_that_differ_stay(config):
    two = ["--trainer.callbacks+", "StabilityMonitor", "--trainer.callbacks.top_k", "1"]
    two += ["--trainer.callbacks+", "StabilityMonitor", "--trainer.callbacks.top_k", "2"]
    two += ["--trainer.callbacks+", "ExpertSpecialization", "--trainer.callbacks.min_count", "1"]
    two += ["--trainer.callbacks+", "ExpertSpecialization", "--trainer.callbacks.min_count", "2"]
    cli = RouterZooCLI(["--config", config, *two], run=False)
    assert [monitor.top_k for monitor in monitors(cli)] == [1, 2]
    described = [c.min_count for c in cli.trainer.callbacks if isinstance(c, ExpertSpecialization)]
    assert described == [1, 2]


def test_a_single_callback_needs_no_list(config):
    cli = RouterZooCLI(["--config", config, "--trainer.callbacks", "StabilityMonitor"], run=False)
    assert len(monitors(cli)) == 1


@pytest.mark.full
def test_a_foreign_model_says_what_may_differ(tmp_path, monkeypatch):
    (tmp_path / "foreign_to_us.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(tmp_path)
    names = ["--model", "foreign_to_us.Foreign", "--data", "foreign_to_us.Rows", "--run_dir", "run", "--trust"]
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    main(["fit", *names, *quiet, "--trainer.max_steps", "2"])
    resumed = ["fit", *names, *quiet, "--ckpt_path", "last", "--trainer.max_steps", "4"]
    main([*resumed, "--model.lr", "0.5"])
    with pytest.raises(SystemExit, match=r"it has width 8, .* 4.*may differ is listed in Foreign.free_arguments"):
        main([*resumed, "--model.width", "4"])
