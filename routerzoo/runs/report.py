"""`RunReport`: a run's model and results, on the terminal and in `results.json`."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.table import Table

from routerzoo.callbacks.routing_monitor import RoutingMonitor
from routerzoo.costs import Costs, short
from routerzoo.metrics.figures import quality_by_cost
from routerzoo.moe.layer import inner_router, moe_layers
from routerzoo.router import Router
from routerzoo.runs.atomic import atomic_write
from routerzoo.runs.folder import CHECKPOINTS, CONFIG, LOGS, RESULTS
from routerzoo.tasks.base import MoETask

LABELS = {CHECKPOINTS: "checkpoints", LOGS: "logs", CONFIG: "config", RESULTS: "results"}
EARLIER = "earlier"
"""Name in `results.json` of the results that later ones have replaced."""


@final
class RunReport(Callback):
    """Prints the model before training, and the results after each stage.

    After training these are the headline metric of the validation split at step 0, at its best and at the end, beside a
    baseline (for text, predicting each token by its frequency); the costs of the trained model; and the routing of
    every MoE layer. The value at step 0 comes from Lightning's sanity check, where that covers the whole split
    (`trainer.num_sanity_val_steps: -1`).

    After an evaluation at several k (`eval_top_k`) it prints and draws quality against cost. `results.json` in the
    run's folder has the same numbers by stage, with the name of the headline metric and whether higher is better: a
    module's `headline_metric` and `headline_higher_is_better`. Results of a stage that later ones replace are kept
    under `earlier`. Each stage ends with the files that it has written.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = Path(folder) if folder is not None else None
        self._costs: list[Costs] = []
        self._files_before: dict[Path, int] = {}
        self._clear()

    def _clear(self) -> None:
        self.metric_at_start: float | None = None
        self.best: float | None = None
        self._last: float | None = None
        self._last_step = 0
        self._started: float | None = None
        self._seconds_before = 0.0
        self._trained = False

    @property
    def _console(self) -> Console:  # not an attribute: a console cannot be copied
        return Console(soft_wrap=True, highlight=False)

    @property
    def _seconds(self) -> float:
        """Seconds of training, those before a resume included."""
        return self._seconds_before + (0.0 if self._started is None else time.monotonic() - self._started)

    def _headline(self, pl_module: LightningModule) -> str | None:
        name: str | None = getattr(pl_module, "headline_metric", None)
        return name

    def _count(self, pl_module: LightningModule) -> None:
        places = range(len(pl_module.eval_top_ks)) if isinstance(pl_module, MoETask) else ()
        self._costs = [pl_module.costs(place) for place in places]  # type: ignore[operator]

    def _sizes(self, pl_module: LightningModule) -> str:
        if not self._costs:
            return f"{short(sum(p.numel() for p in pl_module.parameters()))} parameters"
        costs = self._costs[0]
        return f"{short(costs.total)} parameters, {short(costs.active)} active per token"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember the files that are there."""
        self._files_before = self._files(trainer)

    def _files(self, trainer: Trainer) -> dict[Path, int]:
        """Return the files and folders of the run, with the times of their last change."""
        folders = {Path(trainer.default_root_dir), *([self.folder] if self.folder is not None else [])}
        found = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
        return {path: path.stat().st_mtime_ns for path in found if path.is_file() or path.name in LABELS}

    def _print_files(self, trainer: Trainer) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        written = [
            path
            for path, changed in sorted(self._files(trainer).items())
            if self._files_before.get(path) != changed or (fitting and path.name in LABELS)
        ]
        for path in written:
            picture = "picture" if path.suffix == ".png" else "file"
            self._console.print(f"{LABELS.get(path.name, picture)}: {path}", markup=False)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the model; forget the results of an earlier run."""
        if trainer.ckpt_path is None and trainer.global_step == 0:
            self._clear()
        self._started, self._trained = time.monotonic(), False
        # On every rank: counting runs a forward pass, and sharded parameters need all.
        self._count(pl_module)
        if not trainer.is_global_zero:
            return
        layers = list(moe_layers(pl_module))
        what = "dense: no MoE layer"
        if layers:
            first = layers[0]
            router = inner_router(first)
            what = (
                f"{type(router).__name__} · {len(layers)} MoE layers of {first.num_experts} "
                f"{type(first.experts).__name__}, {_choices(router)}"
            )
        self._console.print(f"[bold]{what}[/bold]; {self._sizes(pl_module)}")
        if self.folder is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._console.print(f"run folder: {self.folder}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember that there was something to train."""
        self._trained = True

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
        better = max if _higher_is_better(pl_module) else min
        self.best = self._last if self.best is None else better(self.best, self._last)

    def _print_training(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name = self._headline(pl_module)
        if not trainer.is_global_zero or not isinstance(pl_module, MoETask) or name is None:
            return
        seconds = self._seconds
        print_ = self._console.print
        if not self._trained:
            print_(f"Nothing was trained: the run is at step {trainer.global_step}, where it ends.")
            if self.folder is None or "fit" in self._known_results(self.folder / RESULTS):
                return
            # The run was killed between its last checkpoint, which has all that follows, and its results.
        print_(f"\n[bold]Trained to step {trainer.global_step} in {seconds:.0f} s.[/bold]")
        rows: list[tuple[str, float | None]] = [("step 0", self.metric_at_start)]
        baseline = pl_module.baseline(getattr(trainer, "datamodule", None))
        if baseline is not None:
            rows.append(baseline)
        if self._last is None:
            print_(
                "Nothing was validated (trainer.limit_val_batches is 0): there is no best checkpoint, and no picture."
            )
        else:
            rows += [("best", self.best), (f"last (step {self._last_step})", self._last)]
            rows += [("last, bits per byte", value) for value in self._bits_per_byte(trainer, name).values()]
            table = Table(title=f"validation {name}", title_justify="left", title_style="bold")
            for label, _ in rows:
                table.add_column(label, justify="right")
            table.add_row(*("-" if value is None else f"{value:.4f}" for _, value in rows))
            print_(table)
            monitor = _monitor(trainer)
            if monitor is not None and monitor.last_statistics and not monitor.steps_R:
                every = trainer.log_every_n_steps  # type: ignore[attr-defined]
                print_(f"No step's routing was recorded (trainer.log_every_n_steps is {every}): there is no picture.")
        self._print_costs(pl_module)
        trained = self._training_costs(trainer, pl_module)
        at_k = f" at k = {trained['trained k']:.2f}" if trained["trained k"] is not None else ""
        print_(f"trained on {short(trained['training tokens'])} tokens{at_k}: {short(trained['training FLOPs'])} FLOPs")
        self._print_routing(trainer)
        results = {
            "step": trainer.global_step,
            **trained,
            "seconds": round(seconds, 1),
            name: self._last,
            f"best {name}": self.best,
            **self._bits_per_byte(trainer, name),
        }
        self._save("fit", trainer, pl_module, {**results, f"step 0 {name}": self.metric_at_start})
        self._print_files(trainer)

    def _bits_per_byte(self, trainer: Trainer, headline: str) -> dict[str, float]:
        """Return what compares tokenizers, where another metric is the headline."""
        value = trainer.callback_metrics.get("val/bpb")
        return {} if value is None or headline == "bpb" else {"bpb": float(value)}

    def _training_costs(self, trainer: Trainer, task: MoETask) -> dict[str, Any]:
        """Return what training took: k may have changed over it, by a schedule or from token to token."""
        tokens, k = task.trained.tokens, task.trained.k
        examples = int(getattr(getattr(trainer, "datamodule", None), "batch_size", 1))
        flops = self._costs[0].training_flops(tokens, k, examples)
        return {"training tokens": tokens, "trained k": k, "training FLOPs": flops}

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

    def _print_results(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        if not trainer.is_global_zero:
            return
        shown = {
            name.partition("/")[2]: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(f"{split}/") and name.count("/") == 1
        }
        by_k = self._by_k(trainer, pl_module, split)
        at_k = f" at k = {by_k[0]['k']:.0f}, the first of eval_top_k" if by_k else ""
        table = Table(title=f"{split} split{at_k}", title_justify="left", title_style="bold")
        for name in shown:
            table.add_column(name, justify="right")
        table.add_row(*(f"{value:.4f}" for value in shown.values()))
        self._console.print(table)
        self._print_costs(pl_module)
        self._print_routing(trainer)
        checkpoint = {} if trainer.ckpt_path is None else {"checkpoint": Path(trainer.ckpt_path).name}
        self._save(split, trainer, pl_module, {**checkpoint, **shown, **({"by k": by_k} if by_k else {})})
        if by_k:
            self._show_by_k(pl_module, split, by_k)
        self._print_files(trainer)

    def _by_k(self, trainer: Trainer, pl_module: LightningModule, split: str) -> list[dict[str, float]]:
        if not isinstance(pl_module, MoETask) or len(pl_module.eval_top_ks) == 1:
            return []
        rows = []
        for top_k, costs in zip(pl_module.eval_top_ks, self._costs, strict=True):
            prefix = f"{split}/k{top_k}/"
            metrics = {n[len(prefix) :]: float(v) for n, v in trainer.callback_metrics.items() if n.startswith(prefix)}
            rows.append({"k": float(top_k or 0), **metrics, **_numbers(costs)})
        return rows

    def _show_by_k(self, pl_module: LightningModule, split: str, rows: list[dict[str, float]]) -> None:
        headline = str(self._headline(pl_module))
        table = Table(title=f"{split} split, one checkpoint at several k", title_justify="left", title_style="bold")
        for column in ("k", headline, "active parameters", "FLOPs per token", "relative FLOPs", "router FLOPs"):
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(
                f"{row['k']:.0f}",
                f"{row[headline]:.4f}",
                short(row["active parameters"]),
                short(row["FLOPs per token"]),
                f"{row['FLOPs per token'] / rows[0]['FLOPs per token']:.2f}x",
                short(row["router FLOPs per token"]),
            )
        self._console.print(table)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{split}_by_k.png"
            quality_by_cost(rows, headline, f"{split} split, one checkpoint").savefig(path, dpi=110)

    def _print_costs(self, pl_module: LightningModule) -> None:
        if not self._costs:
            return
        costs = self._costs[0]
        table = Table(title="costs", title_justify="left", title_style="bold")
        row = {
            "parameters": short(costs.total),
            "trainable": short(costs.trainable),
            "active per token": short(costs.active),
            "FLOPs per token": short(costs.flops),
            "of these the routers'": short(costs.router_flops),
        }
        for column in row:
            table.add_column(column, justify="right")
        table.add_row(*row.values())
        self._console.print(table)

    def _save(self, stage: str, trainer: Trainer, pl_module: LightningModule, results: dict[str, Any]) -> None:
        """Add a stage's results to `results.json` in the run's folder."""
        if self.folder is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = self.folder / RESULTS
        known = self._known_results(path)
        layers = list(moe_layers(pl_module))
        router: dict[str, Any] = {}
        if layers:
            first = inner_router(layers[0])
            evaluated = pl_module.eval_top_ks[0] if isinstance(pl_module, MoETask) else None
            router = {"router": type(first).__name__, "k": first.top_k if evaluated is None else evaluated}
        costs = _numbers(self._costs[0]) if self._costs else {}
        name = self._headline(pl_module)
        if name is not None:
            router |= {"headline_metric": name, "higher_is_better": _higher_is_better(pl_module)}
        found = {**router, **results, **costs, "peak memory, bytes": peak_memory(pl_module.device)}
        if stage in known and _measured(known[stage]) != _measured(found):
            known.setdefault(EARLIER, []).append({"stage": stage, **known[stage]})
        known[stage] = found
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(known, indent=2) + "\n")

    def _known_results(self, path: Path) -> dict[str, Any]:
        """Read the results so far; set a file aside that is damaged, instead of losing the new ones to it."""
        if not path.exists():
            return {}
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(known, dict) and isinstance(known.get(EARLIER, []), list):
                return known
        except ValueError:
            pass
        aside = path.with_suffix(".damaged.json")
        path.replace(aside)
        self._console.print(f"[yellow]{path} was damaged; it is now {aside}, and new results start a new file[/yellow]")
        return {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock, and count the costs of the trained model: a schedule may have changed k."""
        self._seconds_before, self._started = self._seconds, None
        self._count(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the costs."""
        if trainer.state.fn != TrainerFn.FITTING:
            self._count(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the costs."""
        self._count(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print the results, once the progress bar is gone."""
        if trainer.interrupted:
            return
        if stage == "fit":
            self._print_training(trainer, pl_module)
        elif stage in ("validate", "test"):
            self._print_results(trainer, pl_module, "val" if stage == "validate" else "test")

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run cannot measure again."""
        return {
            "metric_at_start": self.metric_at_start,
            "best": self.best,
            "last": self._last,
            "last_step": self._last_step,
            "seconds": self._seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from it."""
        self.metric_at_start, self.best = state_dict["metric_at_start"], state_dict["best"]
        self._last, self._last_step = state_dict["last"], state_dict["last_step"]
        self._seconds_before = state_dict["seconds"]


def _higher_is_better(module: LightningModule) -> bool:
    return bool(getattr(module, "headline_higher_is_better", False))


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: allocated on a GPU, or resident on a CPU, code included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def _monitor(trainer: Trainer) -> RoutingMonitor | None:
    found = (callback for callback in trainer.callbacks if isinstance(callback, RoutingMonitor))  # type: ignore[attr-defined]
    return next(found, None)


def _numbers(costs: Costs) -> dict[str, float]:
    return {
        "total parameters": costs.total,
        "trainable parameters": costs.trainable,
        "active parameters": costs.active,
        "FLOPs per token": costs.flops,
        "router FLOPs per token": costs.router_flops,
    }


def _choices(router: Router) -> str:
    return f"top {router.top_k}" if router.max_top_k > 1 or router.spec.num_experts == 1 else "k set by the router"


def _measured(results: dict[str, Any]) -> dict[str, Any]:
    """Return what would be the same if it were measured again."""
    return {name: value for name, value in results.items() if not name.startswith(("seconds", "peak memory"))}
