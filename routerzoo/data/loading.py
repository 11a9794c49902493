"""Loaders whose order depends on the seed and the epoch alone, and that resume in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, Sampler, SequentialSampler

from routerzoo.errors import UserError


def order_seed(seed: int | None) -> int:
    """Return the seed of a data set's order: by default torch's, which `seed_everything` has set."""
    return torch.initial_seed() % 2**32 if seed is None else seed


class EpochSampler(DistributedSampler[Any]):
    """Shuffles anew each epoch and yields `(epoch, index)`, so that a data set can vary a sample by epoch.

    Ranks take turns, so that n processes with a batch of b see the same global batches as one with n * b. With one
    process it is an ordinary shuffle.

    Args:
        dataset: what to draw from.
        seed: seed of the order. The global random state is left alone.
        every_epoch_the_same: take the samples in the order of the data set, as epoch 0 has them, in every epoch.
    """

    def __init__(self, dataset: Dataset[Any], seed: int, every_epoch_the_same: bool = False) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        super().__init__(
            dataset,
            num_replicas=torch.distributed.get_world_size() if distributed else 1,
            rank=torch.distributed.get_rank() if distributed else 0,
            shuffle=not every_epoch_the_same,
            seed=seed,
            drop_last=True,
        )
        self.skip = 0

    def __iter__(self) -> Iterator[Any]:
        """Yield the samples of the epoch, without those to skip."""
        indices = list(super().__iter__())
        skip, self.skip = self.skip, 0
        return iter([(self.epoch if self.shuffle else 0, index) for index in indices[skip:]])


class TrainingLoader(DataLoader[Any]):
    """Batches of an `EpochSampler`. Its place in the epoch is part of Lightning's checkpoints.

    The place is counted in samples of all processes together. A run resumes on any number of processes that has as
    many samples in a step's batches; with more or fewer, steps and schedules would mean something else.

    Args:
        dataset: takes `(epoch, index)`.
        batch_size: samples per batch; an incomplete last batch is left out.
        seed: seed of the order.
        sampler: given by Lightning where batches are to be overfitted; then each epoch is the same, without a shuffle.
        options: further arguments of `torch.utils.data.DataLoader`.
    """

    def __init__(
        self, dataset: Dataset[Any], batch_size: int, seed: int, sampler: Sampler[Any] | None = None, **options: Any
    ) -> None:
        super().__init__(
            dataset,
            batch_size=batch_size,
            sampler=EpochSampler(dataset, seed, every_epoch_the_same=sampler is not None),
            drop_last=True,
            # Without its own, a loader draws from the global generator whenever it is iterated.
            generator=torch.Generator().manual_seed(seed),
            **options,
        )
        self._given_batches = 0
        self._resume: dict[str, int] | None = None

    @property
    def _order(self) -> EpochSampler:
        assert isinstance(self.sampler, EpochSampler)
        return self.sampler

    @property
    def _samples_per_step(self) -> int:
        assert self.batch_size is not None
        return self.batch_size * self._order.num_replicas

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches of the epoch; after a resume, those that are left."""
        resume, self._resume = self._resume, None
        self._given_batches = 0
        if resume is not None and resume["epoch"] == self._order.epoch:
            given = resume["samples"] // self._samples_per_step
            if given < len(self):
                self._given_batches = given
                self._order.skip = resume["samples"] // self._order.num_replicas
        for batch in super().__iter__():
            self._given_batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, the samples given in it by all processes, and what the order depends on."""
        return {
            "epoch": self._order.epoch,
            "samples": self._given_batches * self._samples_per_step,
            "samples_per_batch": self._samples_per_step,
            "dataset_size": len(self.dataset),  # type: ignore[arg-type]
            "seed": self._order.seed,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue there when the epoch comes.

        Raises:
            UserError: the samples that are left would be others: of another data set or seed, or in other batches.
        """
        now = self.state_dict()
        if state["samples_per_batch"] != now["samples_per_batch"]:
            samples, processes = state["samples_per_batch"], self._order.num_replicas
            way_out = (
                f"set data.batch_size to {samples // processes}"
                if samples % processes == 0
                else f"resume on a number of processes that divides {samples}"
            )
            raise UserError(
                f"the checkpoint was trained with batches of {samples} samples over all processes, and data.batch_size "
                f"times the processes is {now['samples_per_batch']}: {way_out}"
            )
        for name, told in (
            ("dataset_size", "{} samples in the training split, and there are {}"),
            ("seed", "the data seed {}, which is {} now (data.seed, or else seed_everything)"),
        ):
            if state[name] != now[name]:
                found = told.format(state[name], now[name])
                raise UserError(
                    f"the checkpoint was trained with {found}: resume with the same data, or start a run from its "
                    "weights (the callback FineTune)"
                )
        self._resume = dict(state)


class EvenBatches(BatchSampler):
    """Batches of an evaluation: each sample once, and as many batches on every rank.

    Ranks take turns, in the order of the data set. A sampler that repeats samples would count them twice; and where a
    sharded model is evaluated, a rank with a batch more would wait for the others. A rank that has a sample too few
    for the last batch leaves it one of the batch before.

    Args:
        sampler: of the data set; Lightning puts a `DistributedSampler` here, of which rank and ranks are taken.
        batch_size: samples per batch.
        drop_last: has no effect: nothing is left out.

    Raises:
        UserError: there are fewer samples than processes.
    """

    def __init__(self, sampler: Any, batch_size: int, drop_last: bool = False) -> None:
        super().__init__(sampler, batch_size, drop_last=False)
        ranks, rank, total = 1, 0, len(sampler)
        if isinstance(sampler, DistributedSampler):
            ranks, rank, total = sampler.num_replicas, sampler.rank, len(sampler.dataset)  # type: ignore[arg-type]
        if total < ranks:
            raise UserError(f"{total} samples cannot be evaluated on {ranks} processes: take {max(total, 1)} at most")
        self.indices = range(rank, total, ranks)
        # With batches of one, a rank that has a sample more puts two into the last one.
        self.num_batches = min(-(-total // (ranks * batch_size)), total // ranks)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of each batch."""
        left = self.indices
        for later in reversed(range(self.num_batches)):
            size = min(self.batch_size, len(left) - later) if later else len(left)
            yield list(left[:size])
            left = left[size:]


def evaluation_loader(dataset: Dataset[Any], batch_size: int, **options: Any) -> DataLoader[Any]:
    """Return a loader in the order of the data set, which leaves the global random state alone.

    Any other draws a number whenever it is iterated, so that a run that validates more often trains otherwise.

    Args:
        dataset: what to load.
        batch_size: samples per batch and process.
        options: further arguments of `torch.utils.data.DataLoader`.
    """
    batches = EvenBatches(SequentialSampler(dataset), batch_size)  # type: ignore[arg-type]
    return DataLoader(dataset, batch_sampler=batches, generator=torch.Generator(), **options)
