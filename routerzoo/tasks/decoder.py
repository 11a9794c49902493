"""`TextTask`, the base class of tasks on text, and `DecoderTask`, of those that train a `Decoder`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torchmetrics import Metric

from routerzoo.errors import UserError
from routerzoo.models.decoder import Decoder
from routerzoo.moe.experts import MLPExperts
from routerzoo.moe.layer import ExpertsFactory, RouterFactory
from routerzoo.optim import WarmupCosine
from routerzoo.router import LossWeight
from routerzoo.routers import LinearRouter
from routerzoo.tasks.base import MoETask, SchedulerFactory
from routerzoo.tasks.factories import plain_factory


class TextTask(MoETask):
    """Trains a model that is called with token ids.

    Attributes:
        net: a `Decoder`, or what is called as one is.
        vocab_size: number of token ids that the data may hold.
    """

    net: Any
    vocab_size: int
    _tokenizer: str | None = None
    """Digest of the tokenizer that it was trained with; None where the checkpoint has none."""

    def setup(self, stage: str) -> None:
        """Refuse data with other tokens.

        Raises:
            UserError: token ids that the model does not have, or that mean something else.
        """
        super().setup(stage)
        self._check_tokenizer()
        data = self._data
        if (ids := getattr(data, "vocab_size", None)) is not None and ids > self.vocab_size:
            raise UserError(
                f"the tokenizer {getattr(data, 'tokenizer', 'of the data')} has {ids} token ids, and the model only "
                f"{self.vocab_size}: set the model's vocab_size to {ids}, or choose the tokenizer that it was built for"
            )

    @property
    def _data(self) -> Any:
        return None if self._trainer is None else getattr(self._trainer, "datamodule", None)

    def _check_tokenizer(self) -> None:
        digest = getattr(self._data, "tokenizer_digest", None)
        if None not in (digest, self._tokenizer) and digest != self._tokenizer:
            raise UserError(
                f"the checkpoint was trained with another tokenizer than {self._data.tokenizer}, or with other words: "
                "take the same (data.tokenizer)"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what token ids mean."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["tokenizer"] = getattr(self._data, "tokenizer_digest", self._tokenizer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse data whose token ids mean something else.

        Raises:
            UserError: they do; see `MoETask` too.
        """
        self._tokenizer = checkpoint.get("tokenizer")
        self._check_tokenizer()
        super().on_load_checkpoint(checkpoint)

    def token_counts(self) -> Tensor | None:
        """Count the token ids of the training split, where the data module can."""
        counts = getattr(self._data, "token_counts", None)
        return None if counts is None else torch.from_numpy(counts())

    def example(self, count: int = 1) -> int:
        """Run the model on sequences of full length."""
        length = int(self.net.max_length)
        ids_BS = torch.randint(0, self.vocab_size, [count, length], generator=torch.Generator().manual_seed(0))
        self.net(ids_BS.to(self.device))
        return count * length


class DecoderTask(TextTask):
    """Trains a decoder-only Transformer.

    Args:
        evaluation_metrics: see `MoETask`.
        vocab_size: number of token ids; by default 256. From the command line it is the data's.
        max_length: longest sequence; by default 256. From the command line it is the data's `sequence_length`.
        num_tasks: number of corpora that sequences come from, for routers that look at them. From the command line it
            is the data's.
        router: the router of each MoE layer; by default `LinearRouter`.
        experts: the experts of each MoE layer; by default `MLPExperts`.
        loss_weights: see `MoETask`; likewise the arguments that follow.
        eval_top_k: see `MoETask`.
        initial_logit_std: see `MoETask`.
        consistency: see `MoETask`.
        optimizer: see `MoETask`.
        lr_scheduler: see `MoETask`.
        model: further arguments of `routerzoo.models.decoder.Decoder`.
    """

    net: Decoder

    def __init__(
        self,
        evaluation_metrics: Callable[[], dict[str, Metric]],
        *,
        vocab_size: int | None = None,
        max_length: int | None = None,
        num_tasks: int | None = None,
        router: RouterFactory | None = None,
        experts: ExpertsFactory | None = None,
        loss_weights: dict[str, float | LossWeight] | None = None,
        eval_top_k: int | list[int] | None = None,
        initial_logit_std: float | None = None,
        consistency: float = 0.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: SchedulerFactory | None = WarmupCosine,
        **model: Any,
    ) -> None:
        self.vocab_size = vocab_size if vocab_size is not None else 256
        net = Decoder(
            self.vocab_size,
            plain_factory(LinearRouter if router is None else router),
            plain_factory(MLPExperts if experts is None else experts),
            max_length=max_length if max_length is not None else 256,
            num_tasks=num_tasks,
            **model,
        )
        super().__init__(
            net,
            evaluation_metrics,
            loss_weights=loss_weights,
            eval_top_k=eval_top_k,
            initial_logit_std=initial_logit_std,
            consistency=consistency,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
        )
