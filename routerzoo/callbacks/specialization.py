"""`ExpertSpecialization`: expert co-activation and specialization."""
# Shape suffixes: T tokens, E experts, B images.

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from routerzoo.metrics import CoActivation, RepresentationCollapse, Specialization
from routerzoo.metrics.figures import specialization
from routerzoo.moe.layer import inner_router, moe_layers
from routerzoo.routing import LayerRouting, RoutingContext


class _LayerMetrics(NamedTuple):
    co_activation: CoActivation
    specialization: Specialization | None
    collapse: RepresentationCollapse


@final
class ExpertSpecialization(Callback):
    """Logs how specialized the experts are, over the validation or test split, when a model is evaluated.

    For the i-th MoE layer these are `<val|test>/moe<i>/specialization`, with its chance level, by token id in text and
    by class in images, and `/collapse`, X-MoE's measure by the expert of each token's first choice; smaller is more
    collapsed. A picture shows co-activated experts and the experts of the most specialized labels.

        python -m routerzoo test --ckpt_path best --trainer.callbacks+ ExpertSpecialization

    Args:
        min_count: labels with fewer tokens are left out.
        while_training: log at each validation of a training run too, without a picture.
        picture: end of the file's name, after the split, in the run's folder; None for no picture.
    """

    def __init__(
        self, min_count: int = 10, while_training: bool = False, picture: str | None = "specialization.png"
    ) -> None:
        self.min_count, self.while_training, self.picture = min_count, while_training, picture
        self._metrics: dict[nn.Module, _LayerMetrics] = {}
        self._handles: list[Any] = []
        # The hidden states and the k of each layer.
        self._inputs: dict[nn.Module, Tensor] = {}
        self._top_ks: dict[nn.Module, int] = {}
        self._batch: Any = None

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()
        num_classes = getattr(getattr(trainer, "datamodule", None), "num_classes", None)
        for layer in moe_layers(pl_module):
            num_labels = num_classes if num_classes is not None else layer.spec.vocab_size
            by_label = Specialization(layer.num_experts, num_labels, min_count=self.min_count) if num_labels else None
            self._metrics[layer] = _LayerMetrics(
                CoActivation(layer.num_experts).to(pl_module.device),
                None if by_label is None else by_label.to(pl_module.device),
                RepresentationCollapse(layer.num_experts, layer.spec.d_model).to(pl_module.device),
            )
            self._handles.append(layer.register_forward_pre_hook(self._keep_input, with_kwargs=True))
            self._handles.append(layer.register_routing_hook(self._record))

    def _stop(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._metrics, self._inputs, self._top_ks, self._batch = {}, {}, {}, None

    def _keep_input(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["x"]
        self._inputs[layer] = x.reshape(-1, x.shape[-1])

    def _record(self, published: LayerRouting, context: RoutingContext) -> None:
        layer, routing = published.layer, published.routing
        x_TD, top_k = self._inputs.pop(layer), inner_router(layer).top_k  # type: ignore[arg-type]
        # Of several k of an evaluation, the first is described.
        if routing.dense or self._top_ks.setdefault(layer, top_k) != top_k:
            return
        metrics = self._metrics[layer]
        metrics.co_activation.update(routing)
        if routing.experts_TK is not None:
            metrics.collapse.update(x_TD, routing.experts_TK[:, 0])
        labels_T = self._labels(context)
        if metrics.specialization is not None and labels_T is not None:
            metrics.specialization.update(routing, labels_T)

    def _labels(self, context: RoutingContext) -> Tensor | None:
        labels_B = getattr(self._batch, "labels_B", None)
        if labels_B is None:
            return context.token_ids
        return None if context.sequence_ids is None else labels_B[context.sequence_ids]

    def _finish(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        drawn = []
        for index, metrics in enumerate(self._metrics.values()):
            values, share_VE = {}, None
            if metrics.collapse.update_called:
                values["collapse"] = metrics.collapse.compute()
            if metrics.specialization is not None and metrics.specialization.update_called:
                by_label = metrics.specialization.compute()
                values |= {"specialization": by_label["specialization"], "specialization_chance": by_label["chance"]}
                share_VE = by_label["share_VE"].cpu()
            # Reduced over all ranks already; Lightning warns unless it averages the equal values too.
            named = {f"{split}/moe{index}/{n}": v for n, v in values.items() if not v.isnan()}
            pl_module.log_dict(named, sync_dist=True)
            if metrics.co_activation.update_called:
                drawn.append((index, metrics.co_activation.compute().cpu(), share_VE))
        self._stop()
        draws = self.picture is not None and trainer.state.fn != "fit"
        if draws and drawn and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = Path(trainer.default_root_dir) / f"{split}_{self.picture}"
            path.parent.mkdir(parents=True, exist_ok=True)
            specialization(drawn, self._names(trainer)).savefig(path, dpi=110)

    def _names(self, trainer: Trainer) -> list[str] | None:
        data: Any = getattr(trainer, "datamodule", None)
        if hasattr(data, "class_names"):
            return list(data.class_names)
        if hasattr(data, "decode") and hasattr(data, "vocab_size"):
            return [repr(data.decode(torch.tensor([label])))[1:-1] for label in range(data.vocab_size)]
        return None

    def _describes(self, trainer: Trainer) -> bool:
        return trainer.state.fn == "validate" or (self.while_training and not trainer.sanity_checking)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hooks."""
        self._stop()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start, unless this is a validation of a training run."""
        if self._describes(trainer):
            self._start(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the labels."""
        self._batch = batch

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log and draw."""
        if self._describes(trainer):
            self._finish(trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start."""
        self._start(trainer, pl_module)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the labels."""
        self._batch = batch

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log and draw."""
        self._finish(trainer, pl_module, "test")
