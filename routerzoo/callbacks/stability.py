"""`StabilityMonitor`: how the routing of the same tokens changes over training."""
# Shape suffixes: R records over training, T tokens, K choices per token.

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, final

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from routerzoo.callbacks.dry_run import first_validation_batch, run_validation_step
from routerzoo.callbacks.steps import completes_step, steps_taken
from routerzoo.errors import UserError
from routerzoo.metrics import LastFluctuation, RouterSaturation, RoutingFluctuation
from routerzoo.metrics.figures import stability_over_training
from routerzoo.moe.layer import MoE, inner_router, moe_layers
from routerzoo.routing import LayerRouting, Routing, RoutingContext


@final
class StabilityMonitor(Callback):
    """Routes the first validation batch at regular steps of training, in evaluation mode and at a fixed k.

    Works with any `LightningModule` whose `validation_step` runs the model; padding is left out. Logs
    `stability/moe<i>/fluctuation`, the share of the tokens' experts that changed since the last record, for the i-th
    MoE layer. When training ends, it draws for every layer that fluctuation; the saturation, which is the share of the
    final experts that each record selects already, beside its chance level; and the share of tokens that are settled,
    which keep their final experts from there on. Training is unaffected, and a resumed run continues the records.

    Args:
        every_n_steps: steps between records; the start and the end are recorded too.
        top_k: experts per token in the records; by default that of each router when training starts. A growing k would
            raise the saturation.
        max_tokens: tokens to follow, of each call of a layer.
        picture: file, relative to the run's folder; None for no picture.

    Raises:
        ValueError: `every_n_steps` or `max_tokens` below 1.
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
        self._batch: Any = None
        self._clear()

    def _clear(self) -> None:
        self.steps_R: list[int] = []
        # For each layer, its records [T, K], sorted by expert.
        self._experts: list[list[Tensor]] = []
        self._num_experts: list[int] = []
        self._top_ks: list[int] = []

    @property
    def state_key(self) -> str:
        """Name of the state in checkpoints: monitors of different k or tokens have their own."""
        return self._generate_state_key(top_k=self.top_k, max_tokens=self.max_tokens)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the batch, and record the start.

        Raises:
            UserError: there is no MoE layer, or no validation batch, or a router cannot do `top_k`.
        """
        layers = list(moe_layers(pl_module))
        if not layers:
            raise UserError("StabilityMonitor has nothing to follow: the model has no MoE layer")
        for layer in layers:
            router = inner_router(layer)
            if self.top_k is not None and not 1 <= self.top_k <= router.max_top_k:
                raise UserError(
                    f"StabilityMonitor's top_k must be between 1 and {router.max_top_k} for {type(router).__name__}, "
                    f"got {self.top_k}"
                )
        self._batch = first_validation_batch(trainer, pl_module)
        if trainer.global_step == 0:
            self._clear()
        if not self._top_ks:
            self._top_ks = [inner_router(layer).top_k if self.top_k is None else self.top_k for layer in layers]
            self._num_experts = [layer.num_experts for layer in layers]
            self._experts = [[] for _ in layers]
        if not self.steps_R:
            self._record(trainer.global_step, trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record at regular steps."""
        step = steps_taken(trainer) + 1
        if completes_step(trainer) and step % self.every_n_steps == 0:
            self._record(step, trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the end, and draw."""
        self._record(steps_taken(trainer), trainer, pl_module, log=False)  # Lightning logs no more
        self._batch = None
        if self.picture is None or not trainer.is_global_zero or trainer.fast_dev_run or len(self.steps_R) < 2:  # type: ignore[attr-defined]
            return
        path = Path(trainer.default_root_dir) / self.picture
        path.parent.mkdir(parents=True, exist_ok=True)
        curves = self.curves()
        stability_over_training(curves).savefig(path, dpi=110)
        path.with_suffix(".json").write_text(json.dumps(curves) + "\n", encoding="utf-8")

    def _record(self, step: int, trainer: Trainer, pl_module: LightningModule, log: bool = True) -> None:
        if self.steps_R and self.steps_R[-1] >= step:
            return
        layers = list(moe_layers(pl_module))
        calls: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}

        def keep(published: LayerRouting, context: RoutingContext) -> None:
            experts_TK = published.routing.experts_TK
            if experts_TK is None:
                name = type(inner_router(published.layer)).__name__  # type: ignore[arg-type]
                raise UserError(f"StabilityMonitor follows the k experts of each token; {name} has no such choice")
            if context.padding_mask is not None:
                experts_TK = experts_TK[~context.padding_mask]
            calls[published.layer].append(experts_TK[: self.max_tokens].sort(-1).values.to(torch.int16).cpu())

        with ExitStack() as stack:
            for layer, top_k in zip(layers, self._top_ks, strict=True):
                stack.callback(layer.register_routing_hook(keep).remove)
                stack.enter_context(_fixed_top_k(layer, top_k))
            run_validation_step(trainer, pl_module, self._batch)
        for index, layer in enumerate(layers):
            if not calls[layer]:
                raise UserError(
                    f"StabilityMonitor follows validation_step, and {type(pl_module).__name__}'s does not call MoE "
                    f"layer {index}"
                )
        now = [torch.cat(calls[layer]) for layer in layers]
        if self.steps_R and any(
            one.shape != records[-1].shape for one, records in zip(now, self._experts, strict=True)
        ):
            rank_zero_warn("the first validation batch has changed: StabilityMonitor's records start over")
            self.steps_R, self._experts = [], [[] for _ in layers]
        for index, (experts_TK, records) in enumerate(zip(now, self._experts, strict=True)):
            if log and records:
                metric = RoutingFluctuation(self._num_experts[index])
                metric.update(_routing(records[-1]), _routing(experts_TK))
                pl_module.log(f"stability/moe{index}/fluctuation", metric.compute()["fluctuation"].to(pl_module.device))
            records.append(experts_TK)
        self.steps_R.append(step)

    def curves(self) -> dict[int, dict[str, list[float]]]:
        """Return by layer the `steps`, and at each the `fluctuation`, `saturation`, `chance` and share `settled`."""
        result = {}
        for index, (records, num_experts) in enumerate(zip(self._experts, self._num_experts, strict=True)):
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
        """Return the records."""
        return {
            "steps": list(self.steps_R),
            "experts": [torch.stack(records) for records in self._experts],
            "num_experts": list(self._num_experts),
            "top_ks": list(self._top_ks),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the records."""
        self.steps_R, self._top_ks = list(state_dict["steps"]), list(state_dict["top_ks"])
        self._num_experts = list(state_dict["num_experts"])
        self._experts = [list(records) for records in state_dict["experts"]]


@contextmanager
def _fixed_top_k(layer: MoE, top_k: int) -> Iterator[None]:
    """Route with this k whenever the layer is called, also where the step itself sets another."""
    with ExitStack() as during_call:
        handles = [
            layer.register_forward_pre_hook(
                lambda *_: during_call.enter_context(inner_router(layer).override_top_k(top_k))
            ),
            layer.register_forward_hook(lambda *_: during_call.close(), always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _routing(experts_TK: Tensor) -> Routing:
    experts_TK = experts_TK.long()
    return Routing(experts_TK, (experts_TK >= 0).float())
