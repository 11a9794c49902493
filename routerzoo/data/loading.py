"""Loaders whose order depends on the seed and the epoch alone, and that resume in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class EpochSampler(DistributedSampler[Any]):
    """Shuffles anew each epoch and yields `(epoch, index)`, so that a data set can vary a sample by epoch.

    Ranks take turns, so that n processes with a batch of b see the same global batches as one with n * b. With one
    process it is an ordinary shuffle.

    Args:
        dataset: what to draw from.
        seed: seed of the order. The global random state is left alone.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        super().__init__(
            dataset,
            num_replicas=torch.distributed.get_world_size() if distributed else 1,
            rank=torch.distributed.get_rank() if distributed else 0,
            shuffle=True,
            seed=seed,
            drop_last=True,
        )
        self.skip = 0

    def __iter__(self) -> Iterator[Any]:
        """Yield the samples of the epoch, without those to skip."""
        indices = list(super().__iter__())
        skip, self.skip = self.skip, 0
        return iter([(self.epoch, index) for index in indices[skip:]])


class TrainingLoader(DataLoader[Any]):
    """Batches of an `EpochSampler`. Its place in the epoch is part of Lightning's checkpoints.

    Args:
        dataset: takes `(epoch, index)`.
        batch_size: samples per batch; an incomplete last batch is left out.
        seed: seed of the order.
        options: further arguments of `torch.utils.data.DataLoader`.
    """

    def __init__(self, dataset: Dataset[Any], batch_size: int, seed: int, **options: Any) -> None:
        super().__init__(
            dataset,
            batch_size=batch_size,
            sampler=EpochSampler(dataset, seed),
            drop_last=True,
            # Without its own, a loader draws from the global generator whenever it is iterated.
            generator=torch.Generator().manual_seed(seed),
            **options,
        )
        self._given_batches = 0
        self._resume: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches of the epoch; after a resume, those that are left."""
        assert isinstance(self.sampler, EpochSampler)
        assert self.batch_size is not None
        resume, self._resume = self._resume, None
        self._given_batches = 0
        if resume is not None and resume["epoch"] == self.sampler.epoch and resume["batches"] < len(self):
            self._given_batches = resume["batches"]
            self.sampler.skip = resume["batches"] * self.batch_size
        for batch in super().__iter__():
            self._given_batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return epoch and number of batches given."""
        assert isinstance(self.sampler, EpochSampler)
        return {"epoch": self.sampler.epoch, "batches": self._given_batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue there when the epoch comes."""
        self._resume = dict(state)


def evaluation_loader(dataset: Dataset[Any], **options: Any) -> DataLoader[Any]:
    """Return a loader in the order of the data set, which leaves the global random state alone.

    Any other draws a number whenever it is iterated, so that a run that validates more often trains otherwise.

    Args:
        dataset: what to load.
        options: further arguments of `torch.utils.data.DataLoader`.
    """
    return DataLoader(dataset, generator=torch.Generator(), **options)
