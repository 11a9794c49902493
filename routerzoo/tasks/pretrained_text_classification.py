"""`PretrainedTextClassification`: labels of texts, from a model of transformers."""
# Shape suffixes: B texts, S tokens of the longest one, D model width, L labels.

from __future__ import annotations

from functools import partial
from typing import Any, Literal, final

from torch import Tensor, nn

from routerzoo.data.labelled_text import LabelledBatch
from routerzoo.routing import RoutingContext
from routerzoo.tasks.classification import accuracies
from routerzoo.tasks.pretrained import PretrainedTask
from routerzoo.tasks.text_classification import TextLabels


@final
class PretrainedTextClassification(TextLabels, PretrainedTask):
    """Text classification with a model of transformers: the task's loss is the mean cross-entropy, in nats.

    Reports `loss` and `accuracy`. A classifier that the model comes without starts from random weights.

    Args:
        source: see `PretrainedTask`.
        pooling: what is classified. `model` is what the architecture's own classifier takes
            (AutoModelForSequenceClassification: most encoders take the first token, decoders the last), and that
            classifier is part of `net.model`. `mean` is the mean of the last hidden states, as in sentence encoders.
        num_classes: number of labels; by default 2. From the command line it is the data's.
        label_smoothing: share of the target spread over all labels in training.
        arguments: those of `PretrainedTask`.

    Raises:
        UserError: an extra that is not installed; a model, a router or data that do not fit each other.
    """

    def __init__(
        self,
        source: str | dict[str, Any],
        *,
        pooling: Literal["model", "mean"] = "model",
        num_classes: int | None = None,
        label_smoothing: float = 0.0,
        **arguments: Any,
    ) -> None:
        self.num_classes = num_classes if num_classes is not None else 2
        self.pooling, self.label_smoothing = pooling, label_smoothing
        super().__init__(source, evaluation_metrics=partial(accuracies, self.num_classes), **arguments)
        if pooling == "mean":
            base = self.net.base
            if getattr(base, "pooler", None) is not None:
                base.pooler.requires_grad_(False)  # of the first token, which is not used
            self.classifier = nn.Linear(base.config.get_text_config().hidden_size, self.num_classes)
            nn.init.normal_(self.classifier.weight, std=0.02)
            nn.init.zeros_(self.classifier.bias)

    def build_net(self, source: str | dict[str, Any], max_length: int, **options: Any) -> Any:
        """Return a classifier of texts, or a model without one."""
        from transformers import AutoModel, AutoModelForSequenceClassification

        from routerzoo.hf.text_model import TextModel, build_text_model

        if self.pooling == "mean":
            return TextModel(build_text_model(source, AutoModel, **options), max_length)
        model = build_text_model(source, AutoModelForSequenceClassification, num_labels=self.num_classes, **options)
        return TextModel(model, max_length)

    def forward(self, batch: LabelledBatch, **progress: Any) -> tuple[Tensor, RoutingContext]:
        """Return the logits of labels, `[B, L]`, and the context with the routing of every MoE layer."""
        output, context = self.net(batch.ids_BS, padding_mask_BS=batch.padding_mask_BS, **progress)
        if self.pooling == "model":
            return output, context
        read_BS1 = (~batch.padding_mask_BS).unsqueeze(-1).to(output.dtype)
        mean_BD = (output * read_BS1).sum(1) / read_BS1.sum(1)
        return self.classifier(mean_BD), context
