"""Resuming at the right window, and evaluating each sample once, on any number of processes."""

import itertools

import pytest
import torch
from lightning import Callback, Trainer
from torch.utils.data import DistributedSampler, SequentialSampler

from routerzoo.data import ImageData, TextData
from routerzoo.data.loading import EvenBatches, TrainingLoader, evaluation_loader
from routerzoo.errors import UserError
from tests.tasks.test_tasks import QUIET, language, vision


def loaders(monkeypatch, processes, batch_size, dataset=range(100), seed=3):
    """Build the loader of each process."""
    found = []
    for rank in range(processes):
        monkeypatch.setattr("torch.distributed.is_initialized", lambda: processes > 1)
        monkeypatch.setattr("torch.distributed.get_world_size", lambda: processes)
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        found.append(TrainingLoader(Pairs(dataset), batch_size, seed, collate_fn=list))
    return found


class Pairs(list):
    """A data set that is indexed by `(epoch, index)`."""

    def __init__(self, content):
        super().__init__(content)

    def __getitem__(self, place):
        return place


def windows(loaders, batches=None):
    """Return the windows of each step, over all processes."""
    return [
        {place for batch in step for place in batch} for step in itertools.islice(zip(*loaders, strict=True), batches)
    ]


@pytest.mark.parametrize(("before", "after"), [((1, 8), (2, 4)), ((2, 4), (1, 8)), ((4, 2), (2, 4)), ((1, 8), (1, 8))])
def test_a_run_resumes_at_the_right_window_on_any_number_of_processes(monkeypatch, before, after):
    whole = windows(loaders(monkeypatch, 1, 8))
    assert len(whole) == 12  # of 100 windows, 4 make no batch
    stopped = loaders(monkeypatch, *before)
    # Each process has taken as many batches as the first; the state is the first's.
    assert windows(stopped, 5) == whole[:5]
    state = stopped[0].state_dict()
    assert state["samples"] == 40
    resumed = loaders(monkeypatch, *after)
    for loader in resumed:
        loader.load_state_dict(state)
    assert windows(resumed, 3) == whole[5:8]
    again = loaders(monkeypatch, *before)  # and once more in the same epoch
    assert resumed[0].state_dict()["samples"] == 64
    for loader in again:
        loader.load_state_dict(resumed[0].state_dict())
    assert windows(again) == whole[8:]


@pytest.mark.parametrize(
    ("processes", "batch_size", "message"),
    [
        (1, 4, "with batches of 8 samples over all processes, and .* is 4: set data.batch_size to 8"),
        (2, 8, "with batches of 8 samples over all processes, and .* is 16: set data.batch_size to 4"),
        (3, 8, "and data.batch_size times the processes is 24: resume on a number of processes that divides 8"),
    ],
)
def test_another_global_batch_is_refused(monkeypatch, processes, batch_size, message):
    (stopped,) = loaders(monkeypatch, 1, 8)
    windows([stopped], 5)
    for loader in loaders(monkeypatch, processes, batch_size):
        with pytest.raises(UserError, match=message):
            loader.load_state_dict(stopped.state_dict())


def test_other_data_are_refused(monkeypatch):
    (stopped,) = loaders(monkeypatch, 1, 8)
    (longer,) = loaders(monkeypatch, 1, 8, range(120))
    with pytest.raises(UserError, match="with 100 samples in the training split, and there are 120: resume with"):
        longer.load_state_dict(stopped.state_dict())
    (shuffled,) = loaders(monkeypatch, 1, 8, seed=4)
    with pytest.raises(UserError, match=r"with the data seed 3, which is 4 now \(data.seed, or else seed_everything\)"):
        shuffled.load_state_dict(stopped.state_dict())


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_an_evaluation_takes_each_sample_once_and_ranks_as_many_batches(ranks, batch_size):
    for total in range(ranks, 40):
        taken = []
        for rank in range(ranks):
            sampler = DistributedSampler(range(total), ranks, rank, shuffle=False)
            taken.append(list(EvenBatches(sampler, batch_size)))
        assert sorted(index for batches in taken for batch in batches for index in batch) == list(range(total))
        assert len({len(batches) for batches in taken}) == 1
        assert len(taken[0]) == len(EvenBatches(sampler, batch_size))
        sizes = [len(batch) for batches in taken for batch in batches]
        assert min(sizes) >= 1
        assert max(sizes) <= max(batch_size, 2)


def test_one_process_evaluates_in_order():
    assert list(EvenBatches(SequentialSampler(range(7)), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert [batch.tolist() for batch in evaluation_loader(torch.arange(5), batch_size=2)] == [[0, 1], [2, 3], [4]]
    assert torch.equal(torch.get_rng_state(), state)


def test_fewer_samples_than_processes_are_refused():
    with pytest.raises(UserError, match="2 samples cannot be evaluated on 3 processes: take 2 at most"):
        EvenBatches(DistributedSampler(range(2), 3, 0), 4)


class Record(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(batch[0].clone())


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling")
@pytest.mark.parametrize(
    "data", [TextData(sequence_length=8, batch_size=4), ImageData(batch_size=4)], ids=["text", "images"]
)
def test_overfitted_batches_are_the_first_of_the_split_in_every_epoch(data):
    task = language("LinearRouter") if isinstance(data, TextData) else vision("LinearRouter", num_classes=10)
    record = Record()
    options = {**QUIET, "max_epochs": 3, "overfit_batches": 2, "enable_checkpointing": False, "callbacks": [record]}
    Trainer(**options).fit(task, datamodule=data)
    seen = record.seen
    assert len(seen) == 6
    for first, again in zip(seen[:2] * 2, seen[2:], strict=True):
        assert torch.equal(first, again)
    dataset = data.train_dataloader().dataset
    expected = torch.stack([dataset[(0, index)][0] for index in range(8)])
    assert torch.equal(torch.cat(seen[:2]), expected)
