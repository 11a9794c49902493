"""Documents of an audit's text, and the windows of tokens that they are cut into."""
# Shape suffixes: B windows, S tokens of the longest one.

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from routerzoo.data.tokens import check_text
from routerzoo.errors import UserError

SUFFIXES = (".txt", ".md", ".jsonl")


class Document(NamedTuple):
    """A text and what it is called."""

    name: str
    text: str


class Windows(NamedTuple):
    """A batch: `ids_BS` token ids, 0 for padding; `mask_BS` 1 for tokens; `documents_B` the document of each window."""

    ids_BS: Tensor
    mask_BS: Tensor
    documents_B: Tensor


def read_documents(path: Path) -> Iterator[Document]:
    """Yield the texts of a file, or of a folder's files: one for each file, or for each row of JSON lines.

    Raises:
        UserError: nothing there, no text, or a row without the field `text`.
    """
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
        if not found:
            raise UserError(f"the folder {path} holds no text: there is no file {', '.join(SUFFIXES)}")
        for file in found:
            yield from read_documents(file)
        return
    check_text(path)
    if path.suffix != ".jsonl":
        yield Document(path.name, path.read_text(encoding="utf-8"))
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}, line {number} is no JSON object with a field 'text'") from None
            yield Document(f"{path.name}:{number}", str(text))


def cut(
    documents: Iterator[Document],
    encode: Callable[[str], Sequence[int]],
    length: int,
    batch_size: int,
    num_batches: int,
) -> tuple[list[Windows], list[str]]:
    """Cut documents into windows that never cross from one to the next, and return batches of them, and their names."""
    rows: list[tuple[list[int], int]] = []
    names: list[str] = []
    for document in documents:
        if len(rows) >= batch_size * num_batches:
            break
        ids = list(encode(document.text))
        cuts = [ids[start : start + length] for start in range(0, len(ids), length)]
        windows = [window for window in cuts if len(window) > 1]  # one token predicts nothing
        if windows:
            rows += [(window, len(names)) for window in windows]
            names.append(document.name)
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
