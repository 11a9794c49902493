"""Routing in the logs of Lightning's loggers: all of it in files, five numbers a stage elsewhere."""

from pathlib import Path

import pytest
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger

from routerzoo import LanguageModeling, RoutingMonitor, TextData
from routerzoo.__main__ import main
from routerzoo.errors import UserError
from routerzoo.metrics.over_layers import REDUCTIONS

CONFIGS = Path(__file__).parents[2] / "configs"


class Elsewhere(Logger):
    """Stands for any logger that sends what it is given to a server."""

    name, version = "elsewhere", 0

    def __init__(self):
        super().__init__()
        self.logged = {}

    def log_metrics(self, metrics, step=None):
        self.logged.update(metrics)

    def log_hyperparams(self, *args, **kwargs):
        pass


class Missing:
    def __bool__(self):
        return False

    def __str__(self):
        return "Requirement 'it' not met. HINT: Try running `pip install it`"


def fitted(monitor, logger):
    options = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(
        accelerator="cpu",
        max_steps=1,
        limit_val_batches=1,
        val_check_interval=1,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=logger,
        callbacks=[monitor],
        **options,
    )
    task = LanguageModeling(d_model=16, num_blocks=3, num_heads=2, num_experts=4, max_length=16)
    trainer.fit(task, TextData(sequence_length=16, batch_size=2))
    return {key for key in trainer.logged_metrics | trainer.callback_metrics if "/moe" in key}


def test_other_loggers_get_five_numbers_of_the_routing_a_stage():
    logger, monitor = Elsewhere(), RoutingMonitor(None)
    fitted(monitor, logger)
    routing = {key for key in logger.logged if "moe" in key}
    assert routing == {f"{stage}/moe/{name}" for stage in ("train", "val") for name in REDUCTIONS}
    layers = monitor.last_statistics
    assert len(layers) == 3
    for name, reduce in (("load_max", max), ("load_min", min), ("dead_experts", sum)):
        assert logger.logged[f"val/moe/{name}"] == pytest.approx(reduce(layer[name] for layer in layers))


@pytest.mark.full
def test_files_get_all_and_both_can_be_chosen(tmp_path):
    assert "val/moe2/load_cv" in fitted(RoutingMonitor(None), CSVLogger(tmp_path))
    assert "val/moe2/load_cv" in fitted(RoutingMonitor(None, detail="detailed"), Elsewhere())
    assert "val/moe2/load_cv" not in fitted(RoutingMonitor(None, detail="brief"), CSVLogger(tmp_path))
    with pytest.raises(ValueError, match="detail must be auto, brief or detailed, got 'all'"):
        RoutingMonitor(detail="all")


@pytest.mark.full
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_whose_package_is_missing_says_so(name, monkeypatch, tmp_path):
    monkeypatch.setattr(f"lightning.pytorch.loggers.{name}._{name.upper()}_AVAILABLE", Missing())
    configs = [part for c in ("tasks/language", f"trainer/{name}") for part in ("--config", str(CONFIGS / f"{c}.yaml"))]
    detailed = ["--trainer.callbacks+=RoutingMonitor", "--trainer.callbacks.detail", "detailed"]
    with pytest.raises(SystemExit, match="Requirement 'it' not met: run `pip install it`"):
        main(["fit", *configs, *detailed, "--run_dir", str(tmp_path / "run")])


def test_what_a_loggers_package_refuses_is_said():
    from routerzoo.cli.parser_errors import refused_class

    error = ValueError("expected an Iterable")
    error.__cause__ = ModuleNotFoundError("Requirement 'wandb>=0.12.10' not met. HINT: Try running `pip install wandb`")
    assert refused_class(error) == "Requirement 'wandb>=0.12.10' not met: run `pip install wandb`"
    elsewhere = type("MlflowException", (Exception,), {"__module__": "mlflow.exceptions"})
    error.__cause__ = elsewhere("The filesystem\ntracking backend is in maintenance mode")
    assert refused_class(error) == "mlflow: The filesystem tracking backend is in maintenance mode"
    assert refused_class(ValueError("other")) is None
    own = UserError("m.safetensors is damaged: copy or download it again")
    own.__cause__ = elsewhere("invalid header length")
    assert refused_class(own) is None  # its own sentence says more
