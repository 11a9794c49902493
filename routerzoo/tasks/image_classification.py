"""`ImageClassification`: image classification with a vision transformer."""
# Shape suffixes: B images, L classes.

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from routerzoo.data.images import ImageBatch, ImageData
from routerzoo.errors import UserError
from routerzoo.models.blocks import MoEBlocks
from routerzoo.models.patch_ids import PatchIdKind
from routerzoo.models.vit import ViTMoE
from routerzoo.moe.experts import MLPExperts
from routerzoo.moe.grouped_linear import Backend
from routerzoo.moe.layer import ExpertsFactory, RouterFactory
from routerzoo.optim import WarmupCosine
from routerzoo.router import LossWeight
from routerzoo.routers import LinearRouter
from routerzoo.tasks.base import MoETask, SchedulerFactory, allow_in_checkpoints

CALIBRATION_IMAGES = 512


class ClassPredictions(NamedTuple):
    """What `predict` gives for a batch: `probs_BL` class probabilities; `labels_B` the true labels, where known."""

    probs_BL: Tensor
    labels_B: Tensor | None


@final
class ImageClassification(MoETask):
    """Image classification: the task's loss is the mean cross-entropy, in nats. Reports `loss`, `accuracy` and `top5`.

    Args:
        num_classes: number of classes; by default 10. From the command line it is the data's.
        image_size: height and width of the images; by default the backbone's. From the command line it is the data's.
        in_channels: channels of the images; by default 3. From the command line it is the data's.
        backbone: name of a timm vision transformer.
        pretrained: start from timm's pretrained weights, and every expert from the MLP it replaces (sparse upcycling).
        backbone_arguments: further arguments of `timm.create_model`, such as `depth`, `embed_dim` or `patch_size`.
        router: the router of each MoE layer; by default `LinearRouter`.
        experts: the experts of each MoE layer; by default `MLPExperts`.
        num_experts: experts per MoE layer.
        num_shared_experts: experts per MoE layer that see every token.
        moe_blocks: which blocks have a MoE layer: `all`, `every-other`, `none` or a list of indices.
        patch_ids: what the token id of an image patch is, for routers that route by it: `position`, `lsh` or
            `codebook`.
        num_patch_ids: number of patch ids for `lsh` (a power of 2) and `codebook`.
        label_smoothing: share of the target spread over all classes in training.
        activation_checkpointing: keep only the blocks' inputs and compute the rest again in the backward pass.
        backend: how the experts' products are computed; see `routerzoo.grouped_linear`.
        loss_weights: coefficient by auxiliary loss, instead of those that the router's authors use.
        eval_top_k: experts per token in validation, test and prediction; by default as in training. A list is
            evaluated one by one: from one checkpoint, quality against cost.
        initial_logit_std: scale each router so that its logits start with this standard deviation; for comparisons, in
            which a router whose logits start larger would look more certain.
        consistency: send each training batch through the model twice, and weigh the divergence of the two predictions
            with this, for routers (or dropout) that draw random numbers; 0 for one pass.
        optimizer: the optimiser.
        lr_scheduler: the learning-rate schedule; it is given the optimiser and the number of steps.
    """

    headline_higher_is_better = True
    net: ViTMoE

    def __init__(
        self,
        num_classes: int | None = None,
        image_size: int | None = None,
        in_channels: int | None = None,
        *,
        backbone: str = "vit_tiny_patch16_224",
        pretrained: bool = False,
        backbone_arguments: dict[str, Any] | None = None,
        router: RouterFactory | None = None,
        experts: ExpertsFactory | None = None,
        num_experts: int = 8,
        num_shared_experts: int = 0,
        moe_blocks: MoEBlocks = "every-other",
        patch_ids: PatchIdKind | None = None,
        num_patch_ids: int = 256,
        label_smoothing: float = 0.0,
        activation_checkpointing: bool = False,
        backend: Backend = "auto",
        loss_weights: dict[str, float | LossWeight] | None = None,
        eval_top_k: int | list[int] | None = None,
        initial_logit_std: float | None = None,
        consistency: float = 0.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: SchedulerFactory = WarmupCosine,
    ) -> None:
        num_classes = num_classes if num_classes is not None else 10
        net = ViTMoE(
            backbone,
            num_classes,
            router or LinearRouter,
            experts or MLPExperts,
            num_experts=num_experts,
            num_shared_experts=num_shared_experts,
            moe_blocks=moe_blocks,
            image_size=image_size,
            in_channels=in_channels if in_channels is not None else 3,
            pretrained=pretrained,
            backbone_arguments=backbone_arguments,
            patch_ids=patch_ids,
            num_patch_ids=num_patch_ids,
            activation_checkpointing=activation_checkpointing,
            backend=backend,
        )

        def evaluation_metrics() -> dict[str, Metric]:
            top5 = MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes))
            return {"loss": MeanMetric(), "accuracy": MulticlassAccuracy(num_classes, average="micro"), "top5": top5}

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
        self.num_classes, self.label_smoothing = num_classes, label_smoothing

    @property
    def headline_metric(self) -> str:
        """Name of the metric that papers report."""
        return "accuracy"

    def baseline(self, datamodule: Any) -> tuple[str, float] | None:
        """Predict the most frequent class of the training split."""
        if not isinstance(datamodule, ImageData):
            return None
        return "most frequent class", datamodule.most_frequent_class_accuracy("val")

    def setup(self, stage: str) -> None:
        """Fit the patch ids to training images, then fit_token_counts the routers."""
        datamodule = getattr(self.trainer, "datamodule", None)
        classes = getattr(datamodule, "num_classes", self.num_classes)
        if classes != self.num_classes:
            raise UserError(
                f"the data has {classes} classes, the model {self.num_classes}: set num_classes to {classes}"
            )
        super().setup(stage)

    def token_counts(self) -> Tensor | None:
        """Fit the patch ids, and count them in the images they were fitted to."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if self.net.patch_ids is None or datamodule is None:
            return None
        batches = []
        for batch in datamodule.train_dataloader():
            batches.append(batch.images_BCHW)
            if sum(map(len, batches)) >= CALIBRATION_IMAGES:
                break
        images_BCHW = torch.cat(batches)[:CALIBRATION_IMAGES].to(self.device)
        self.net.patch_ids.fit_token_counts(images_BCHW, torch.Generator().manual_seed(0))
        ids = self.net.token_ids(images_BCHW)
        assert ids is not None  # there are patch ids
        return torch.bincount(ids, minlength=self.net.vocab_size or 0)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Return the loss of a batch with its auxiliary losses."""
        losses, logits, auxiliary = [], [], torch.zeros((), device=self.device)
        for _ in range(self.passes):
            logits_BL, context = self.net(batch.images_BCHW, **self.progress)
            losses_B = F.cross_entropy(
                logits_BL, batch.labels_B, label_smoothing=self.label_smoothing, reduction="none"
            )
            assert context.sequence_ids is not None  # the net fills them in
            auxiliary = self.add_auxiliary_losses(auxiliary, context, losses_B.index_select(0, context.sequence_ids))
            losses.append(losses_B.mean())
            logits.append(logits_BL)
        accuracy = (logits[0].argmax(-1) == batch.labels_B).float().mean()
        self.log_dict(
            {"train/loss": torch.stack(losses).mean().detach(), "train/accuracy": accuracy},
            prog_bar=True,
            sync_dist=True,
        )
        return self.consistency_loss(losses, logits) + auxiliary

    def evaluate(self, batch: ImageBatch, metrics: Mapping[str, Metric]) -> None:
        """Add a batch's images."""
        logits_BL, _ = self.net(batch.images_BCHW)
        for name, metric in metrics.items():
            if name == "loss":
                metric.update(F.cross_entropy(logits_BL, batch.labels_B), len(batch.labels_B))
            else:
                metric.update(logits_BL, batch.labels_B)

    def example(self) -> int:
        """Run the model on one image."""
        generator = torch.Generator().manual_seed(0)
        images_BCHW = torch.randn(1, self.net.in_channels, *self.net.image_size, generator=generator)
        _, context = self.net(images_BCHW.to(self.device))
        assert context.positions is not None  # the net fills them in
        return len(context.positions)

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> ClassPredictions:
        """Return the class probabilities of a batch."""
        with self.override_top_k():
            logits_BL, _ = self.net(batch.images_BCHW)
        return ClassPredictions(logits_BL.float().softmax(-1), batch.labels_B)
