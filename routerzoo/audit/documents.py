"""Documents of an audit's text, and the windows of tokens that they are cut into."""
# Shape suffixes: B windows, S tokens of the longest one.

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from routerzoo.data.documents import Document, Piece, find_pieces, has_documents, read
from routerzoo.data.text import TEXT_SETS, TextData
from routerzoo.data.tokens import check_text


class Windows(NamedTuple):
    """A batch: `ids_BS` token ids, 0 for padding; `mask_BS` 1 for tokens; `documents_B` the document of each window."""

    ids_BS: Tensor
    mask_BS: Tensor
    documents_B: Tensor


def read_documents(corpus: str | Path, text_field: str = "text", split: str = "test") -> Iterator[tuple[str, Document]]:
    """Yield the documents of a corpus, and what each is called: its file, and its number there where it has several.

    Of a corpus whose splits are named, those of one split, and else all. Long texts come in parts.

    Args:
        corpus: as `TextData` takes it.
        text_field: name of the text in JSON, Parquet and data sets of Hugging Face.
        split: `val` or `test`; where there is no such split, the other one.

    Raises:
        UserError: nothing there, files that cannot be read, or a document without text.
    """
    numbers: Counter[str] = Counter()
    for piece in _pieces(str(corpus), split):
        for document in read(piece, text_field):
            name = Path(piece.name).name
            if piece.kind != "text":
                numbers[piece.name] += 1
                name = f"{name}:{numbers[piece.name]}"
            yield name, document


def _pieces(corpus: str, split: str) -> list[Piece]:
    path = Path(corpus).expanduser()
    if corpus not in TEXT_SETS and path.is_file() and not has_documents(corpus):
        check_text(path)
        return [Piece("text", str(path), None, 0, path.stat().st_size)]
    pieces = find_pieces(corpus, whole=True) if has_documents(corpus) else TextData(corpus).pieces(corpus)
    splits = {piece.split for piece in pieces}
    taken = next((name for name in (split, "test", "val") if name in splits), None)
    return [piece for piece in pieces if piece.split == taken]


def cut(
    documents: Iterable[tuple[str, Document]],
    encode: Callable[[str], Sequence[int]],
    length: int,
    batch_size: int,
    num_batches: int,
) -> tuple[list[Windows], list[str]]:
    """Cut documents into windows that never cross from one to the next, and return batches of them, and their names."""
    rows: list[tuple[list[int], int]] = []
    names: list[str] = []
    begins = True
    for name, document in documents:
        if len(rows) >= batch_size * num_batches:
            break
        begins = begins or document.begins
        ids = list(encode(document.text))
        cuts = [ids[start : start + length] for start in range(0, len(ids), length)]
        windows = [window for window in cuts if len(window) > 1]  # one token predicts nothing
        if windows and begins:
            names.append(name)
            begins = False
        rows += [(window, len(names) - 1) for window in windows]
    rows = rows[: batch_size * num_batches]
    return [_batch(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)], names


def _batch(rows: Sequence[tuple[list[int], int]]) -> Windows:
    longest = max(len(ids) for ids, _ in rows)
    ids_BS = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask_BS = torch.zeros_like(ids_BS)
    for place, (ids, _) in enumerate(rows):
        ids_BS[place, : len(ids)] = torch.tensor(ids)
        mask_BS[place, : len(ids)] = 1
    return Windows(ids_BS, mask_BS, torch.tensor([document for _, document in rows]))
