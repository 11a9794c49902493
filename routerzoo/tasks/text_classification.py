"""`TextClassification`: labels of texts, from the last hidden state of a decoder."""
# Shape suffixes: B texts, S tokens of the longest one, D model width, L labels, T tokens.

from __future__ import annotations

from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from routerzoo.data.labelled_text import LabelledBatch
from routerzoo.routing import RoutingContext
from routerzoo.tasks.classification import Classification, accuracies
from routerzoo.tasks.decoder import DecoderTask, TextTask


class TextLabels(Classification, TextTask):
    """Predicts labels of texts, in batches of `LabelledText`."""

    def token_losses(self, losses_B: Tensor, batch: LabelledBatch, context: RoutingContext) -> Tensor:
        """Return the loss of each token: its text's, 0 for padding."""
        losses_T = super().token_losses(losses_B, batch, context)
        return losses_T.masked_fill(batch.padding_mask_BS.flatten(), 0.0)


@final
class TextClassification(TextLabels, DecoderTask):
    """Text classification: the task's loss is the mean cross-entropy, in nats. Reports `loss` and `accuracy`.

    The model is the decoder of `LanguageModeling`, with a linear classifier of the hidden state at each text's last
    token. Its weights have the names that they have there: `FineTune` starts from a language model's checkpoint.

        --config configs/schedules/from-a-language-model.yaml --trainer.callbacks.checkpoint best.ckpt

    Args:
        num_classes: number of labels; by default 2. From the command line it is the data's.
        label_smoothing: share of the target spread over all labels in training.
        arguments: those of `DecoderTask` and `Decoder`.
    """

    def __init__(self, num_classes: int | None = None, *, label_smoothing: float = 0.0, **arguments: Any) -> None:
        num_classes = num_classes if num_classes is not None else 2
        super().__init__(evaluation_metrics=partial(accuracies, num_classes), num_tasks=None, **arguments)
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        self.classifier = nn.Linear(self.net.head.in_features, num_classes)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)
        if self.net.head.weight is not self.net.embedding.weight:
            self.net.head.requires_grad_(False)  # it predicts bytes, which this task does not use

    def forward(self, batch: LabelledBatch, **progress: Any) -> tuple[Tensor, RoutingContext]:
        """Return the logits of labels, `[B, L]`, and the context with the routing of every MoE layer."""
        x_BSD, context = self.net.hidden(batch.ids_BS, padding_mask_BS=batch.padding_mask_BS, **progress)
        last_B = (~batch.padding_mask_BS).sum(1).clamp_min(1) - 1
        last_BD = x_BSD[torch.arange(len(last_B), device=last_B.device), last_B]
        return self.classifier(last_BD), context
