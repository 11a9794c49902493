"""`Classification`: the base class of tasks that predict labels."""
# Shape suffixes: B examples, L labels.

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from routerzoo.errors import UserError
from routerzoo.routing import RoutingContext
from routerzoo.tasks.base import MoETask, Prediction, in_full_precision


class ClassPredictions(NamedTuple):
    """What `predict` returns for a batch: `probs_BL` class probabilities; `labels_B` the true labels, where known."""

    probs_BL: Tensor
    labels_B: Tensor | None


class Classification(MoETask):
    """A task whose loss is the mean cross-entropy of labels, in nats; batches have `labels_B`.

    A subclass sets `num_classes` and `label_smoothing`, and implements `forward`, which returns the logits of a batch,
    `[B, L]`, and the context with the routing of every MoE layer.
    """

    headline_higher_is_better = True
    num_classes: int
    label_smoothing: float

    @property
    def headline_metric(self) -> str:
        """Name of the metric that papers report."""
        return "accuracy"

    def baseline(self, datamodule: Any) -> tuple[str, float] | None:
        """Predict the most frequent label of the training split, where the data module has that accuracy."""
        accuracy = getattr(datamodule, "most_frequent_class_accuracy", None)
        return None if accuracy is None else ("most frequent class", accuracy("val"))

    def setup(self, stage: str) -> None:
        """Refuse data with other labels.

        Raises:
            UserError: the data module has another number of classes.
        """
        datamodule = getattr(self.trainer, "datamodule", None)
        classes = getattr(datamodule, "num_classes", self.num_classes)
        if classes != self.num_classes:
            raise UserError(
                f"the data has {classes} classes, the model {self.num_classes}: set num_classes to {classes}"
            )
        super().setup(stage)

    def token_losses(self, losses_B: Tensor, batch: Any, context: RoutingContext) -> Tensor:
        """Return the loss of each token: its example's."""
        assert context.sequence_ids is not None  # the net fills them in
        return losses_B.index_select(0, context.sequence_ids)

    def predict_batch(self, batch: Any) -> Prediction:
        """Predict labels."""
        logits_BL, context = self(batch, **self.progress)
        logits_BL = in_full_precision(logits_BL)
        losses_B = F.cross_entropy(logits_BL, batch.labels_B, label_smoothing=self.label_smoothing, reduction="none")
        return Prediction(logits_BL, losses_B.mean(), self.token_losses(losses_B, batch, context), context)

    def training_metrics(self, batch: Any, prediction: Prediction, loss: Tensor) -> dict[str, Tensor]:
        """Return the accuracy."""
        return {"accuracy": (prediction.logits_NC.argmax(-1) == batch.labels_B).float().mean()}

    def evaluate(self, batch: Any, metrics: Mapping[str, Metric]) -> None:
        """Add a batch's examples."""
        logits_BL = in_full_precision(self(batch)[0])
        for name, metric in metrics.items():
            if name == "loss":
                metric.update(F.cross_entropy(logits_BL, batch.labels_B), len(batch.labels_B))
            else:
                metric.update(logits_BL, batch.labels_B)

    def predict_step(self, batch: Any, batch_idx: int) -> ClassPredictions:
        """Return the class probabilities of a batch."""
        with self.override_top_k():
            logits_BL, _ = self(batch)
        return ClassPredictions(logits_BL.float().softmax(-1), batch.labels_B)


def accuracies(num_classes: int, *, top5: bool = False) -> dict[str, Metric]:
    """Return the metrics of an evaluation."""
    metrics: dict[str, Metric] = {"loss": MeanMetric(), "accuracy": MulticlassAccuracy(num_classes, average="micro")}
    if top5:
        metrics["top5"] = MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes))
    return metrics
