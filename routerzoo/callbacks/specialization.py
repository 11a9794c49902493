"""`ExpertSpecialization`: who is chosen with whom, and for what."""
# Shape suffixes: T tokens, E experts, B images.

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from routerzoo.metrics import CoActivation, RepresentationCollapse, Specialization
from routerzoo.metrics.figures import anatomy
from routerzoo.moe.layer import MoE, moe_layers, without_padding
from routerzoo.routing import Routing, RoutingContext


class _LayerMetrics(NamedTuple):
    co_activation: CoActivation
    specialization: Specialization | None
    collapse: RepresentationCollapse


@final
class ExpertSpecialization(Callback):
    """Describes the routing of the validation or test split when a model is evaluated.

    For each MoE layer it logs `<val|test>/moe<layer>/specialization` with its chance level, by token id in text and by
    class in images, and `/collapse`, X-MoE's measure by the expert that a token chooses first; smaller is more
    collapsed. It draws which experts are chosen together, and what the most specialised labels choose.

        python -m routerzoo test --ckpt_path best --trainer.callbacks+ ExpertSpecialization

    Args:
        min_count: tokens that a label must have to count.
        while_training: log the same at each validation of a training run, without a picture.
        picture: end of the file's name, after the split, in the run's folder; None for no picture.
    """

    def __init__(self, min_count: int = 10, while_training: bool = False, picture: str | None = "anatomy.png") -> None:
        self.min_count, self.while_training, self.picture = min_count, while_training, picture
        self._metrics: dict[MoE, _LayerMetrics] = {}
        self._handles: list[RemovableHandle] = []
        self._top_ks: dict[MoE, int] = {}
        self._batch: Any = None

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        num_classes = getattr(getattr(trainer, "datamodule", None), "num_classes", None)
        self._metrics, self._top_ks = {}, {}
        for layer in moe_layers(pl_module):
            spec = layer.spec
            labels = num_classes if num_classes is not None else spec.vocab_size
            chosen_for = Specialization(spec.num_experts, labels, min_count=self.min_count) if labels else None
            self._metrics[layer] = _LayerMetrics(
                CoActivation(spec.num_experts).to(pl_module.device),
                chosen_for if chosen_for is None else chosen_for.to(pl_module.device),
                RepresentationCollapse(spec.num_experts, spec.d_model).to(pl_module.device),
            )
            self._handles.append(layer.router.register_forward_hook(self._recorder(layer)))

    def _recorder(self, layer: MoE) -> Any:
        def record(router: Any, arguments: tuple[Any, ...], routing: Routing) -> None:
            # Of several k of an evaluation, the first is described.
            if routing.dense or self._top_ks.setdefault(layer, router.top_k) != router.top_k:
                return
            x_TD, context = arguments[0], arguments[1] if len(arguments) > 1 else RoutingContext()
            routing = without_padding(routing, context)
            metrics = self._metrics[layer]
            metrics.co_activation.update(routing)
            if routing.experts_TK is not None:
                metrics.collapse.update(x_TD, routing.experts_TK[:, 0])
            labels_T = self._labels(context)
            if metrics.specialization is not None and labels_T is not None:
                metrics.specialization.update(routing, labels_T)

        return record

    def _labels(self, context: RoutingContext) -> Tensor | None:
        labels_B = getattr(self._batch, "labels_B", None)
        return context.token_ids if labels_B is None else labels_B[context.sequence_ids]

    def _finish(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        while self._handles:
            self._handles.pop().remove()
        computed = []
        for layer, metrics in self._metrics.items():
            together_EE = metrics.co_activation.compute()
            special = metrics.specialization.compute() if metrics.specialization is not None else {}
            values = {"collapse": metrics.collapse.compute()}
            if special:
                values |= {"specialization": special["specialization"], "specialization_chance": special["chance"]}
            prefix = f"{split}/moe{layer.spec.layer}"
            # Computed over all ranks already; Lightning wants to be told to average them, equal as they are.
            pl_module.log_dict({f"{prefix}/{n}": v for n, v in values.items() if not v.isnan()}, sync_dist=True)
            computed.append((layer.spec.layer, together_EE.cpu(), special["share_VE"].cpu() if special else None))
        drawing = self.picture is not None and trainer.state.fn != "fit"
        if drawing and computed and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = Path(trainer.default_root_dir) / f"{split}_{self.picture}"
            path.parent.mkdir(parents=True, exist_ok=True)
            anatomy(computed, self._names(trainer)).savefig(path, dpi=110)

    def _names(self, trainer: Trainer) -> list[str] | None:
        data: Any = getattr(trainer, "datamodule", None)
        if hasattr(data, "class_names"):
            return list(data.class_names)
        if hasattr(data, "decode") and hasattr(data, "vocab_size"):
            return [repr(data.decode(torch.tensor([label])))[1:-1] for label in range(data.vocab_size)]
        return None

    def _describes(self, trainer: Trainer) -> bool:
        return trainer.state.fn == "validate" or (self.while_training and not trainer.sanity_checking)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start, unless this is a validation in the midst of training."""
        if self._describes(trainer):
            self._start(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the labels in reach."""
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
        """Keep the labels in reach."""
        self._batch = batch

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log and draw."""
        self._finish(trainer, pl_module, "test")
