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


def reported(loss: Tensor, metric: TextMetric, bytes_per_token: float = 1.0) -> Tensor:
    """Convert a mean loss, in nats per token, to the metric that papers report.

    `bpb` are bits per byte, `loss / ln 2` by the bytes for each token; `bpc` are bits per character, of characters that
    are tokens; `ppl` is perplexity per token, `exp(loss)`.
    """
    if metric == "ppl":
        return loss.exp()
    return loss / math.log(2) / (bytes_per_token if metric == "bpb" else 1.0)


@final
class MeanTextLoss(MeanMetric):
    """Mean loss over tokens, reported as `bpb`, `bpc` or `ppl`.

    Args:
        metric: what to report.
        bytes_per_token: of the text, for `bpb`.
    """

    def __init__(self, metric: TextMetric, bytes_per_token: float = 1.0) -> None:
        super().__init__()
        self.metric: TextMetric = metric
        self.bytes_per_token = bytes_per_token

    def compute(self) -> Tensor:
        """Report the mean."""
        return reported(super().compute(), self.metric, self.bytes_per_token)


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
    _trained_bytes = 1.0

    @property
    def headline_metric(self) -> str:
        """Name of the metric that papers report."""
        return self.metric

    def baseline(self, datamodule: Any) -> tuple[str, float] | None:
        """Predict every token by its frequency in the training split."""
        if not isinstance(datamodule, TextData):
            return None
        loss = torch.tensor(datamodule.unigram_baseline("val"))
        return "unigram", float(reported(loss, self.metric, self._bytes_per_token(datamodule, "val")))

    def setup(self, stage: str) -> None:
        """Refuse what the model cannot do.

        Raises:
            UserError: generation where no process has the whole model.
        """
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and self.metric == "bpb":
            self._trained_bytes = self._bytes_per_token(data, "train")
        for metrics in self.evaluated.children():
            assert isinstance(metrics, torch.nn.ModuleDict)
            known = self.metric == "ppl" and hasattr(data, "bytes_per_token")
            if known and "bpb" not in metrics:
                metrics["bpb"] = MeanTextLoss("bpb").to(self.device)
            elif self.metric == "ppl" and not known and "bpb" in metrics:
                del metrics["bpb"]
        if stage == "predict" and self._device_mesh is not None:
            raise UserError(
                "a sharded model cannot generate: predict with trainer.devices 1 and trainer.strategy auto, which read "
                "the same checkpoint"
            )

    def predict_batch(self, batch: TextBatch) -> Prediction:
        """Predict each next token."""
        counted_N = batch.targets_BS.flatten() != IGNORED_TARGET
        padding_BS = None if self.training or counted_N.all() else ~counted_N.view_as(batch.targets_BS)
        packed = (
            {"sequence_ids_BS": batch.sequence_ids_BS, "attend_across": batch.attend_across}
            if batch.sequence_ids_BS is not None
            else {}
        )
        logits_BSV, context = self.net(
            batch.ids_BS,
            padding_mask_BS=padding_BS,
            task_ids_B=batch.task_ids_B if self.net.num_tasks is not None else None,
            **packed,
            **(self.progress if self.training else {}),
        )
        logits_TV = in_full_precision(logits_BSV).flatten(0, 1)
        losses_T = F.cross_entropy(logits_TV, batch.targets_BS.flatten(), ignore_index=IGNORED_TARGET, reduction="none")
        return Prediction(logits_TV, losses_T.sum() / counted_N.sum(), losses_T, context, counted_N)

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics, and count the bytes of the split's tokens."""
        super().on_validation_epoch_start()
        self._count_bytes("val")

    def on_test_epoch_start(self) -> None:
        """Reset the metrics, and count the bytes of the split's tokens."""
        super().on_validation_epoch_start()
        self._count_bytes("test")

    def _count_bytes(self, split: str) -> None:
        for metrics in self.evaluated.children():
            if "bpb" in metrics:  # type: ignore[operator]
                data: Any = getattr(self.trainer, "datamodule", None)
                metrics["bpb"].bytes_per_token = self._bytes_per_token(data, split)  # type: ignore[index]

    def _bytes_per_token(self, data: Any, split: str) -> float:
        return float(data.bytes_per_token(split)) if hasattr(data, "bytes_per_token") else 1.0

    def training_metrics(self, batch: TextBatch, prediction: Prediction, loss: Tensor) -> dict[str, Tensor]:
        """Return what papers report of the loss."""
        return {self.metric: reported(loss, self.metric, self._trained_bytes)}

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
    or `ppl` (perplexity per token, `exp(loss)`). Beside `ppl`, evaluations report `bpb` too, which compares tokenizers:
    `loss / ln 2` by the bytes of the split's text for each token that is predicted.

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
