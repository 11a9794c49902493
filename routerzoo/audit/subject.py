"""`Subject`: a model with the data that its routing is audited on."""
# Shape suffixes: B sequences or images, S tokens of one, T tokens, L labels.

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from routerzoo.data.images import ImageBatch
from routerzoo.data.tokens import TextBatch
from routerzoo.errors import UserError
from routerzoo.moe.layer import moe_layers
from routerzoo.tasks.base import MoETask, in_full_precision
from routerzoo.tasks.classification import Classification
from routerzoo.tasks.language_modeling import NextTokenPrediction


class Losses(NamedTuple):
    """Loss of each sequence or image: the sum over what it predicts, in nats, and how many predictions those are."""

    sums_B: Tensor
    counts_B: Tensor


@dataclass
class Subject:
    """A model with data.

    Args:
        name: what the model is called.
        data: what the data is called.
        net: holds the MoE layers.
        batches: what is audited, at least one batch.
        losses: runs the model on a batch, in evaluation, and returns its losses; None for a model without a loss.
        token_ids: ids of a batch's tokens; None where tokens have none.
        groups: the document, corpus or class of each sequence or image of a batch; None where unknown.
        group_kind: what these are.
        group_names: their names.
        token_name: the text of a token id.
        batch_first: whether tokens that come to a layer without sequence ids are in the order of their sequences or
            images, equally many of each.

    Raises:
        UserError: no MoE layer, or no data.
    """

    name: str
    data: str
    net: nn.Module
    batches: Sequence[Any]
    losses: Callable[[Any], Losses | None]
    token_ids: Callable[[Any], Tensor | None] = lambda batch: None
    groups: Callable[[Any], Tensor | None] = lambda batch: None
    group_kind: str = "document"
    group_names: Sequence[str] = ()
    token_name: Callable[[int], str] = str
    batch_first: bool = False
    left_out: list[str] = field(default_factory=list)
    """What is known beforehand not to be measured, and why."""

    def __post_init__(self) -> None:
        if not any(True for _ in moe_layers(self.net)):
            raise UserError(f"there is no routing to audit: {self.name} has no MoE layer, it is a dense model")
        if not len(self.batches):
            raise UserError(f"there is nothing to audit {self.name} on: {self.data} has no tokens")


def subject_of_task(
    task: MoETask, datamodule: Any, *, name: str, split: str = "test", num_batches: int = 20, device: Any = None
) -> Subject:
    """Return a task of routerzoo with batches of samples from all of a split of its data, `val` or `test`.

    Raises:
        UserError: a task of another kind than language modeling and classification, no MoE layer, or no data.
    """
    if not isinstance(task, (NextTokenPrediction, Classification)):
        raise UserError(f"an audit reads language modeling and classification, not {type(task).__name__}")
    datamodule.prepare_data()
    datamodule.setup("test" if split == "test" else "validate")
    loader = datamodule.test_dataloader() if split == "test" else datamodule.val_dataloader()
    batches = [
        task.transfer_batch_to_device(batch, task.device if device is None else device, 0)
        for batch in _batches(loader, num_batches)
    ]
    kind, names = _groups_of(datamodule)
    dataset = getattr(datamodule, "dataset", type(datamodule).__name__)

    def losses(batch: Any) -> Losses:
        with task.override_top_k():
            return _losses(task, batch)

    return Subject(
        name,
        f"the {split} split of {dataset}",
        task,
        batches,
        losses,
        token_ids=lambda batch: None if isinstance(batch, ImageBatch) else batch.ids_BS,
        groups=lambda batch: batch.task_ids_B if isinstance(batch, TextBatch) else batch.labels_B,
        group_kind=kind,
        group_names=names,
        token_name=lambda index: repr(datamodule.decode([index]))[1:-1],
    )


def spread(count: int, wanted: int) -> list[int]:
    """Return so many indices below `count`, or all, at equal distances: data is often sorted by class or corpus."""
    wanted = min(count, wanted)
    return [index * count // wanted for index in range(wanted)]


def _batches(loader: Any, num_batches: int) -> Iterator[Any]:
    """Yield batches of samples from all of a loader's data, or its first ones where its data is a stream."""
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        yield from itertools.islice(loader, num_batches)
        return
    size = loader.batch_sampler.batch_size
    indices = spread(len(loader.dataset), size * num_batches)
    for start in range(0, len(indices), size):
        yield loader.collate_fn([loader.dataset[index] for index in indices[start : start + size]])


def _losses(task: NextTokenPrediction | Classification, batch: Any) -> Losses:
    if isinstance(task, Classification):
        logits_BL = in_full_precision(task(batch)[0])
        losses_B = F.cross_entropy(logits_BL, batch.labels_B, reduction="none")
        return Losses(losses_B, torch.ones_like(losses_B))
    prediction = task.predict_batch(batch)
    assert prediction.counted_N is not None  # language modeling counts its predictions
    shape = batch.ids_BS.shape
    return Losses(prediction.token_losses_T.view(shape).sum(1), prediction.counted_N.view(shape).sum(1))


def _groups_of(datamodule: Any) -> tuple[str, Sequence[str]]:
    if hasattr(datamodule, "class_names"):
        return "class", list(datamodule.class_names)
    datasets = getattr(datamodule, "dataset", None)
    return "corpus", [str(name) for name in datasets] if isinstance(datasets, (list, tuple)) else []
