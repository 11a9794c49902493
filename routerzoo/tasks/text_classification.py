"""`TextClassification`: labels of texts, from the last hidden state of a decoder."""
# Shape suffixes: B texts, S bytes of the longest one, D model width, L labels, T tokens.

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from routerzoo.data.labelled_text import LabelledBatch, LabelledText
from routerzoo.errors import UserError
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
from routerzoo.tasks.image_classification import ClassPredictions


@final
class TextClassification(MoETask):
    """Text classification: the task's loss is the mean cross-entropy, in nats. Reports `loss` and `accuracy`.

    The model is the decoder of `LanguageModeling`, with a linear classifier of the hidden state at each text's last
    byte. Its weights have the names that they have there, so that `FineTune` starts from a language model's checkpoint:

        --config configs/schedules/from-a-language-model.yaml --trainer.callbacks.checkpoint best.ckpt

    Args:
        num_classes: number of labels; by default 2. From the command line it is the data's.
        vocab_size: number of token ids; by default 256. From the command line it is the data's.
        max_length: longest sequence; by default 256. From the command line it is the data's `sequence_length`.
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
        tie_weights: as the language model had it.
        rotary_base: base of the rotary wavelengths.
        activation_checkpointing: keep only the blocks' inputs and compute the rest again in the backward pass.
        backend: how the experts' products are computed; see `routerzoo.grouped_linear`.
        allow_non_causal: accept routers that look at later tokens: a text is known to its end.
        label_smoothing: share of the target spread over all labels in training.
        loss_weights: coefficient by auxiliary loss, instead of those that the router's authors use.
        eval_top_k: experts per token in validation, test and prediction; by default as in training. A list is
            evaluated one by one.
        initial_logit_std: scale each router so that its logits start with this standard deviation.
        consistency: send each training batch through the model twice, and weigh the divergence of the two predictions
            with this; 0 for one pass.
        optimizer: the optimiser.
        lr_scheduler: the learning-rate schedule; it is given the optimiser and the number of steps.
    """

    headline_higher_is_better = True
    net: Decoder

    def __init__(
        self,
        num_classes: int | None = None,
        vocab_size: int | None = None,
        max_length: int | None = None,
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
        label_smoothing: float = 0.0,
        loss_weights: dict[str, float | LossWeight] | None = None,
        eval_top_k: int | list[int] | None = None,
        initial_logit_std: float | None = None,
        consistency: float = 0.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: SchedulerFactory = WarmupCosine,
    ) -> None:
        num_classes = num_classes if num_classes is not None else 2
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
            activation_checkpointing=activation_checkpointing,
            backend=backend,
            allow_non_causal=allow_non_causal,
        )

        def evaluation_metrics() -> dict[str, Metric]:
            return {"loss": MeanMetric(), "accuracy": MulticlassAccuracy(num_classes, average="micro")}

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
        self.num_classes, self.vocab_size, self.label_smoothing = num_classes, vocab_size, label_smoothing
        self.classifier = nn.Linear(d_model, num_classes)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)
        if not tie_weights:
            net.head.requires_grad_(False)  # it predicts bytes, which nobody asks for here

    @property
    def headline_metric(self) -> str:
        """Name of the metric that papers report."""
        return "accuracy"

    def baseline(self, datamodule: Any) -> tuple[str, float] | None:
        """Predict the most frequent label of the training split."""
        if not isinstance(datamodule, LabelledText):
            return None
        return "most frequent class", datamodule.most_frequent_class_accuracy("val")

    def setup(self, stage: str) -> None:
        """Refuse data with other labels, then fit_token_counts the routers."""
        datamodule = getattr(self.trainer, "datamodule", None)
        classes = getattr(datamodule, "num_classes", self.num_classes)
        if classes != self.num_classes:
            raise UserError(
                f"the data has {classes} classes, the model {self.num_classes}: set num_classes to {classes}"
            )
        super().setup(stage)

    def token_counts(self) -> Tensor | None:
        """Count the bytes of the training split, where the data module can."""
        counts = getattr(getattr(self.trainer, "datamodule", None), "token_counts", None)
        return None if counts is None else torch.from_numpy(counts())

    def forward(self, batch: LabelledBatch, **progress: Any) -> tuple[Tensor, RoutingContext]:
        """Return the logits of labels, `[B, L]`, and the context with the routing of every MoE layer."""
        x_BSD, context = self.net.hidden(batch.ids_BS, padding_mask_BS=batch.padding_mask_BS, **progress)
        last_B = (~batch.padding_mask_BS).sum(1).clamp_min(1) - 1
        last_BD = x_BSD[torch.arange(len(last_B), device=last_B.device), last_B]
        return self.classifier(last_BD), context

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor:
        """Return the loss of a batch with its auxiliary losses."""
        losses, logits, auxiliary = [], [], torch.zeros((), device=self.device)
        for _ in range(self.passes):
            logits_BL, context = self(batch, **self.progress)
            losses_B = F.cross_entropy(
                logits_BL, batch.labels_B, label_smoothing=self.label_smoothing, reduction="none"
            )
            assert context.sequence_ids is not None  # the net fills them in
            token_losses_T = losses_B.index_select(0, context.sequence_ids)
            token_losses_T = token_losses_T.masked_fill(batch.padding_mask_BS.flatten(), 0.0)
            auxiliary = self.add_auxiliary_losses(auxiliary, context, token_losses_T)
            losses.append(losses_B.mean())
            logits.append(logits_BL)
        accuracy = (logits[0].argmax(-1) == batch.labels_B).float().mean()
        self.log_dict(
            {"train/loss": torch.stack(losses).mean().detach(), "train/accuracy": accuracy},
            prog_bar=True,
            sync_dist=True,
        )
        return self.consistency_loss(losses, logits) + auxiliary

    def evaluate(self, batch: LabelledBatch, metrics: Mapping[str, Metric]) -> None:
        """Add a batch's texts."""
        logits_BL, _ = self(batch)
        for name, metric in metrics.items():
            if name == "loss":
                metric.update(F.cross_entropy(logits_BL, batch.labels_B), len(batch.labels_B))
            else:
                metric.update(logits_BL, batch.labels_B)

    def example(self) -> int:
        """Run the model on a text of full length."""
        length = int(self.net.max_length)
        ids_S = torch.randint(0, self.vocab_size, [length], generator=torch.Generator().manual_seed(0))
        self.net.hidden(ids_S.unsqueeze(0).to(self.device))
        return length

    def predict_step(self, batch: LabelledBatch, batch_idx: int) -> ClassPredictions:
        """Return the class probabilities of a batch."""
        with self.override_top_k():
            logits_BL, _ = self(batch)
        return ClassPredictions(logits_BL.float().softmax(-1), batch.labels_B)
