"""`StabilityMonitor`: how the routing of the same tokens changes over training."""
# Shape suffixes: R records over training, T tokens, K choices per token.

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, final

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from routerzoo.errors import UserError
from routerzoo.metrics import LastFluctuation, RouterSaturation, RoutingFluctuation
from routerzoo.metrics.figures import stability_over_training
from routerzoo.moe.layer import moe_layers
from routerzoo.routing import Routing


@final
class StabilityMonitor(Callback):
    """Routes a fixed batch of the validation split every so often, in evaluation and at a fixed k.

    Logs `stability/moe<layer>/fluctuation`, the share of the tokens' experts that differ from those of the last record.
    When training ends it draws, for every layer: that fluctuation; the saturation, which is the share of the final
    experts that each record has already, beside its chance level; and the share of tokens that are settled, having had
    their final experts since then. It changes nothing of the run, and a resumed run goes on with its records.

    Args:
        every_n_steps: steps between records; the start and the end are recorded too.
        top_k: experts per token in the records; by default that of the first record. A growing k would lift saturation.
        max_tokens: tokens to follow.
        picture: file, relative to the run's folder; None for no picture.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        top_k: int | None = None,
        max_tokens: int = 2048,
        picture: str | None = "stability.png",
    ) -> None:
        if every_n_steps < 1 or max_tokens < 1:
            raise ValueError(f"every_n_steps and max_tokens must be at least 1, got {every_n_steps} and {max_tokens}")
        self.every_n_steps, self.top_k, self.max_tokens, self.picture = every_n_steps, top_k, max_tokens, picture
        self.steps_R: list[int] = []
        # Experts of each layer and record, [T, K], sorted.
        self.experts_R: dict[int, list[Tensor]] = {}
        self.num_experts: dict[int, int] = {}
        self._batch: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the batch, and record the start."""
        from routerzoo.tasks.base import MoETask

        if not isinstance(pl_module, MoETask):
            raise UserError(f"StabilityMonitor follows routerzoo's tasks, not a {type(pl_module).__name__}")
        layers = list(moe_layers(pl_module))
        if not layers:
            raise UserError("StabilityMonitor has nothing to follow: the model has no MoE layer")
        if self.top_k is None:
            self.top_k = layers[0].router.top_k
        loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        self._batch = pl_module.transfer_batch_to_device(next(iter(loader)), pl_module.device, 0)
        if not self.steps_R:  # a resumed run has its start already
            self._record(trainer.global_step, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record every so often."""
        if trainer.global_step % self.every_n_steps == 0:
            self._record(trainer.global_step, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the end, and draw."""
        self._record(trainer.global_step, pl_module, log=False)  # Lightning logs no more
        if self.picture is None or not trainer.is_global_zero or trainer.fast_dev_run or len(self.steps_R) < 2:  # type: ignore[attr-defined]
            return
        path = Path(trainer.default_root_dir) / self.picture
        path.parent.mkdir(parents=True, exist_ok=True)
        curves = self.curves()
        stability_over_training(curves).savefig(path, dpi=110)
        path.with_suffix(".json").write_text(json.dumps(curves) + "\n", encoding="utf-8")

    def _record(self, step: int, pl_module: LightningModule, log: bool = True) -> None:
        if self.steps_R and self.steps_R[-1] >= step:
            return
        from routerzoo.tasks.base import MoETask

        assert isinstance(pl_module, MoETask)
        assert self.top_k is not None
        layers = list(moe_layers(pl_module))
        seen: dict[int, Tensor] = {}

        def keep(layer: int) -> Any:
            def hook(router: Any, arguments: Any, routing: Routing) -> None:
                if routing.experts_TK is None:
                    raise UserError(f"StabilityMonitor follows sets of experts; {type(router).__name__} gives none")
                seen[layer] = routing.experts_TK[: self.max_tokens].sort(-1).values.to(torch.int16).cpu()

            return hook

        handles = [layer.router.register_forward_hook(keep(layer.spec.layer)) for layer in layers]
        modes = [(module, module.training) for module in pl_module.modules()]
        trained = [layer.router.top_k for layer in layers]
        pl_module.eval()
        try:
            for layer in layers:
                layer.router.top_k = self.top_k
            with torch.no_grad():
                pl_module.evaluate(self._batch, {})
        finally:
            for layer, before in zip(layers, trained, strict=True):
                layer.router.top_k = before
            for module, training in modes:
                module.training = training
            for handle in handles:
                handle.remove()
        for layer in layers:
            index = layer.spec.layer
            records = self.experts_R.setdefault(index, [])
            self.num_experts[index] = layer.spec.num_experts
            if log and records and seen[index].shape == records[-1].shape:
                metric = RoutingFluctuation(layer.spec.num_experts)
                metric.update(_routing(records[-1]), _routing(seen[index]))
                pl_module.log(f"stability/moe{index}/fluctuation", metric.compute()["fluctuation"].to(pl_module.device))
            records.append(seen[index])
        self.steps_R.append(step)

    def curves(self) -> dict[int, dict[str, list[float]]]:
        """Return by layer the `steps`, and at each the `fluctuation`, `saturation`, `chance` and share `settled`."""
        result = {}
        for index, records in self.experts_R.items():
            num_experts = self.num_experts[index]
            routings = [_routing(record) for record in records]
            settled = LastFluctuation(num_experts)
            curve: dict[str, list[float]] = {"steps": list(map(float, self.steps_R))}
            curve |= {name: [] for name in ("fluctuation", "saturation", "chance")}
            for place, routing in enumerate(routings):
                settled.update(self.steps_R[place], routing)
                change, saturation = RoutingFluctuation(num_experts), RouterSaturation(num_experts)
                change.update(routings[max(place - 1, 0)], routing)
                saturation.update(routing, routings[-1])
                curve["fluctuation"].append(float(change.compute()["fluctuation"]))
                for name, value in saturation.compute().items():
                    curve[name].append(float(value))
            curve["settled"] = settled.compute()["settled"].reshape(-1).tolist()
            result[index] = curve
        return result

    def state_dict(self) -> dict[str, Any]:
        """Keep the records."""
        experts = {index: torch.stack(records) for index, records in self.experts_R.items()}
        return {"steps": self.steps_R, "experts": experts, "num_experts": self.num_experts, "top_k": self.top_k}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the records up."""
        self.steps_R, self.top_k = list(state_dict["steps"]), state_dict["top_k"]
        self.num_experts = dict(state_dict["num_experts"])
        self.experts_R = {index: list(records) for index, records in state_dict["experts"].items()}


def _routing(experts_TK: Tensor) -> Routing:
    experts_TK = experts_TK.long()
    return Routing(experts_TK, (experts_TK >= 0).float())
