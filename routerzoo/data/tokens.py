"""Token streams on disk: bytes as they are, words by a vocabulary of the training split."""
# Shape suffixes: N tokens of a stream, S tokens of a window, V vocabulary.

from __future__ import annotations

import bisect
import errno
import hashlib
import itertools
import json
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from routerzoo.data.download import default_root
from routerzoo.errors import UserError

CHECKSUMS = "checksums.json"
IGNORED_TARGET = -100
END_OF_LINE = "<eos>"
UNKNOWN = "<unk>"


class Stream(Protocol):
    """Token ids on disk: an array, or something that is sliced like one."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: slice, /) -> np.ndarray: ...


class Span(NamedTuple):
    """A part of a file: from byte `start` up to byte `end`, or to the end of the file."""

    path: Path
    start: int = 0
    end: int | None = None


class TextBatch(NamedTuple):
    """A batch of windows.

    `ids_BS` int64 token ids; `targets_BS` the token that follows each, `IGNORED_TARGET` for padding; `task_ids_B` the
    corpus of each window, where there are several; `sequence_ids_BS` the document of each token, counted over the
    batch, where documents are told apart; `attend_across` whether attention crosses their boundaries.
    """

    ids_BS: Tensor
    targets_BS: Tensor
    task_ids_B: Tensor | None = None
    sequence_ids_BS: Tensor | None = None
    attend_across: bool = True


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a token stream: `length` tokens and the tokens that follow each of them.

    Args:
        stream_N: the stream; it may be a memory map, of which only the windows asked for are read.
        length: tokens per window.
        training: index windows by `(epoch, index)`; each epoch cuts the stream at another place. Otherwise the windows
            follow each other without a gap, the last one padded, so that every token but the first is predicted once.
        seed: seed of the cuts.
        name: what the stream is called in errors.

    Raises:
        UserError: the stream is too short for one window.
    """

    def __init__(self, stream_N: Stream, length: int, *, training: bool, seed: int = 0, name: str) -> None:
        if len(stream_N) < (length + 1 if training else 2):
            raise UserError(
                f"{name} has {len(stream_N)} tokens, too few for "
                + (f"one window of sequence_length {length}; choose a smaller one" if training else "one prediction")
            )
        self.stream_N, self.length, self.training, self.seed = stream_N, length, training, seed
        if not training:
            self.num_windows = -(-(len(stream_N) - 1) // length)
        else:
            self.num_windows = max((len(stream_N) - length) // length, 1)

    def __len__(self) -> int:
        return self.num_windows

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return ids and targets of a window, int64 `[length]` each."""
        epoch = None
        if isinstance(index, tuple):
            epoch, index = index
        if not 0 <= index < self.num_windows:
            raise IndexError(f"window {index} of {self.num_windows}")
        if epoch is not None:
            slack = len(self.stream_N) - 1 - self.num_windows * self.length
            cut = int(np.random.default_rng((self.seed, epoch)).integers(0, slack + 1))
            start = cut + index * self.length
        else:
            start = index * self.length
        tokens = torch.from_numpy(self.stream_N[start : start + self.length + 1].astype(np.int64))
        ids, targets = tokens[:-1], tokens[1:]
        if (missing := self.length - len(ids)) > 0:
            ids = torch.cat([ids, ids.new_zeros(missing)])
            targets = torch.cat([targets, targets.new_full((missing,), IGNORED_TARGET)])
        return ids, targets


class MixedWindows(Dataset[tuple[Tensor, Tensor, int]]):
    """Windows of several corpora: those of the first, then those of the second, and so on, each with its number.

    Args:
        corpora: windows of each.
    """

    def __init__(self, corpora: Sequence[Windows]) -> None:
        self.corpora = corpora
        self.ends = list(itertools.accumulate(len(windows) for windows in corpora))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        """Return ids and targets of a window, and the number of its corpus."""
        place = index[1] if isinstance(index, tuple) else index
        if not 0 <= place < len(self):
            raise IndexError(f"window {place} of {len(self)}")
        corpus = bisect.bisect_right(self.ends, place)
        within = place - (self.ends[corpus] - len(self.corpora[corpus]))
        ids, targets = self.corpora[corpus][(index[0], within) if isinstance(index, tuple) else within]
        return ids, targets, corpus


def collate(
    samples: Sequence[tuple[Tensor, Tensor] | tuple[Tensor, Tensor, int]],
    start_id: int | None = None,
    attend_across: bool = True,
) -> TextBatch:
    """Stack windows to a batch.

    Args:
        samples: the windows.
        start_id: the token that begins each document; None where documents are not told apart.
        attend_across: whether attention crosses the boundaries of documents.
    """
    ids_BS = torch.stack([sample[0] for sample in samples])
    targets_BS = torch.stack([sample[1] for sample in samples])
    tasks = [sample[2] for sample in samples if len(sample) == 3]
    sequence_ids_BS = None
    if start_id is not None:
        begins_BS = ids_BS == start_id
        begins_BS[:, 0] = True  # what is left of a document that began in another window
        sequence_ids_BS = (begins_BS.flatten().cumsum(0) - 1).view_as(ids_BS)
    return TextBatch(ids_BS, targets_BS, torch.tensor(tasks) if tasks else None, sequence_ids_BS, attend_across)


def byte_stream(span: Span) -> np.ndarray:
    """Map the bytes of a part of a file into memory without reading them.

    Raises:
        UserError: it is empty.
    """
    path, start, end = span
    size = path.stat().st_size
    end = size if end is None else min(end, size)
    if end <= start:
        raise UserError(f"{path} is empty" if size == 0 else f"{path} has no bytes from {start} to {end}")
    return np.memmap(path, dtype=np.uint8, mode="r", offset=start, shape=(end - start,))


def check_text(path: Path) -> None:
    """Refuse a file that is no text, judged by its first MiB.

    Raises:
        UserError: missing, unreadable, empty, or not UTF-8 text.
    """
    try:
        with path.open("rb") as file:
            head = file.read(1 << 20)
    except OSError as error:
        raise UserError(f"cannot read the text {path}: {error.strerror or error}") from error
    if not head:
        raise UserError(f"the text {path} is empty")
    place = head.find(b"\0")
    if place < 0:
        try:
            head.decode("utf-8")
        except UnicodeDecodeError as error:
            # A character may be cut at the end of what was read.
            place = error.start if error.start < len(head) - 4 or len(head) < 1 << 20 else -1
    if place >= 0:
        raise UserError(f"{path} is not UTF-8 text: byte {head[place]:#04x} at position {place}")


class WordCorpus:
    """Words of a corpus as integers, in memory-mapped files.

    Words are what white space separates; each line ends with `<eos>`, as in the published counts of Penn Treebank and
    WikiText. The vocabulary is that of the training split alone, most frequent first; other words are `<unk>`.

    Args:
        folder: where the encoded splits are; see `encode_words`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            checksums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
            for name, checksum in checksums.items():
                if zlib.crc32((folder / name).read_bytes()) != checksum:
                    raise ValueError(f"{name} has changed since it was written")
            self.words: list[str] = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"the encoded corpus {folder} is damaged ({error}); delete it, and it is made again"
            ) from error
        self.ids = {word: index for index, word in enumerate(self.words)}

    def stream(self, split: str) -> np.ndarray:
        """Map a split's tokens into memory."""
        stream_N: np.ndarray = np.load(self.folder / f"{split}.npy", mmap_mode="r")
        return stream_N


def encode_words(splits: dict[str, Sequence[Span]], folder: Path, max_words: int | None = None) -> WordCorpus:
    """Encode a corpus once, line by line; later calls with the same files find the result.

    Args:
        splits: file parts of `train`, `val` and `test`.
        folder: where to keep encoded corpora; one that cannot be written to, and lacks this one, is replaced by that of
            `default_root`.
        max_words: keep only the most frequent words.
    """
    key = [
        (split, str(span.path), span.start, span.end, span.path.stat().st_size, span.path.stat().st_mtime_ns)
        for split, spans in splits.items()
        for span in spans
    ]
    digest = hashlib.sha256(json.dumps([key, max_words]).encode()).hexdigest()[:16]
    target = folder / f"words-{digest}"
    if not target.exists():
        try:
            _encode(splits, target, max_words)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or folder == default_root() / "encoded":
                raise
            return encode_words(splits, default_root() / "encoded", max_words)
    return WordCorpus(target)


def _encode(splits: dict[str, Sequence[Span]], target: Path, max_words: int | None) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            # Renamed into place whole, so that an interrupted run leaves nothing that looks finished.
            working = target.with_name(f"{target.name}.part")
            shutil.rmtree(working, ignore_errors=True)
            working.mkdir()
            counts = Counter(word for word in _words(splits["train"], "counting words"))
            counts.setdefault(UNKNOWN, 0)
            words = sorted(counts, key=lambda word: (-counts[word], word))
            if max_words is not None and len(words) > max_words:
                words = [*[word for word in words if word != UNKNOWN][: max_words - 1], UNKNOWN]
            ids = {word: index for index, word in enumerate(words)}
            for split, spans in splits.items():
                _write_stream(_words(spans, f"encoding {split}"), ids, working / f"{split}.npy")
            (working / "vocabulary.json").write_text(json.dumps(words), encoding="utf-8")
            files = sorted(path for path in working.iterdir() if path.suffix in (".npy", ".json"))
            checksums = {path.name: zlib.crc32(path.read_bytes()) for path in files}
            (working / CHECKSUMS).write_text(json.dumps(checksums), encoding="utf-8")
            os.replace(working, target)


def _words(spans: Sequence[Span], progress: str) -> Iterator[str]:
    for path, start, end in spans:
        total = (path.stat().st_size if end is None else end) - start
        with (
            path.open("rb") as file,
            tqdm(total=total, unit="B", unit_scale=True, desc=progress, leave=False, delay=1) as bar,
        ):
            first = next_character(file, start)
            left = (total + start if end is None else next_character(file, end)) - first
            file.seek(first)
            while left > 0 and (line := file.readline(left)):
                left -= len(line)
                bar.update(len(line))
                try:
                    yield from line.decode("utf-8").split()
                except UnicodeDecodeError as error:
                    place = file.tell() - len(line) + error.start
                    raise UserError(f"{path} is not UTF-8 text at byte {place}: {error.reason}") from error
                yield END_OF_LINE


def next_character(file: BinaryIO, place: int) -> int:
    """Return the place, or where the next character of UTF-8 begins if it is in one."""
    file.seek(place)
    head = file.read(4)
    return place + next((index for index, byte in enumerate(head) if byte & 0xC0 != 0x80), 0)


def first_word_bytes(span: Span) -> int:
    """Return how many bytes the first token of words takes, with the space before it."""
    with span.path.open("rb") as file:
        file.seek(span.start)
        line = file.readline()
    words = line.split()
    return line.find(words[0]) + len(words[0]) if words else len(line)


def _write_stream(words: Iterator[str], ids: dict[str, int], path: Path) -> None:
    dtype = np.uint16 if len(ids) <= 2**16 else np.uint32
    unknown = ids[UNKNOWN]
    raw = path.with_suffix(".raw")
    length = 0
    with raw.open("wb") as file:
        chunk: list[int] = []
        for word in words:
            chunk.append(ids.get(word, unknown))
            if len(chunk) == 1 << 20:
                file.write(np.array(chunk, dtype).tobytes())
                length, chunk = length + len(chunk), []
        file.write(np.array(chunk, dtype).tobytes())
        length += len(chunk)
    stream_N = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(length,))
    if length:
        stream_N[:] = np.memmap(raw, dtype=dtype, mode="r", shape=(length,))
    stream_N.flush()
    raw.unlink()


def count_tokens(stream_N: Stream, vocab_size: int) -> np.ndarray:
    """Return how often each token id occurs, int64 `[V]`, reading the stream in parts."""
    counts_V = np.zeros(vocab_size, np.int64)
    for start in range(0, len(stream_N), 1 << 22):
        counts_V += np.bincount(stream_N[start : start + (1 << 22)], minlength=vocab_size)
    return counts_V
