"""`ImageClassification`: image classification with a vision transformer."""
# Shape suffixes: B images, C channels, L classes, T tokens.

from __future__ import annotations

from functools import partial
from typing import Any, final

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from routerzoo.data.images import ImageBatch
from routerzoo.models.vit import ViTMoE
from routerzoo.moe.experts import MLPExperts
from routerzoo.moe.layer import ExpertsFactory, RouterFactory
from routerzoo.optim import WarmupCosine
from routerzoo.router import LossWeight
from routerzoo.routers import LinearRouter
from routerzoo.routing import RoutingContext
from routerzoo.tasks.base import SchedulerFactory
from routerzoo.tasks.classification import Classification, accuracies
from routerzoo.tasks.factories import plain_factory

FITTED_IMAGES = 512
"""Images of the training split that patch ids are fitted to."""


@final
class ImageClassification(Classification):
    """Image classification: the task's loss is the mean cross-entropy, in nats. Reports `loss`, `accuracy` and `top5`.

    Args:
        num_classes: number of classes; by default 10. From the command line it is the data's.
        image_size: height and width of the images; by default the backbone's. From the command line it is the data's.
        in_channels: channels of the images; by default 3. From the command line it is the data's.
        backbone: name of a timm vision transformer.
        router: the router of each MoE layer; by default `LinearRouter`.
        experts: the experts of each MoE layer; by default `MLPExperts`.
        label_smoothing: share of the target spread over all classes in training.
        loss_weights: see `MoETask`; likewise the arguments that follow.
        eval_top_k: see `MoETask`.
        initial_logit_std: see `MoETask`.
        consistency: see `MoETask`.
        optimizer: see `MoETask`.
        lr_scheduler: see `MoETask`.
        model: further arguments of `routerzoo.models.vit.ViTMoE`.
    """

    net: ViTMoE

    def __init__(
        self,
        num_classes: int | None = None,
        image_size: int | None = None,
        in_channels: int | None = None,
        *,
        backbone: str = "vit_tiny_patch16_224",
        router: RouterFactory | None = None,
        experts: ExpertsFactory | None = None,
        label_smoothing: float = 0.0,
        loss_weights: dict[str, float | LossWeight] | None = None,
        eval_top_k: int | list[int] | None = None,
        initial_logit_std: float | None = None,
        consistency: float = 0.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: SchedulerFactory | None = WarmupCosine,
        **model: Any,
    ) -> None:
        num_classes = num_classes if num_classes is not None else 10
        net = ViTMoE(
            backbone,
            num_classes,
            plain_factory(LinearRouter if router is None else router),
            plain_factory(MLPExperts if experts is None else experts),
            image_size=image_size,
            in_channels=in_channels if in_channels is not None else 3,
            **model,
        )
        super().__init__(
            net,
            partial(accuracies, num_classes, top5=True),
            loss_weights=loss_weights,
            eval_top_k=eval_top_k,
            initial_logit_std=initial_logit_std,
            consistency=consistency,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
        )
        self.num_classes, self.label_smoothing = num_classes, label_smoothing

    def setup(self, stage: str) -> None:
        """Fit the patch ids to images of the training split; a resumed run has those of its checkpoint."""
        super().setup(stage)
        if stage == "fit" and self.net.patch_ids is not None and (images_BCHW := self._training_images()) is not None:
            self.net.patch_ids.fit_token_counts(images_BCHW, torch.Generator().manual_seed(0))

    def token_counts(self) -> Tensor | None:
        """Count the patch ids of some images of the training split."""
        images_BCHW = None if self.net.patch_ids is None else self._training_images()
        if images_BCHW is None:
            return None
        ids_T = self.net.token_ids(images_BCHW)
        assert ids_T is not None  # there are patch ids
        return torch.bincount(ids_T, minlength=self.net.vocab_size or 0)

    def _training_images(self) -> Tensor | None:
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is None:
            return None
        batches: list[Tensor] = []
        for batch in datamodule.train_dataloader():
            batches.append(batch.images_BCHW)
            if sum(map(len, batches)) >= FITTED_IMAGES:
                break
        return torch.cat(batches)[:FITTED_IMAGES].to(self.device)

    def forward(self, batch: ImageBatch, **progress: Any) -> tuple[Tensor, RoutingContext]:
        """Return class logits, `[B, L]`, and the context with the routing of every MoE layer."""
        return self.net(batch.images_BCHW, **progress)  # type: ignore[no-any-return]

    def example(self, count: int = 1) -> int:
        """Run the model on images."""
        generator = torch.Generator().manual_seed(0)
        images_BCHW = torch.randn(count, self.net.in_channels, *self.net.image_size, generator=generator)
        _, context = self.net(images_BCHW.to(self.device))
        assert context.positions is not None  # the net fills them in
        return len(context.positions)
