"""`RoutingMonitor`: load and confidence of every MoE layer, in every log."""
# Shape suffixes: L layers, E experts, R records over training.

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn

from routerzoo.callbacks.steps import completes_step, planned_steps, steps_taken
from routerzoo.metrics import ExpertLoad, GateConfidence
from routerzoo.metrics.figures import load_over_training
from routerzoo.metrics.over_layers import over_layers
from routerzoo.moe.layer import MoE, RoutingHookHandle, inner_router, moe_layers
from routerzoo.routing import LayerRouting, RoutingContext


class _LayerMetrics(NamedTuple):
    load: ExpertLoad
    confidence: GateConfidence


@final
class RoutingMonitor(Callback):
    """Logs routing metrics of every MoE layer of any `LightningModule`.

    Metrics of the i-th MoE layer of the module are named `<stage>/moe<i>/<metric>`; see `routerzoo.metrics`. In
    training they are those of the steps that Lightning logs (`log_every_n_steps`), or of the last step of a run that
    is shorter, over all batches of a step; in
    validation and test those of the whole split. Every call of a layer counts, padding does not. The progress bar shows
    the load of the most and of the least loaded expert of all layers, relative to the mean load, as `load_max` and
    `load_min`. Training is unaffected.

    A model of many layers has hundreds of these. Where a logger sends them elsewhere (Weights & Biases, MLflow), there
    are five of all layers instead, `<stage>/moe/<metric>`; see `routerzoo.metrics.over_layers`.

    Args:
        picture: file, relative to the run's folder, for a picture of every expert's load over training; drawn at each
            validation and shown in TensorBoard too. None for no picture.
        detail: `detailed` for the metrics of every layer, `brief` for five of all layers; `auto` is brief where a
            logger is neither TensorBoard's nor one of CSV files.
    """

    def __init__(
        self, picture: str | None = "routing.png", detail: Literal["auto", "brief", "detailed"] = "auto"
    ) -> None:
        if detail not in ("auto", "brief", "detailed"):
            raise ValueError(f"detail must be auto, brief or detailed, got {detail!r}")
        self.picture, self.detail = picture, detail
        self.folder: Path | None = None
        self.steps_R: list[int] = []
        self.loads_R: list[Tensor] = []
        self.last_statistics: list[dict[str, float]] = []
        self._layers: list[MoE] = []
        self._handles: list[RoutingHookHandle] = []
        self._stage: Any = None
        # By layer, while recording.
        self._metrics: dict[nn.Module, _LayerMetrics] = {}
        self._top_ks: dict[nn.Module, int] = {}
        self._end: int | None = None

    @property
    def state_key(self) -> str:
        """Name of the state in checkpoints."""
        return self._generate_state_key(picture=self.picture)

    def _observe(self, trainer: Trainer, layers: list[MoE]) -> None:
        # The hooks stay between records: a compiled model is compiled again when they change.
        if layers != self._layers:
            self._stop()
            self._layers = layers
            record = functools.partial(self._record, trainer)
            self._handles = [layer.register_routing_hook(record) for layer in layers]

    def _stop(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._layers, self._metrics = [], {}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hooks: no teardown follows."""
        self._stop()

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.barebones:  # nothing may be logged
            return
        layers, device = list(moe_layers(pl_module)), pl_module.device
        self._observe(trainer, layers)
        self._stage = trainer.state.stage
        self._metrics = {
            layer: _LayerMetrics(ExpertLoad(layer.num_experts).to(device), GateConfidence(layer.num_experts).to(device))
            for layer in layers
        }
        self._top_ks = {}

    def _record(self, trainer: Trainer, published: LayerRouting, context: RoutingContext) -> None:
        metrics = self._metrics.get(published.layer)
        # Other callbacks may run the model in a stage of their own.
        if metrics is None or trainer.state.stage is not self._stage:
            return
        top_k = inner_router(published.layer).top_k  # type: ignore[arg-type]
        # Of several k of an evaluation, the first is recorded.
        if self._top_ks.setdefault(published.layer, top_k) == top_k:
            metrics.load.update(published.routing)
            metrics.confidence.update(published.routing)

    def _is_brief(self, trainer: Trainer) -> bool:
        local = all(isinstance(logger, (CSVLogger, TensorBoardLogger)) for logger in trainer.loggers)
        return self.detail == "brief" or (self.detail == "auto" and not local)

    def _finish(self, pl_module: LightningModule, stage: str) -> None:
        """Log what was recorded."""
        self.last_statistics = []
        for index, metrics in enumerate(self._metrics.values()):
            statistics = {**metrics.load.compute(), **metrics.confidence.compute()}
            known = {name: value for name, value in statistics.items() if not value.isnan()}
            # Reduced over all ranks already; Lightning warns unless it averages the equal values too.
            if not self._is_brief(pl_module.trainer):
                pl_module.log_dict({f"{stage}/moe{index}/{n}": v for n, v in known.items()}, sync_dist=True)
            self.last_statistics.append({name: float(value) for name, value in known.items()})
        if self._is_brief(pl_module.trainer):
            brief = over_layers(self.last_statistics)
            pl_module.log_dict({f"{stage}/moe/{name}": value for name, value in brief.items()}, sync_dist=True)
        self._metrics = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the history of an earlier run."""
        if trainer.global_step == 0:
            self.steps_R, self.loads_R = [], []
        self._end = planned_steps(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start to record a step that Lightning logs, or continue with its next batch."""
        every, step = trainer.log_every_n_steps, steps_taken(trainer) + 1  # type: ignore[attr-defined]
        only = step == self._end and not self.steps_R  # a run that ends before
        if not self._metrics and every > 0 and (step % every == 0 or only):
            self._start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log a step that is complete."""
        if not self._metrics or not completes_step(trainer):
            return
        if pl_module.automatic_optimization and not outputs:  # training_step skipped the batch
            self._metrics = {}
            return
        counts = [metrics.load.counts_E for metrics in self._metrics.values()]
        self._finish(pl_module, "train")
        extremes = {
            "load_max": max(layer["load_max"] for layer in self.last_statistics),
            "load_min": min(layer["load_min"] for layer in self.last_statistics),
        }
        pl_module.log_dict(extremes, prog_bar=True, logger=False)
        width = max(len(counts_E) for counts_E in counts)  # layers may differ in size
        loads = [F.pad(counts_E, (0, width - len(counts_E))) for counts_E in counts]
        self.steps_R.append(steps_taken(trainer) + 1)
        self.loads_R.append(torch.stack(loads).float().cpu())

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the whole split."""
        self._start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the validation split, and draw."""
        self._finish(pl_module, "val")
        trial = trainer.sanity_checking or trainer.fast_dev_run  # type: ignore[attr-defined]
        if trainer.is_global_zero and not trial and self.loads_R and self.picture is not None:
            self._draw(trainer)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the whole split."""
        self._start(trainer, pl_module)

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
        """Return the path of the picture."""
        return (self.folder or Path(trainer.default_root_dir)) / (self.picture or "")

    def state_dict(self) -> dict[str, Any]:
        """Return the history, so that a resumed run's picture shows all of it."""
        return {"steps": list(self.steps_R), "loads": torch.stack(self.loads_R) if self.loads_R else torch.empty(0)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history."""
        self.steps_R, self.loads_R = list(state_dict["steps"]), list(state_dict["loads"])
