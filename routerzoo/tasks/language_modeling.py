"""`LanguageModeling`: next-token prediction with a decoder-only Transformer."""
# Shape suffixes: B sequences, S tokens of a sequence, V vocabulary.

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from routerzoo.data.text import TextData, TextMetric
from routerzoo.data.tokens import IGNORED_TARGET, TextBatch
from routerzoo.models.blocks import MoEBlocks
from routerzoo.models.decoder import Decoder
from routerzoo.moe.experts import MLPExperts
from routerzoo.moe.grouped_linear import Backend
from routerzoo.moe.layer import ExpertsFactory, RouterFactory
from routerzoo.optim import WarmupCosine
from routerzoo.router import LossWeight
from routerzoo.routers import LinearRouter
from routerzoo.routing import RoutingContext
from routerzoo.tasks.base import MoETask, SchedulerFactory, allow_in_checkpoints


class Continuation(NamedTuple):
    """What `predict` gives for a prompt: its token ids and those sampled after it."""

    prompt_ids: list[int]
    sampled_ids: list[int]


def reported(loss: Tensor, metric: TextMetric) -> Tensor:
    """Turn a mean loss, in nats per token, into what papers report.

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


@final
class LanguageModeling(MoETask):
    """Language modelling: the task's loss is the mean cross-entropy of the next token, in nats.

    Reports `loss` and what papers report of it: `bpb` (bits per byte), `bpc` (bits per character), both `loss / ln 2`,
    or `ppl` (perplexity per token, `exp(loss)`).

    Args:
        vocab_size: number of token ids; by default 256. From the command line it is the data's.
        metric: what is reported beside the loss; by default `bpb`. From the command line it is the data's.
        max_length: longest sequence; by default 256. From the command line it is the data's `sequence_length`.
        num_tasks: number of corpora that sequences come from, for routers that look at them. From the command line it
            is the data's.
        router: the router of each MoE layer; by default `LinearRouter`.
        experts: the experts of each MoE layer; by default `MLPExperts`.
        num_experts: experts per MoE layer.
        num_shared_experts: experts per MoE layer that see every token.
        d_model: width of the hidden states.
        num_blocks: number of Transformer blocks.
        num_heads: attention heads.
        moe_blocks: which blocks have a MoE layer: `all`, `every-other`, `none` or a list of indices.
        dense_width: width of the other blocks' feed-forward network, in experts.
        dropout: probability of dropping an attention weight, or a channel of a residual branch, in training.
        tie_weights: use the token embedding as the output layer.
        rotary_base: base of the rotary wavelengths.
        activation_checkpointing: keep only the blocks' inputs and compute the rest again in the backward pass.
        backend: how the experts' products are computed; see `routerzoo.grouped_linear`.
        allow_non_causal: accept routers that look at later tokens.
        loss_weights: coefficient by auxiliary loss, instead of those that the router's authors use.
        eval_top_k: experts per token in validation, test and prediction; by default as in training. A list is
            evaluated one by one: from one checkpoint, quality against cost.
        initial_logit_std: scale each router so that its logits start with this standard deviation; for comparisons, in
            which a router whose logits start larger would look more certain.
        consistency: send each training batch through the model twice, and weigh the divergence of the two predictions
            with this, for routers (or dropout) that draw random numbers; 0 for one pass.
        optimizer: the optimiser.
        lr_scheduler: the learning-rate schedule; it is given the optimiser and the number of steps.
        predict_tokens: tokens that `predict` samples after a prompt.
        temperature: sampling temperature of `predict`; 0 takes the most likely token.
        top_p: `predict` samples from the most likely tokens that hold this share of the probability.
    """

    net: Decoder

    def __init__(
        self,
        vocab_size: int | None = None,
        metric: TextMetric | None = None,
        max_length: int | None = None,
        num_tasks: int | None = None,
        *,
        router: RouterFactory | None = None,
        experts: ExpertsFactory | None = None,
        num_experts: int = 16,
        num_shared_experts: int = 0,
        d_model: int = 256,
        num_blocks: int = 4,
        num_heads: int = 8,
        moe_blocks: MoEBlocks = "all",
        dense_width: int = 1,
        dropout: float = 0.0,
        tie_weights: bool = True,
        rotary_base: float = 10_000.0,
        activation_checkpointing: bool = False,
        backend: Backend = "auto",
        allow_non_causal: bool = False,
        loss_weights: dict[str, float | LossWeight] | None = None,
        eval_top_k: int | list[int] | None = None,
        initial_logit_std: float | None = None,
        consistency: float = 0.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: SchedulerFactory = WarmupCosine,
        predict_tokens: int = 200,
        temperature: float = 0.8,
        top_p: float = 0.95,
    ) -> None:
        metric = metric or "bpb"
        vocab_size = vocab_size if vocab_size is not None else 256
        net = Decoder(
            vocab_size,
            router or LinearRouter,
            experts or MLPExperts,
            num_experts=num_experts,
            num_shared_experts=num_shared_experts,
            d_model=d_model,
            num_blocks=num_blocks,
            num_heads=num_heads,
            moe_blocks=moe_blocks,
            dense_width=dense_width,
            max_length=max_length if max_length is not None else 256,
            dropout=dropout,
            tie_weights=tie_weights,
            rotary_base=rotary_base,
            num_tasks=num_tasks,
            activation_checkpointing=activation_checkpointing,
            backend=backend,
            allow_non_causal=allow_non_causal,
        )

        def evaluation_metrics() -> dict[str, Metric]:
            return {"loss": MeanMetric(), metric: MeanTextLoss(metric)}

        super().__init__(
            net,
            optimizer,
            lr_scheduler,
            loss_weights,
            eval_top_k,
            initial_logit_std,
            consistency,
            evaluation_metrics,
        )
        allow_in_checkpoints(router, experts, optimizer, lr_scheduler)
        self.save_hyperparameters()
        self.metric: TextMetric = metric
        self.vocab_size = vocab_size
        self.predict_tokens, self.temperature, self.top_p = predict_tokens, temperature, top_p

    @property
    def headline_metric(self) -> str:
        """Name of the metric that papers report."""
        return self.metric

    def baseline(self, datamodule: Any) -> tuple[str, float] | None:
        """Predict every token by its frequency in the training split."""
        if not isinstance(datamodule, TextData):
            return None
        return "unigram", float(reported(torch.tensor(datamodule.unigram_baseline("val")), self.metric))

    def token_counts(self) -> Tensor | None:
        """Count the token ids of the training split, where the data module can."""
        counts = getattr(getattr(self.trainer, "datamodule", None), "token_counts", None)
        return None if counts is None else torch.from_numpy(counts())

    def _predict(self, batch: TextBatch) -> tuple[Tensor, Tensor, RoutingContext]:
        """Return next-token logits `[B, S, V]`, the loss of each token `[B * S]`, 0 without target, and the context."""
        padding = batch.targets_BS == IGNORED_TARGET if not self.training else None
        padding = padding if padding is not None and padding.any() else None
        logits_BSV, context = self.net(
            batch.ids_BS,
            padding_mask_BS=padding,
            task_ids_B=batch.task_ids_B if self.net.num_tasks is not None else None,
            **(self.progress if self.training else {}),
        )
        losses_T = F.cross_entropy(
            logits_BSV.flatten(0, 1), batch.targets_BS.flatten(), ignore_index=IGNORED_TARGET, reduction="none"
        )
        return logits_BSV, losses_T, context

    def training_step(self, batch: TextBatch, batch_idx: int) -> Tensor:
        """Return the loss of a batch with its auxiliary losses."""
        losses, logits, auxiliary = [], [], torch.zeros((), device=self.device)
        has_target_T = batch.targets_BS.flatten() != IGNORED_TARGET
        for _ in range(self.passes):
            logits_BSV, losses_T, context = self._predict(batch)
            losses.append(losses_T.sum() / has_target_T.sum())
            logits.append(logits_BSV.flatten(0, 1))
            auxiliary = self.add_auxiliary_losses(auxiliary, context, losses_T)
        detached = torch.stack(losses).mean().detach()
        self.log_dict(
            {"train/loss": detached, f"train/{self.metric}": reported(detached, self.metric)},
            prog_bar=True,
            sync_dist=True,
        )
        return self.consistency_loss(losses, logits, has_target_T) + auxiliary

    def evaluate(self, batch: TextBatch, metrics: Mapping[str, Metric]) -> None:
        """Add a batch's tokens."""
        _, losses_T, _ = self._predict(batch)
        num_targets = (batch.targets_BS != IGNORED_TARGET).sum()
        for metric in metrics.values():
            metric.update(losses_T.sum() / num_targets, num_targets)

    def example(self) -> int:
        """Run the model on a sequence of full length."""
        length = int(self.net.max_length)
        ids_S = torch.randint(0, self.vocab_size, [length], generator=torch.Generator().manual_seed(0))
        self.net(ids_S.unsqueeze(0).to(self.device))
        return length

    def predict_step(self, batch: Tensor, batch_idx: int) -> list[Continuation]:
        """Sample a continuation of each prompt. The same seed gives the same text."""
        generator = torch.Generator(self.device).manual_seed(batch_idx)
        with self.override_top_k():
            stream = self.net.stream(batch, temperature=self.temperature, top_p=self.top_p, generator=generator)
            sampled_BS = torch.stack(list(itertools.islice(stream, self.predict_tokens)), dim=1)
        return [Continuation(p.tolist(), s.tolist()) for p, s in zip(batch, sampled_BS, strict=True)]
