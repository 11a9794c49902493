"""`LanguageModeling`: next-token prediction with a decoder-only Transformer."""
# Shape suffixes: B sequences, S tokens of a sequence, T tokens of a batch, N rows, V vocabulary.

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from routerzoo.data.text import TextData, TextMetric
from routerzoo.data.tokens import IGNORED_TARGET, TextBatch
from routerzoo.errors import UserError
from routerzoo.tasks.base import Prediction, in_full_precision
from routerzoo.tasks.decoder import DecoderTask, TextTask


class Continuation(NamedTuple):
    """What `predict` returns for a prompt: its token ids and those sampled after it."""

    prompt_ids: list[int]
    sampled_ids: list[int]


def reported(loss: Tensor, metric: TextMetric) -> Tensor:
    """Convert a mean loss, in nats per token, to the metric that papers report.

    `bpb` and `bpc` are bits per byte and per character, `loss / ln 2`; `ppl` is perplexity per token, `exp(loss)`.
    """
    return loss.exp() if metric == "ppl" else loss / math.log(2)


@final
class MeanTextLoss(MeanMetric):
    """Mean loss over tokens, reported as `bpb`, `bpc` or `ppl`."""

    def __init__(self, metric: TextMetric) -> None:
        super().__init__()
        self.metric: TextMetric = metric

    def compute(self) -> Tensor:
        """Report the mean."""
        return reported(super().compute(), self.metric)


class NextTokenPrediction(TextTask):
    """Predicts each next token; the loss is its mean cross-entropy, in nats.

    Attributes:
        metric: what is reported beside the loss.
        predict_tokens: tokens that `predict` samples after a prompt.
        temperature: sampling temperature of `predict`.
        top_p: `predict` samples from the most likely tokens that hold this share of the probability.
    """

    metric: TextMetric
    predict_tokens: int
    temperature: float
    top_p: float

    @property
    def headline_metric(self) -> str:
        """Name of the metric that papers report."""
        return self.metric

    def baseline(self, datamodule: Any) -> tuple[str, float] | None:
        """Predict every token by its frequency in the training split."""
        if not isinstance(datamodule, TextData):
            return None
        return "unigram", float(reported(torch.tensor(datamodule.unigram_baseline("val")), self.metric))

    def setup(self, stage: str) -> None:
        """Refuse to generate where no process will have the whole model.

        Raises:
            UserError: a sharded model.
        """
        super().setup(stage)
        if stage == "predict" and self._device_mesh is not None:
            raise UserError(
                "a sharded model cannot generate: predict with trainer.devices 1 and trainer.strategy auto, which read "
                "the same checkpoint"
            )

    def predict_batch(self, batch: TextBatch) -> Prediction:
        """Predict each next token."""
        counted_N = batch.targets_BS.flatten() != IGNORED_TARGET
        padding_BS = None if self.training or counted_N.all() else ~counted_N.view_as(batch.targets_BS)
        logits_BSV, context = self.net(
            batch.ids_BS,
            padding_mask_BS=padding_BS,
            task_ids_B=batch.task_ids_B if self.net.num_tasks is not None else None,
            **(self.progress if self.training else {}),
        )
        logits_TV = in_full_precision(logits_BSV).flatten(0, 1)
        losses_T = F.cross_entropy(logits_TV, batch.targets_BS.flatten(), ignore_index=IGNORED_TARGET, reduction="none")
        return Prediction(logits_TV, losses_T.sum() / counted_N.sum(), losses_T, context, counted_N)

    def training_metrics(self, batch: TextBatch, prediction: Prediction, loss: Tensor) -> dict[str, Tensor]:
        """Return what papers report of the loss."""
        return {self.metric: reported(loss, self.metric)}

    def evaluate(self, batch: TextBatch, metrics: Mapping[str, Metric]) -> None:
        """Add a batch's tokens."""
        prediction = self.predict_batch(batch)
        assert prediction.counted_N is not None
        for metric in metrics.values():
            metric.update(prediction.loss, prediction.counted_N.sum())

    def predict_step(self, batch: Tensor, batch_idx: int) -> list[Continuation]:
        """Sample a continuation of each prompt. The same seed gives the same text."""
        generator = torch.Generator(self.device).manual_seed(batch_idx)
        with self.override_top_k():
            stream = self.net.stream(batch, temperature=self.temperature, top_p=self.top_p, generator=generator)
            sampled_BS = torch.stack(list(itertools.islice(stream, self.predict_tokens)), dim=1)
        return [Continuation(p.tolist(), s.tolist()) for p, s in zip(batch, sampled_BS, strict=True)]


@final
class LanguageModeling(NextTokenPrediction, DecoderTask):
    """Language modeling: the task's loss is the mean cross-entropy of the next token, in nats.

    Reports `loss` and what papers report of it: `bpb` (bits per byte), `bpc` (bits per character), both `loss / ln 2`,
    or `ppl` (perplexity per token, `exp(loss)`).

    Args:
        metric: what is reported beside the loss; by default `bpb`. From the command line it is the data's.
        predict_tokens: tokens that `predict` samples after a prompt.
        temperature: sampling temperature of `predict`; 0 takes the most likely token.
        top_p: `predict` samples from the most likely tokens that hold this share of the probability.
        arguments: those of `DecoderTask` and `Decoder`.
    """

    def __init__(
        self,
        metric: TextMetric | None = None,
        *,
        predict_tokens: int = 200,
        temperature: float = 0.8,
        top_p: float = 0.95,
        **arguments: Any,
    ) -> None:
        self.metric: TextMetric = metric or "bpb"
        super().__init__(evaluation_metrics=partial(text_metrics, self.metric), **arguments)
        self.predict_tokens, self.temperature, self.top_p = predict_tokens, temperature, top_p


def text_metrics(metric: TextMetric) -> dict[str, Metric]:
    """Build the metrics of an evaluation."""
    return {"loss": MeanMetric(), metric: MeanTextLoss(metric)}
