"""Corpora of documents: text, JSONL and Parquet files, and data sets of Hugging Face, in pieces that are read alone."""

from __future__ import annotations

import codecs
import glob
import gzip
import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from routerzoo.data.tokenizer import optional_import
from routerzoo.data.tokens import Span, check_text
from routerzoo.errors import UserError

SPLITS = ("train", "val", "test")
HUB = "hf:"
PIECE_BYTES = 1 << 26
BLOCK_BYTES = 1 << 20
Kind = Literal["text", "jsonl", "parquet", "hub"]
SUFFIXES: dict[str, Kind] = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
NAMED_SPLITS = {"train": "train", "val": "val", "dev": "val", "test": "test"}
"""What the names of files, and of splits of data sets, begin with."""


class Piece(NamedTuple):
    """A part of a corpus that one process reads alone.

    Args:
        kind: of the file.
        name: path, or name of the data set.
        split: of its documents; None where they are dealt by their content.
        start: first byte, row group or shard.
        end: the one behind the last; 0 for all of the file. Of a data set, the number of its shards.
        part: of a data set, its name of the split.
        begins: whether a document begins with a piece of text.
        ends: whether a document ends with a piece of text.
    """

    kind: Kind
    name: str
    split: str | None
    start: int = 0
    end: int = 0
    part: str = ""
    begins: bool = True
    ends: bool = True


class Document(NamedTuple):
    """A document, or a part of one that is too long to be read at once.

    Args:
        text: its text.
        num_bytes: of the text.
        begins: it is the beginning.
        ends: it is the end.
    """

    text: str
    num_bytes: int
    begins: bool = True
    ends: bool = True


def has_documents(corpus: str) -> bool:
    """Whether a corpus is one of documents, rather than one running text or three."""
    if corpus.startswith(HUB) or glob.has_magic(corpus):
        return True
    path = Path(corpus).expanduser()
    if path.is_dir():
        return not any((path / f"{split}.txt").is_file() for split in SPLITS)
    return path.is_file() and _kind(path) in ("jsonl", "parquet")


def find_pieces(corpus: str) -> list[Piece]:
    """Return the pieces of a corpus of documents.

    Files whose names begin with train, val (or dev) and test have these splits, where there are some for training and
    for validation. Otherwise each text file is cut 90/5/5 by position, and the documents of other files are dealt to
    the splits by their content. The same holds for the splits of a data set of Hugging Face; where it has some for
    training and none for validation, the documents of the former are dealt.

    Args:
        corpus: `hf:` and a data set's name, a folder, a file, or a pattern of paths.

    Raises:
        UserError: there is none, a file of another type, or one that cannot be read.
    """
    if corpus.startswith(HUB):
        return _hub_pieces(corpus)
    files = _files(corpus)
    splits = {file: _named_split(file.name) for file in files}
    named = {"train", "val"} <= set(splits.values())
    if not named and {"train", "test"} <= set(splits.values()):
        raise UserError(
            f"{corpus} has files for training and for testing, but none whose name begins with val: add some"
        )
    if named and (lost := [str(file) for file, split in splits.items() if split is None]):
        raise UserError(f"{lost[0]} belongs to no split: name it train..., val... or test..., as the files beside it")
    pieces: list[Piece] = []
    for file in files:
        pieces += _file_pieces(file, splits[file] if named else None)
    return pieces


def text_pieces(span: Span, split: str) -> list[Piece]:
    """Cut a part of a text file at the ends of lines. It begins and ends where whole characters do."""
    with span.path.open("rb") as file:
        size = span.path.stat().st_size
        first, last = (_character(file, place) for place in (span.start, size if span.end is None else span.end))
        places = [first]
        while last - places[-1] > PIECE_BYTES:
            file.seek(places[-1] + PIECE_BYTES)
            file.readline(BLOCK_BYTES)
            places.append(min(_character(file, file.tell()), last))
    if places[-1] < last:
        places.append(last)
    pairs = list(itertools.pairwise(places))
    return [
        Piece("text", str(span.path), split, start, end, begins=start == first, ends=end == last)
        for start, end in pairs
    ]


def read(piece: Piece, text_field: str) -> Iterator[Document]:
    """Yield the documents of a piece.

    Args:
        piece: the piece.
        text_field: name of the text in a document of JSON, Parquet or a data set.

    Raises:
        UserError: a damaged file, or a document without text.
    """
    if piece.kind == "text":
        yield from _read_text(piece)
        return
    if piece.kind == "jsonl":
        texts = _read_jsonl(piece, text_field)
    elif piece.kind == "parquet":
        texts = _read_parquet(piece, text_field)
    else:
        texts = _read_hub(piece, text_field)
    for text in texts:
        content = text.encode("utf-8", errors="replace")  # JSON can have halves of characters
        yield Document(content.decode("utf-8"), len(content))


def split_of(text: str) -> str:
    """Deal a document to a split, 90/5/5, by its content: copies of it are in the same one."""
    place = zlib.crc32(text.encode("utf-8")) % 40
    return "train" if place < 36 else "val" if place < 38 else "test"


def _kind(path: Path) -> Kind | None:
    name = path.name.removesuffix(".gz")
    kind = SUFFIXES.get(Path(name).suffix)
    return kind if kind == "jsonl" or name == path.name else None


def _files(corpus: str) -> list[Path]:
    path = Path(corpus).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not _is_hidden(file, path))
    else:
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    if path.is_file():
        files = [path]
    if not files and path.is_dir():
        raise UserError(
            f"the folder {path} holds no files: it should have train.txt, val.txt and test.txt, or files of documents "
            f"({', '.join(SUFFIXES)})"
        )
    if not files:
        raise UserError(f"no file is called {path}")
    if unknown := [file for file in files if _kind(file) is None]:
        raise UserError(
            f"{unknown[0]} is of an unknown type: corpora are files of {', '.join(SUFFIXES)} or .jsonl.gz; leave "
            "others out with a pattern, such as 'folder/*.jsonl'"
        )
    return files


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _named_split(name: str) -> str | None:
    return next((split for prefix, split in NAMED_SPLITS.items() if name.lower().startswith(prefix)), None)


def _file_pieces(file: Path, split: str | None) -> list[Piece]:
    kind = _kind(file)
    if kind == "text":
        check_text(file)
        if split is not None:
            return text_pieces(Span(file), split)
        size = file.stat().st_size
        bounds = [0, int(size * 0.9), int(size * 0.95), size]
        spans = [Span(file, start, end) for start, end in itertools.pairwise(bounds)]
        return [piece for span, name in zip(spans, SPLITS, strict=True) for piece in text_pieces(span, name)]
    if kind == "parquet":
        metadata = _parquet(file).metadata
        pieces, start, size = [], 0, 0
        for group in range(metadata.num_row_groups):
            size += metadata.row_group(group).total_byte_size
            if size >= PIECE_BYTES or group == metadata.num_row_groups - 1:
                pieces.append(Piece("parquet", str(file), split, start, group + 1))
                start, size = group + 1, 0
        return pieces
    if file.suffix == ".gz":
        return [Piece("jsonl", str(file), split)]
    return [piece._replace(split=split) for piece in _lines(file)]


def _lines(file: Path) -> list[Piece]:
    """Cut a file at the ends of lines, however long."""
    size, places = file.stat().st_size, [0]
    with file.open("rb") as opened:
        while size - places[-1] > PIECE_BYTES:
            opened.seek(places[-1] + PIECE_BYTES)
            opened.readline()
            places.append(opened.tell())
    if places[-1] < size:
        places.append(size)
    return [Piece("jsonl", str(file), None, *pair) for pair in itertools.pairwise(places)]


def _character(file: Any, place: int) -> int:
    """Return the place, or where the next character begins if it is in one."""
    file.seek(place)
    head = file.read(4)
    return place + next((index for index, byte in enumerate(head) if byte & 0xC0 != 0x80), 0)


def _read_text(piece: Piece) -> Iterator[Document]:
    decoder, left = codecs.getincrementaldecoder("utf-8")(), piece.end - piece.start
    with Path(piece.name).open("rb") as file:
        file.seek(piece.start)
        while left > 0:
            block = file.read(min(BLOCK_BYTES, left))
            if not block:
                raise UserError(f"{piece.name} has become shorter while it was read")
            block += file.readline(min(left - len(block), 1 << 16))  # words stay whole where lines end
            first, left = left == piece.end - piece.start, left - len(block)
            try:
                text = decoder.decode(block, final=left == 0)
            except UnicodeDecodeError as error:
                place = file.tell() - len(block) + error.start
                raise UserError(f"{piece.name} is not UTF-8 text near byte {place}: {error.reason}") from error
            yield Document(text, len(block), piece.begins and first, piece.ends and left == 0)


def _read_jsonl(piece: Piece, text_field: str) -> Iterator[str]:
    path, place = piece.name, piece.start
    try:
        with gzip.open(path) if path.endswith(".gz") else Path(path).open("rb") as file:
            if piece.start:
                file.seek(piece.start)
            while (not piece.end or place < piece.end) and (line := file.readline()):
                where = f"{path}, in the line at byte {place}"
                place += len(line)
                if not line.strip():
                    continue
                try:
                    document = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{where}: no JSON ({error})") from error
                if not isinstance(document, dict):
                    raise UserError(f"{where}: a {type(document).__name__}, where each line has an object")
                yield _text_of(document, text_field, where)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is a truncated or damaged gzip file ({error})") from error


def _text_of(document: dict[str, Any], text_field: str, where: str) -> str:
    if text_field not in document:
        raise UserError(f"{where}: no field {text_field!r}; there are {', '.join(map(str, document))} (text_field)")
    text = document[text_field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: the field {text_field!r} is a {type(text).__name__}, not a text (text_field)")
    return text


def _parquet(path: Path) -> Any:
    parquet = optional_import("pyarrow.parquet", f"reading {path}")
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # Arrow's errors are of these
        reason = str(error).partition(". ")[0]
        raise UserError(f"{path} is no Parquet file, or a truncated one ({reason})") from error


def _read_parquet(piece: Piece, text_field: str) -> Iterator[str]:
    file = _parquet(Path(piece.name))
    if text_field not in file.schema_arrow.names:
        found = ", ".join(file.schema_arrow.names)
        raise UserError(f"{piece.name}: no column {text_field!r}; there are {found} (text_field)")
    groups = list(range(piece.start, piece.end))
    try:
        for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=[text_field]):
            for value in batch.column(0):
                yield _text_of({text_field: value.as_py()}, text_field, piece.name)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{piece.name} is damaged ({str(error).partition('. ')[0]})") from error


def _hub(corpus: str) -> Any:
    """Return the builder of a data set of Hugging Face: of `hf:name`, or `hf:name:config`."""
    datasets = optional_import("datasets", f"the data set {corpus}")
    name, _, config = corpus.removeprefix(HUB).partition(":")
    try:
        return datasets.load_dataset_builder(name, config or None)
    except Exception as error:  # of the hub, of the file system, of the files' format
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise UserError(f"datasets cannot load {corpus} ({type(error).__name__}: {reason})") from error


def hub_version(corpus: str) -> str:
    """Return what changes with the files of a data set of Hugging Face."""
    builder = _hub(corpus)
    return f"{builder.hash} {builder.config_id}"


def _hub_pieces(corpus: str) -> list[Piece]:
    streams: dict[str, Any] = _hub(corpus).as_streaming_dataset()
    splits = {part: _named_split(part) for part in streams}
    named = {"train", "val"} <= set(splits.values())
    taken = [part for part in streams if (splits[part] is not None if named else splits[part] == "train")]
    return [
        Piece("hub", corpus, splits[part] if named else None, shard, streams[part].num_shards, part)
        for part in taken or streams
        for shard in range(streams[part].num_shards)
    ]


def _read_hub(piece: Piece, text_field: str) -> Iterator[str]:
    stream = _hub(piece.name).as_streaming_dataset(split=piece.part)
    for document in stream.shard(num_shards=piece.end, index=piece.start):
        yield _text_of(document, text_field, f"{piece.name}, split {piece.part}")


def describe(pieces: Sequence[Piece]) -> list[Any]:
    """Return what the pieces' content depends on: sizes and times of files, versions of data sets."""
    files: dict[str, Any] = {}
    for piece in pieces:
        if piece.name not in files and piece.kind == "hub":
            files[piece.name] = hub_version(piece.name)
        elif piece.name not in files:
            status = Path(piece.name).stat()
            files[piece.name] = [status.st_size, status.st_mtime_ns]
    return [[list(piece) for piece in pieces], files]
