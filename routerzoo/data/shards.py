"""Token shards: a corpus that is encoded once, piece by piece, in parallel, into memory-mapped files with checksums."""
# Shape suffixes: N tokens of a stream.

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from routerzoo.data.documents import SPLITS, Document, Piece, describe, grouped, read, split_of
from routerzoo.data.download import default_root
from routerzoo.data.tokenizer import Tokenizer
from routerzoo.data.tokens import Stream
from routerzoo.errors import UserError
from routerzoo.runs.atomic import atomic_write, is_writable

BATCH_BYTES = 1 << 20
OPEN_SHARDS = 256
"""Shards that a process keeps open, each of which takes a file descriptor."""


class Reading(NamedTuple):
    """What is read of each document.

    Args:
        text_field: name of the text.
        min_bytes: shorter documents are left out; so are those of white space alone.
        max_bytes: where given, only the first documents are read that have so many bytes together: of each split that
            is named, or of those that are dealt to splits.
    """

    text_field: str = "text"
    min_bytes: int = 1
    max_bytes: int | None = None


class Counts(NamedTuple):
    """What a split has."""

    tokens: int = 0
    documents: int = 0
    bytes: int = 0


class Shard(NamedTuple):
    """A file of token ids."""

    path: Path
    dtype: str
    counts: Counts
    checksum: int

    def __len__(self) -> int:
        return self.counts.tokens

    def open(self) -> np.ndarray:
        """Map the file into memory.

        Raises:
            UserError: it has changed since it was written.
        """
        return _open(str(self.path), self.dtype, self.counts.tokens, self.checksum)


class TokenStream:
    """Arrays on disk as one, of which only the slices asked for are read.

    Args:
        parts: arrays, or shards, which are checked when they are first read.
    """

    def __init__(self, parts: Sequence[Stream | Shard]) -> None:
        self.parts = list(parts)
        sizes = (part.counts.tokens if isinstance(part, Shard) else len(part) for part in self.parts)
        self.ends = list(itertools.accumulate(sizes))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, key: slice) -> np.ndarray:
        """Return a slice, in steps of one."""
        start, stop, step = key.indices(len(self))
        if step != 1:
            raise IndexError(f"a token stream is read in steps of 1, not of {step}")
        found = []
        place = bisect.bisect_right(self.ends, start)
        while start < stop:
            part, end = self.parts[place], self.ends[place]
            array_N = part.open() if isinstance(part, Shard) else part
            begin = end - len(array_N)
            found.append(array_N[start - begin : min(stop, end) - begin])
            start, place = min(stop, end), place + 1
        return found[0] if len(found) == 1 else np.concatenate([np.empty(0, np.uint8), *found])


class TokenStore:
    """The token shards of a corpus.

    Args:
        folder: that holds them.
        num_shards: of the corpus.
        name: of the corpus, for errors.
        reading: what was read of each document, for errors.

    Raises:
        UserError: a shard was truncated.
    """

    def __init__(self, folder: Path, num_shards: int, name: str, reading: Reading) -> None:
        self.folder, self.name, self.reading = folder, name, reading
        self.shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
        self.num_dropped = 0
        for number in range(num_shards):
            record = _record(folder, number)
            assert record is not None
            self.num_dropped += record["dropped"]
            for split, (tokens, documents, size, checksum) in record["splits"].items():
                shard = Shard(_path(folder, number, split), record["dtype"], Counts(tokens, documents, size), checksum)
                actual, expected = shard.path.stat().st_size, tokens * np.dtype(record["dtype"]).itemsize
                if actual != expected:
                    raise UserError(
                        f"the token shard {shard.path} has {actual} bytes, not {expected}: delete it, and it is made "
                        "again"
                    )
                self.shards[split].append(shard)

    def counts(self, split: str) -> Counts:
        """Count what a split has."""
        return Counts(*(sum(numbers) for numbers in zip(*(shard.counts for shard in self.shards[split]), strict=True)))

    def stream(self, split: str) -> TokenStream:
        """Return a split's tokens.

        Raises:
            UserError: the split is empty.
        """
        if not self.shards[split]:
            least, lost = self.reading.min_bytes, self.num_dropped
            told = f" of at least {least} bytes" if least > 1 else ""
            dropped = f" (left out as {'too short' if least > 1 else 'empty'}: {lost})" if lost else ""
            raise UserError(
                f"the {'training' if split == 'train' else split} split of {self.name} has no document{told}{dropped}: "
                f"add documents{' or lower min_bytes' if least > 1 and lost else ''}"
            )
        return TokenStream(self.shards[split])

    def verify(self) -> None:
        """Compare every shard with its checksum.

        Raises:
            UserError: one has changed.
        """
        for shard in itertools.chain.from_iterable(self.shards.values()):
            shard.open()


def corpus_key(pieces: Sequence[Piece], reading: Reading) -> list[Any]:
    """Return what the documents that are read depend on."""
    return [describe(pieces), list(reading)]


def writable_folder(folder: Path) -> Path:
    """Create a folder for what is encoded; one that cannot be written to is replaced by that of `default_root`."""
    with suppress(PermissionError):
        folder.mkdir(parents=True, exist_ok=True)
        if is_writable(folder):
            return folder
    fallback = default_root() / folder.name
    fallback.mkdir(parents=True, exist_ok=True)
    return fallback


def encode_corpus(
    name: str, pieces: Sequence[Piece], tokenizer: Tokenizer, reading: Reading, folder: Path, num_workers: int = 0
) -> TokenStore:
    """Encode a corpus once; later calls with the same files find the result, and one that was killed is continued.

    Args:
        name: of the corpus, for errors.
        pieces: of the corpus.
        tokenizer: encodes it.
        reading: what to read of each document.
        folder: where to keep encoded corpora.
        num_workers: processes that encode; 0 for this one alone. With `max_bytes`, pieces are read one after the other.

    Raises:
        UserError: a file that cannot be read.
    """
    if not pieces:
        raise UserError(f"{name} is empty")
    groups, read_of = grouped(pieces), corpus_key(pieces, reading)
    part = f"tokens-{hashlib.sha256(json.dumps([read_of, tokenizer.digest]).encode()).hexdigest()[:16]}"
    if not _missing(folder / part, len(groups)):
        return TokenStore(folder / part, len(groups), name, reading)
    target = writable_folder(folder) / part
    target.mkdir(exist_ok=True)
    with FileLock(f"{target}.lock"):
        missing = _missing(target, len(groups))
        with tqdm(
            total=len(groups), initial=len(groups) - len(missing), desc=f"encoding {name}", leave=False, delay=1
        ) as bar:
            for _ in _encode_groups(missing, groups, tokenizer, reading, target, num_workers):
                bar.update()
        if missing and corpus_key(pieces, reading) != read_of:
            raise UserError(f"files of {name} have changed while they were read: run the command again")
    return TokenStore(target, len(groups), name, reading)


def texts(pieces: Sequence[Piece], reading: Reading, split: str, most: int) -> Iterator[str]:
    """Yield the documents of a split, until they have so many bytes."""
    left: dict[str | None, int] = {}
    for piece in pieces:
        limit = left.get(piece.split, reading.max_bytes) if reading.max_bytes is not None else None
        if piece.split not in (None, split):
            continue
        for found, document in _kept([piece], reading, limit, []):
            if limit is not None:
                limit = left[piece.split] = limit - document.num_bytes
            if found == split:
                yield document.text
                most -= document.num_bytes
                if most <= 0:
                    return


def _missing(folder: Path, num_shards: int) -> list[int]:
    missing = []
    for number in range(num_shards):
        record = _record(folder, number)
        if record is None or not all(_path(folder, number, split).exists() for split in record["splits"]):
            missing.append(number)
    return missing


def _path(folder: Path, number: int, split: str) -> Path:
    return folder / f"{number:05d}-{split}.bin"


def _record(folder: Path, number: int) -> dict[str, Any] | None:
    """Return what is known of the files of a shard; None where they are not finished, or it is damaged."""
    try:
        record = json.loads((folder / f"{number:05d}.json").read_text(encoding="utf-8"))
        found: dict[str, Any] = record["record"]
        return found if zlib.crc32(json.dumps(found).encode()) == record["checksum"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _encode_groups(
    missing: Sequence[int],
    groups: Sequence[Sequence[Piece]],
    tokenizer: Tokenizer,
    reading: Reading,
    folder: Path,
    num_workers: int,
) -> Iterator[None]:
    if reading.max_bytes is not None:
        left: dict[str | None, int] = {}
        for number, group in enumerate(groups):
            limit = left.setdefault(group[0].split, reading.max_bytes)
            if number in missing:
                _encode_group(number, group, tokenizer, reading, folder, limit)
                yield
            record = _record(folder, number)
            assert record is not None
            left[group[0].split] -= sum(numbers[2] for numbers in record["splits"].values())
        return
    if num_workers == 0 or len(missing) == 1:
        for number in missing:
            _encode_group(number, groups[number], tokenizer, reading, folder)
            yield
        return
    context = multiprocessing.get_context("spawn")  # threads of the tokenizer do not survive a fork
    with ProcessPoolExecutor(num_workers, context, _one_thread) as pool:
        started = [pool.submit(_encode_group, number, groups[number], tokenizer, reading, folder) for number in missing]
        try:
            for future in as_completed(started):
                future.result()
                yield
        except BrokenProcessPool as error:
            raise UserError(
                "a process that encodes was killed, perhaps for its memory: run the command again, which continues, "
                "with fewer num_workers; a script needs if __name__ == '__main__'"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _one_thread() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _kept(
    pieces: Sequence[Piece], reading: Reading, limit: int | None, dropped: list[int]
) -> Iterator[tuple[str, Document]]:
    """Yield the documents that are long enough, and their splits, until they have as many bytes as the limit."""
    for piece in pieces:
        for document in read(piece, reading.text_field) if limit is None or limit > 0 else ():
            whole = document.begins and document.ends
            if whole and (document.num_bytes < reading.min_bytes or not document.text.strip()):
                dropped.append(1)
                continue
            if document.begins or piece.split:
                split = piece.split or split_of(document.text)
            yield split, document
            if limit is not None:
                limit -= document.num_bytes
                if limit <= 0:
                    return


def _encode_group(
    number: int,
    group: Sequence[Piece],
    tokenizer: Tokenizer,
    reading: Reading,
    folder: Path,
    limit: int | None = None,
) -> None:
    dtype = np.dtype(
        np.uint8 if tokenizer.vocab_size <= 2**8 else np.uint16 if tokenizer.vocab_size <= 2**16 else "<u4"
    )
    files: dict[str, BinaryIO] = {}
    numbers: dict[str, list[int]] = {}
    dropped: list[int] = []
    with ExitStack() as stack:
        for documents in _batches(_kept(group, reading, limit, dropped)):
            encoded = tokenizer.encode([document.text for _, document in documents])
            for (split, document), ids_N in zip(documents, encoded, strict=True):
                if split not in files:
                    temporary = _path(folder, number, split).with_suffix(".part")
                    files[split] = stack.enter_context(temporary.open("wb"))
                    numbers[split] = [0, 0, 0, 0]
                start, end = (np.array(ids, dtype) for ids in (tokenizer.start, tokenizer.end))
                parts = [start[: len(start) * document.begins], ids_N.astype(dtype), end[: len(end) * document.ends]]
                content = b"".join(part_N.tobytes() for part_N in parts)
                files[split].write(content)
                found = numbers[split]
                found[0] += len(content) // dtype.itemsize
                found[1] += document.begins
                found[2] += document.num_bytes
                found[3] = zlib.crc32(content, found[3])
    for split in files:
        path = _path(folder, number, split)
        path.with_suffix(".part").replace(path)
    # Written last: without it, all are encoded again.
    record = {"dtype": dtype.str, "splits": numbers, "dropped": len(dropped)}
    checked = {"record": record, "checksum": zlib.crc32(json.dumps(record).encode())}
    atomic_write(folder / f"{number:05d}.json", json.dumps(checked))


def _batches(documents: Iterable[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    batch, size = [], 0
    for found in documents:
        batch.append(found)
        size += found[1].num_bytes
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@functools.lru_cache(maxsize=OPEN_SHARDS)
def _open(path: str, dtype: str, tokens: int, checksum: int) -> np.ndarray:
    if (path, checksum) not in _VERIFIED:
        found = 0
        with Path(path).open("rb") as file:
            while block := file.read(1 << 22):
                found = zlib.crc32(block, found)
        if found != checksum:
            raise UserError(f"the token shard {path} has changed since it was written: delete it, and it is made again")
        _VERIFIED.add((path, checksum))
    return np.memmap(path, dtype=dtype, mode="r", shape=(tokens,))


_VERIFIED: set[tuple[str, int]] = set()
