"""`RoutingMonitor`: what the routers do, in every log."""
# Shape suffixes: L layers, E experts, R records over training.

from __future__ import annotations

from pathlib import Path
from typing import Any, final

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from routerzoo.metrics import ExpertLoad, GateConfidence
from routerzoo.metrics.figures import load_over_training
from routerzoo.moe.layer import moe_layers, without_padding
from routerzoo.routing import Routing


@final
class RoutingMonitor(Callback):
    """Logs routing metrics of every MoE layer of any `LightningModule`.

    Each is named `<stage>/moe<layer>/<metric>`; see `routerzoo.metrics` for the metrics. In training they are those of
    the batches that Lightning logs, in validation and test those of the whole split. The progress bar shows the most
    and the least loaded expert of all layers, as `load_max` and `load_min`, relative to the mean load.

    It observes through forward hooks of the routers, and changes nothing.

    Args:
        picture: file, relative to the run's folder, for a picture of every expert's load over training; drawn at each
            validation and shown in TensorBoard too. None for no picture.
    """

    def __init__(self, picture: str | None = "routing.png") -> None:
        self.picture = picture
        self.folder: Path | None = None
        self.steps_R: list[int] = []
        self.loads_R: list[Tensor] = []
        self.last_statistics: list[dict[str, float]] = []
        self._handles: list[RemovableHandle] = []
        self._load: dict[int, ExpertLoad] = {}
        self._confidence: dict[int, GateConfidence] = {}
        self._recording = False
        self._top_ks: dict[int, int] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hook into the routers."""
        self._remove_hooks()
        for layer in moe_layers(pl_module):
            self._handles.append(layer.router.register_forward_hook(self._recorder(layer.spec.layer)))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the routers."""
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _recorder(self, layer: int) -> Any:
        def record(router: Any, arguments: tuple[Any, ...], routing: Routing) -> None:
            # Of several k of an evaluation, the first is recorded.
            if self._recording and self._top_ks.setdefault(layer, router.top_k) == router.top_k:
                used = without_padding(routing, arguments[1] if len(arguments) > 1 else None)
                self._load[layer].update(used)
                self._confidence[layer].update(used)

        return record

    def _start(self, pl_module: LightningModule) -> None:
        self._load = {
            layer.spec.layer: ExpertLoad(layer.spec.num_experts).to(pl_module.device) for layer in moe_layers(pl_module)
        }
        self._confidence = {
            layer.spec.layer: GateConfidence(layer.spec.num_experts).to(pl_module.device)
            for layer in moe_layers(pl_module)
        }
        self._top_ks = {}
        self._recording = bool(self._load)

    def _finish(self, pl_module: LightningModule, stage: str) -> None:
        """Log what was recorded."""
        if not self._recording:
            return
        self._recording = False
        self.last_statistics = []
        for layer, load in self._load.items():
            statistics = {**load.compute(), **self._confidence[layer].compute()}
            known = {name: value for name, value in statistics.items() if not value.isnan()}
            # Computed over all ranks already; Lightning wants to be told to average them, equal as they are.
            pl_module.log_dict({f"{stage}/moe{layer}/{n}": v for n, v in known.items()}, sync_dist=True)
            self.last_statistics.append({name: float(value) for name, value in known.items()})
        if stage == "train":
            extremes = {
                "load_max": max(layer["load_max"] for layer in self.last_statistics),
                "load_min": min(layer["load_min"] for layer in self.last_statistics),
            }
            pl_module.log_dict(extremes, prog_bar=True, logger=False)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record the batches that Lightning logs."""
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._start(pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Count no forward pass that activation checkpointing repeats."""
        if self._recording:
            self._finish(pl_module, "train")
            # As wide as the widest layer; a model of one's own may have layers of different size.
            width = max(load.num_experts for load in self._load.values())
            loads = [
                torch.nn.functional.pad(load.counts_E, (0, width - load.num_experts)) for load in self._load.values()
            ]
            self.steps_R.append(trainer.global_step + 1)
            self.loads_R.append(torch.stack(loads).float().cpu())

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the whole split."""
        self._start(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the validation split, and draw."""
        self._finish(pl_module, "val")
        trying = trainer.sanity_checking or trainer.fast_dev_run  # type: ignore[attr-defined]
        if trainer.is_global_zero and not trying and self.loads_R and self.picture is not None:
            self._draw(trainer)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the whole split."""
        self._start(pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the test split."""
        self._finish(pl_module, "test")

    def _draw(self, trainer: Trainer) -> None:
        figure = load_over_training(
            self.steps_R, torch.stack(self.loads_R).numpy(), "load of each expert over training"
        )
        path = self.picture_path(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("routing/load", figure, trainer.global_step)

    def picture_path(self, trainer: Trainer) -> Path:
        """Return where the picture lies."""
        return (self.folder or Path(trainer.default_root_dir)) / (self.picture or "")

    def state_dict(self) -> dict[str, Any]:
        """Keep the history, so that a resumed run's picture is whole."""
        return {"steps": self.steps_R, "loads": torch.stack(self.loads_R) if self.loads_R else torch.empty(0)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the history up."""
        self.steps_R = list(state_dict["steps"])
        self.loads_R = list(state_dict["loads"])
