"""`RunReport`: what a run is, and what came of it, on the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import nn

from routerzoo.callbacks.routing_monitor import RoutingMonitor
from routerzoo.moe import moe_layers
from routerzoo.tasks.base import MoETask

LOWER_IS_BETTER = frozenset({"loss", "bpb", "bpc", "ppl"})


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Count a model's numbers.

    Returns:
        `trainable` parameters; `frozen` parameters and floating-point buffers; `total`, their sum; `active`, the total
        less what the experts that a token does not choose hold.
    """
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    frozen += sum(b.numel() for b in model.buffers() if b.is_floating_point())
    idle = 0
    for layer in moe_layers(model):
        size = sum(p.numel() for p in layer.experts.parameters())
        chosen = min(layer.router.top_k, layer.spec.num_experts)
        idle += size * (layer.spec.num_experts - chosen) // layer.spec.num_experts
    total = trainable + frozen
    return {"trainable": trainable, "frozen": frozen, "total": total, "active": total - idle}


@final
class RunReport(Callback):
    """Says before training what is trained, and after it what came of it.

    Afterwards it shows the headline metric of the validation split at step 0, now and at its best beside a baseline
    (for text, predicting each token by its frequency), the routing of every MoE layer, and where everything lies. The
    value at step 0 comes from Lightning's check before training, where that is over the whole split
    (`trainer.num_sanity_val_steps: -1`).

    Args:
        folder: of the run.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = Path(folder) if folder is not None else None
        self.metric_at_start: float | None = None
        self.best: float | None = None
        self._last: float | None = None
        self._last_step = 0
        self._started = 0.0
        self._console = Console(soft_wrap=True, highlight=False)

    def _headline(self, pl_module: LightningModule) -> str | None:
        return pl_module.headline_metric if isinstance(pl_module, MoETask) else None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what is trained."""
        self._started = time.monotonic()
        if not trainer.is_global_zero:
            return
        layers = list(moe_layers(pl_module))
        counts = parameter_counts(pl_module)
        what = "dense: no MoE layer"
        if layers:
            first = layers[0]
            what = (
                f"{type(first.router).__name__} · {len(layers)} MoE layers of {first.spec.num_experts} "
                f"{type(first.experts).__name__}, top {first.router.top_k}"
            )
        sizes = f"{_short(counts['total'])} parameters, {_short(counts['active'])} active per token"
        self._console.print(f"[bold]{what}[/bold]; {sizes}")
        if self.folder is not None:
            self._console.print(f"run folder: {self.folder}")

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the value at step 0."""
        whole = trainer.num_sanity_val_steps == float("inf")
        value = trainer.callback_metrics.get(f"val/{self._headline(pl_module)}")
        if whole and value is not None and trainer.global_step == 0:
            self.metric_at_start = float(value)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the latest and the best value."""
        name = self._headline(pl_module)
        value = trainer.callback_metrics.get(f"val/{name}")
        if trainer.sanity_checking or value is None or name is None:
            return
        self._last, self._last_step = float(value), trainer.global_step
        better = min if name in LOWER_IS_BETTER else max
        self.best = self._last if self.best is None else better(self.best, self._last)

    def _print_training(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name = self._headline(pl_module)
        if not trainer.is_global_zero or not isinstance(pl_module, MoETask) or name is None:
            return
        seconds = time.monotonic() - self._started
        print_ = self._console.print
        print_(f"\n[bold]Trained to step {trainer.global_step} in {seconds:.0f} s.[/bold]")
        rows: list[tuple[str, float | None]] = [("step 0", self.metric_at_start)]
        baseline = pl_module.baseline(getattr(trainer, "datamodule", None))
        if baseline is not None:
            rows.append(baseline)
        rows += [("best", self.best), (f"step {self._last_step}", self._last)]
        table = Table(title=f"validation {name}", title_justify="left", title_style="bold")
        for label, _ in rows:
            table.add_column(label, justify="right")
        table.add_row(*("-" if value is None else f"{value:.4f}" for _, value in rows))
        print_(table)
        self._print_routing(trainer)
        for label, path in self._files(trainer).items():
            print_(f"{label}: {path}")

    def _print_routing(self, trainer: Trainer) -> None:
        monitor = _monitor(trainer)
        if monitor is None or not monitor.last_statistics:
            return
        table = Table(
            title="routing by MoE layer (load relative to the mean expert's)", title_justify="left", title_style="bold"
        )
        columns: dict[str, Callable[[dict[str, Any]], str]] = {
            "layer": lambda row: str(row["layer"]),
            "most loaded": lambda row: f"{row['load_max']:.2f}x",
            "least loaded": lambda row: f"{row['load_min']:.2f}x",
            "dead": lambda row: f"{row['dead_experts']:.0f}",
            "load entropy": lambda row: f"{row['load_entropy']:.3f}",
            "gate entropy": lambda row: f"{row['gate_entropy']:.3f}" if "gate_entropy" in row else "-",
        }
        for column in columns:
            table.add_column(column, justify="right")
        for layer, statistics in enumerate(monitor.last_statistics):
            row: dict[str, Any] = {**statistics, "layer": str(layer)}
            table.add_row(*(show(row) for show in columns.values()))
        self._console.print(table)

    def _files(self, trainer: Trainer) -> dict[str, Any]:
        files: dict[str, Any] = {}
        if self.folder is not None:
            for label, name in (("checkpoints", "checkpoints"), ("logs", "logs"), ("config", "config.yaml")):
                if (self.folder / name).exists():
                    files[label] = self.folder / name
        monitor = _monitor(trainer)
        if monitor is not None and monitor.picture is not None and monitor.picture_path(trainer).exists():
            files["picture of the routing"] = monitor.picture_path(trainer)
        return files

    def _print_results(self, trainer: Trainer, split: str) -> None:
        if not trainer.is_global_zero:
            return
        table = Table(title=f"{split} split", title_justify="left", title_style="bold")
        shown = {
            name.partition("/")[2]: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(f"{split}/") and name.count("/") == 1
        }
        for name in shown:
            table.add_column(name, justify="right")
        table.add_row(*(f"{value:.4f}" for value in shown.values()))
        self._console.print(table)
        self._print_routing(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say what came of it, when the progress bar has gone."""
        if trainer.interrupted:
            return
        if stage == "fit":
            self._print_training(trainer, pl_module)
        elif stage in ("validate", "test"):
            self._print_results(trainer, "val" if stage == "validate" else "test")

    def state_dict(self) -> dict[str, Any]:
        """Keep what a resumed run cannot measure again."""
        return {"metric_at_start": self.metric_at_start, "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up."""
        self.metric_at_start, self.best = state_dict["metric_at_start"], state_dict["best"]


def _monitor(trainer: Trainer) -> RoutingMonitor | None:
    found = (callback for callback in trainer.callbacks if isinstance(callback, RoutingMonitor))  # type: ignore[attr-defined]
    return next(found, None)


def _short(count: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)
