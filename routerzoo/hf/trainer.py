"""`RoutingCallback`: what routers need of the Trainer of transformers."""
# Shape suffixes: B sequences, S tokens of a sequence, V vocabulary.

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from routerzoo.errors import UserError
from routerzoo.metrics import ExpertLoad, GateConfidence
from routerzoo.metrics.over_layers import over_layers
from routerzoo.moe.attach import RouterUpdates, attach
from routerzoo.moe.auxiliary_loss import auxiliary_losses
from routerzoo.moe.context import ContextHook
from routerzoo.moe.layer import inner_router, moe_layers
from routerzoo.router import LossWeight
from routerzoo.routing import LayerRouting, RoutingContext


class RoutingCallback(TrainerCallback):
    """Adds auxiliary losses, updates the routers once per optimizer step, and logs the routing.

    The losses are added to the model's own, and scaled as the Trainer scales that: with accumulated gradients and
    several processes they count as in one large batch. Logs have their means since the last log, `<name>_loss`, and the
    routing of all training passes since then: of all MoE layers `moe/<metric>`, or of each `moe<i>/<metric>`.

    Args:
        trainer: the Trainer, of a model that `upcycle` or `replace_routers` has changed, with adapters of PEFT or
            without.
        loss_weights: coefficient by auxiliary loss; by default those that each router's source publishes. See
            `routerzoo.auxiliary_loss`.
        detail: `brief` for five metrics of all layers, `detailed` for all of every layer.
        token_counts: int64 `[vocab_size]`, how often each token id occurs in the training data, for routers that are
            fitted to it.

    Example::

        trainer = Trainer(model=hf.upcycle(...), args=..., train_dataset=...)
        trainer.add_callback(hf.RoutingCallback(trainer))
        trainer.train()
    """

    def __init__(
        self,
        trainer: Trainer,
        loss_weights: Mapping[str, float | LossWeight] | None = None,
        *,
        detail: Literal["brief", "detailed"] = "brief",
        token_counts: Tensor | None = None,
    ) -> None:
        if detail not in ("brief", "detailed"):
            raise UserError(f"detail must be brief or detailed, got {detail!r}")
        model: Any = trainer.model
        self.model: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT
        if not isinstance(getattr(self.model, "routing", None), ContextHook):
            raise UserError(
                f"{type(self.model).__name__} has no routers of ours: change it by upcycle or replace_routers first"
            )
        self.trainer, self.loss_weights = trainer, loss_weights
        self.detail, self.token_counts = detail, token_counts
        self.layers = list(moe_layers(self.model))
        self._handles: list[Any] = []
        self._losses: dict[str, Tensor] = {}
        self._passes = 0
        self._metrics: dict[nn.Module, tuple[ExpertLoad, GateConfidence]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach to the optimizer and the model.

        Raises:
            UserError: a loss that is not the model's, or several GPUs in one process.
        """
        replaced = [
            name
            for name, value in (
                ("label_smoothing_factor", self.trainer.label_smoother),
                ("compute_loss_func", self.trainer.compute_loss_func),
            )
            if value is not None
        ]
        if replaced:
            raise UserError(
                f"{replaced[0]} replaces the model's loss, which auxiliary losses are added to: leave it out"
            )
        if args.n_gpu > 1:
            raise UserError(
                f"{args.n_gpu} GPUs share a process, which copies routers without their state: use torchrun"
            )
        self._remove()
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])  # accelerate's is around it
        updates: RouterUpdates = attach(
            self.layers, optimizer, state.max_steps, step=state.global_step, token_counts=self.token_counts
        )
        self._handles = [updates, self.model.register_forward_hook(self._add_losses, with_kwargs=True)]
        self._handles += [layer.register_routing_hook(self._record) for layer in self.layers]
        self._start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log, where the Trainer does."""
        if not control.should_log or not self._passes:
            return
        logs = {f"{name}_loss": float(loss) / self._passes for name, loss in self._losses.items()}
        layers = []
        for load, confidence in self._metrics.values():
            computed = {**load.compute(), **confidence.compute()}
            layers.append({name: float(value) for name, value in computed.items() if not value.isnan()})
        if self.detail == "brief":
            logs |= {f"moe/{name}": value for name, value in over_layers(layers).items()}
        else:
            for index, layer in enumerate(layers):
                logs |= {f"moe{index}/{name}": value for name, value in layer.items()}
        self.trainer.log(logs)
        self._start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach."""
        self._remove()

    def _start(self) -> None:
        self._losses, self._passes = {}, 0
        self._metrics = {
            layer: (
                ExpertLoad(layer.num_experts).to(self.model.device),
                GateConfidence(layer.num_experts).to(self.model.device),
            )
            for layer in self.layers
        }

    def _remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _record(self, published: LayerRouting, context: RoutingContext) -> None:
        if self.model.training:
            for metric in self._metrics[published.layer]:
                metric.update(published.routing)

    def _add_losses(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not model.training or getattr(output, "loss", None) is None:
            return None
        self._passes += 1
        learns = any(inner_router(layer).wants_feedback for layer in self.layers)
        losses = auxiliary_losses(
            self.layers,
            self.model.routing.context,
            self.loss_weights,
            token_losses=_token_losses(output.logits, kwargs["labels"]) if learns else None,
        )
        if losses and getattr(output, "aux_loss", None) is not None:
            raise UserError(
                "output_router_logits adds the model's own balance loss to those of its routers: set it to False in "
                "the model's config, or pass loss_weights={}"
            )
        for name, loss in losses.items():
            self._losses[name] = self._losses.get(name, 0.0) + loss.detach()
            output.loss = output.loss + loss * self._scale("num_items_in_batch" in kwargs)
        return output

    def _scale(self, over_all_batches: bool) -> float:
        """Return what makes the Trainer's sum over batches and processes a mean, as it is for `model(...).loss`."""
        if not over_all_batches:
            return 1.0
        scale = 1 / self.trainer.current_gradient_accumulation_steps
        return (
            scale / self.trainer.accelerator.num_processes if self.trainer.args.average_tokens_across_devices else scale
        )


def _token_losses(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Return the loss of each token of a causal model, `[B, S]`, 0 where there is no target."""
    losses_BS = F.cross_entropy(logits_BSV[:, :-1].detach().float().mT, labels_BS[:, 1:], reduction="none")
    return F.pad(losses_BS, (0, 1))
