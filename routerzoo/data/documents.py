"""Corpora of documents: text, JSONL and Parquet files, and data sets of Hugging Face, in pieces that are read alone."""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import itertools
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from routerzoo.data.tokenizer import optional_import
from routerzoo.data.tokens import Span, check_text, next_character
from routerzoo.errors import UserError

SPLITS = ("train", "val", "test")
HUB = "hf:"
PIECE_BYTES = 1 << 26
BLOCK_BYTES = 1 << 20
MANY_FILES = 100
"""Fewer text files may not reach every split when they are dealt whole."""
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
COMPRESSED = (".gz", ".zst")
"""What may follow the suffix of JSON lines."""
NAMED_SPLITS = {"train": "train", "val": "val", "dev": "val", "test": "test"}
"""What the names of files, and of splits of data sets, begin with."""
SPLIT_FOLDERS = NAMED_SPLITS | {"valid": "val", "validation": "val"}
"""What folders of a split are called."""


class Piece(NamedTuple):
    """A part of a corpus that one process reads alone.

    Args:
        kind: of the file.
        name: path, or name of the data set.
        split: of its documents; None where they are dealt by their content; see `split_of`.
        start: first byte, row group or shard.
        end: the one behind the last; 0 for all of the file. Of a data set, the number of its shards.
        part: of a data set, its name of the split.
        begins: whether a document begins with a piece of text.
        ends: whether a document ends with a piece of text.
        size: bytes of its text, about.
    """

    kind: Kind
    name: str
    split: str | None
    start: int = 0
    end: int = 0
    part: str = ""
    begins: bool = True
    ends: bool = True
    size: int = PIECE_BYTES


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


def find_pieces(corpus: str, whole: bool = False) -> list[Piece]:
    """Return the pieces of a corpus of documents.

    Files whose names begin with train, val (or dev) and test, or that are in folders of these names, have these splits,
    where there are some for training and for validation. Otherwise documents are dealt to the splits by their content,
    and where there are fewer than `MANY_FILES` text files, each of these is cut 90/5/5 by position. The same holds for
    the splits of a data set of Hugging Face; where it has some for training and none for validation, the documents of
    the former are dealt.

    Args:
        corpus: `hf:` and a data set's name, a folder, a file, or a pattern of paths.
        whole: leave text files whole, however few there are.

    Raises:
        UserError: there is none, a file of another type, or one that cannot be read.
    """
    if corpus.startswith(HUB):
        return _hub_pieces(corpus)
    files = _files(corpus)
    splits = {file: _split_of_file(file, corpus) for file in files}
    named = {"train", "val"} <= set(splits.values())
    if not named and {"train", "test"} <= set(splits.values()):
        raise UserError(
            f"{corpus} has files for training and for testing, but none whose name begins with val: add some"
        )
    if named and (lost := [str(file) for file, split in splits.items() if split is None]):
        raise UserError(f"{lost[0]} belongs to no split: name it train..., val... or test..., as the files beside it")
    many = whole or sum(_kind(file) == "text" for file in files) >= MANY_FILES
    pieces: list[Piece] = []
    for file in files:
        pieces += _file_pieces(file, splits[file] if named else None, cut=not (named or many))
    return pieces


def grouped(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Gather small pieces of a split that follow each other."""
    groups: list[list[Piece]] = []
    size = 0
    for piece in pieces:
        size += piece.size
        if not groups or size > PIECE_BYTES or piece.split != groups[-1][0].split:
            groups.append([])
            size = piece.size
        groups[-1].append(piece)
    return groups


def text_pieces(span: Span, split: str) -> list[Piece]:
    """Cut a part of a text file at the ends of lines. It begins and ends where whole characters do."""
    with span.path.open("rb") as file:
        size = span.path.stat().st_size
        first, last = (next_character(file, place) for place in (span.start, size if span.end is None else span.end))
        places = [first]
        while last - places[-1] > PIECE_BYTES:
            file.seek(places[-1] + PIECE_BYTES)
            file.readline(BLOCK_BYTES)
            places.append(min(next_character(file, file.tell()), last))
    if places[-1] < last:
        places.append(last)
    pairs = list(itertools.pairwise(places))
    return [
        Piece("text", str(span.path), split, start, end, begins=start == first, ends=end == last, size=end - start)
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
    """Deal a document to a split, 90/5/5, by its content: copies of it are in the same one.

    Args:
        text: of the document, or of its first part.
    """
    place = zlib.crc32(text.encode("utf-8")) % 40
    return "train" if place < 36 else "val" if place < 38 else "test"


def _kind(path: Path) -> Kind | None:
    packed = path.suffix in COMPRESSED
    kind = SUFFIXES.get(Path(path.stem).suffix if packed else path.suffix)
    return kind if kind == "jsonl" or not packed else None


def _files(corpus: str) -> list[Path]:
    path = Path(corpus).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not _is_left_out(file, path))
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
            f"{unknown[0]} is of an unknown type: corpora are files of {', '.join(SUFFIXES)}, .jsonl.gz or .jsonl.zst; "
            "leave others out with a pattern, such as 'folder/*.jsonl'; a folder that datasets has saved is "
            f"{HUB}folder"
        )
    return files


def _is_left_out(file: Path, folder: Path) -> bool:
    # Data sets come with a README.
    return file.stem == "README" or any(part.startswith(".") for part in file.relative_to(folder).parts)


def _named_split(name: str) -> str | None:
    return next((split for prefix, split in NAMED_SPLITS.items() if name.lower().startswith(prefix)), None)


def _split_of_file(file: Path, corpus: str) -> str | None:
    """Return the split that a folder within the corpus, or else the file, is named after."""
    given = itertools.takewhile(lambda part: not glob.has_magic(part), Path(corpus).expanduser().parts)
    folders = file.parts[len(list(given)) : -1]
    return next((SPLIT_FOLDERS[name.lower()] for name in folders if name.lower() in SPLIT_FOLDERS), None) or (
        _named_split(file.name)
    )


def _file_pieces(file: Path, split: str | None, cut: bool) -> list[Piece]:
    kind = _kind(file)
    if kind == "text":
        if not (size := file.stat().st_size):
            return []  # as other empty documents
        if not cut:
            return (
                [Piece("text", str(file), None, 0, size, size=size)]
                if split is None
                else text_pieces(Span(file), split)
            )
        check_text(file)
        bounds = [0, int(size * 0.9), int(size * 0.95), size]
        spans = [Span(file, start, end) for start, end in itertools.pairwise(bounds)]
        return [piece for span, name in zip(spans, SPLITS, strict=True) for piece in text_pieces(span, name)]
    if kind == "parquet":
        metadata = _parquet(file).metadata
        pieces, start, size = [], 0, 0
        for group in range(metadata.num_row_groups):
            size += metadata.row_group(group).total_byte_size
            if size >= PIECE_BYTES or group == metadata.num_row_groups - 1:
                pieces.append(Piece("parquet", str(file), split, start, group + 1, size=size))
                start, size = group + 1, 0
        return pieces
    if file.suffix in COMPRESSED:
        return [Piece("jsonl", str(file), split, size=8 * file.stat().st_size)]  # text becomes an eighth at best
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
    return [Piece("jsonl", str(file), None, start, end, size=end - start) for start, end in itertools.pairwise(places)]


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
        with _opened(path) as file:
            if piece.start:
                file.seek(piece.start)
            while (not piece.end or place < piece.end) and (line := file.readline()):
                where = f"{path}, in the line at byte {place}"
                place += len(line)
                if not line.strip():
                    continue
                try:
                    document = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{where}: no JSON, of which each line has an object ({error})") from error
                if not isinstance(document, dict):
                    raise UserError(f"{where}: a {type(document).__name__}, where each line has an object")
                yield _text_of(document, text_field, where)
    except (EOFError, OSError, zlib.error) as error:  # of gzip, and of Arrow
        if not path.endswith(COMPRESSED) or getattr(error, "errno", None) is not None:  # the system's
            raise
        raise UserError(f"{path} is a truncated or damaged {Path(path).suffix} file ({error})") from error


def _opened(path: str) -> BinaryIO:
    if path.endswith(".gz"):
        return cast(BinaryIO, gzip.open(path))
    if path.endswith(".zst"):
        arrow = optional_import("pyarrow", f"reading {path}")
        return cast(BinaryIO, io.BufferedReader(arrow.input_stream(path, compression="zstd")))
    return Path(path).open("rb")


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
        return parquet.ParquetFile(path, memory_map=True)  # or else it holds the columns of a row group
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
        raise _unreadable(corpus, error) from error


def _unreadable(corpus: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split()).partition(" Example of usage")[0]
    return UserError(f"datasets cannot load {corpus} ({type(error).__name__}: {reason[:300]})")


def hub_version(corpus: str) -> str:
    """Return what changes with the files of a data set of Hugging Face."""
    builder = _hub(corpus)
    # The hash leaves out files that a data set's card names.
    files = {
        str(split): [list(files), files.origin_metadata] for split, files in (builder.config.data_files or {}).items()
    }
    return f"{builder.hash} {builder.config_id} {files}"


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
    try:
        stream = _hub(piece.name).as_streaming_dataset(split=piece.part)
        for document in stream.shard(num_shards=piece.end, index=piece.start):
            yield _text_of(document, text_field, f"{piece.name}, split {piece.part}")
    except Exception as error:  # of the network, of the files' format
        if isinstance(error, UserError):
            raise
        raise _unreadable(piece.name, error) from error


def describe(pieces: Sequence[Piece]) -> list[Any]:
    """Return what the pieces' content depends on: sizes and times of files, versions of data sets."""
    files: dict[str, Any] = {}
    for piece in pieces:
        if piece.name not in files and piece.kind == "hub":
            files[piece.name] = hub_version(piece.name)
        elif piece.name not in files:
            status = Path(piece.name).stat()
            # From whatever folder the path is given.
            files[piece.name] = [os.path.realpath(piece.name), status.st_size, status.st_mtime_ns]
    places = {name: place for place, name in enumerate(files)}
    return [[list(piece._replace(name=str(places[piece.name]))) for piece in pieces], list(files.values())]
