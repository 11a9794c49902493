"""Tokenizers: bytes, a trained BPE, or one of transformers."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from routerzoo.errors import UserError

END_OF_TEXT = "<|endoftext|>"
SMALLEST_BPE = 257
"""Ids of a byte-level BPE without merges: the bytes, and `END_OF_TEXT`."""


class Tokenizer(Protocol):
    """Turns documents into token ids and back.

    Attributes:
        vocab_size: all ids are below.
        start: ids before each document. No text is encoded as one of them, so that they mark where documents begin.
        end: ids after each document.
        digest: equal for tokenizers that encode alike.
    """

    vocab_size: int
    start: tuple[int, ...]
    end: tuple[int, ...]
    digest: str

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of each text, without `start` and `end`."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text; bytes that are no UTF-8 become a replacement mark."""


class ByteTokenizer:
    """The bytes of UTF-8. Documents start with 255, which no UTF-8 text contains."""

    vocab_size = 256
    start: tuple[int, ...] = (255,)
    end: tuple[int, ...] = ()
    digest = "bytes"

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the bytes of each text."""
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text; bytes that are no UTF-8 become a replacement mark."""
        return bytes(ids).decode("utf-8", errors="replace")


class SubwordTokenizer:
    """A tokenizer of the library `tokenizers`. The name of a special token is encoded as any other text.

    Args:
        backend: a `tokenizers.Tokenizer`, which is changed.
        start: ids before each document.
        end: ids after each document.
    """

    def __init__(self, backend: Any, start: tuple[int, ...], end: tuple[int, ...] = ()) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self.backend, self.start, self.end = backend, start, end
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.digest = hashlib.sha256(f"{backend.to_str()} {start} {end}".encode()).hexdigest()[:16]

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of each text, without special tokens."""
        return [
            self._without_marks(text) if self._has_marks(ids) else ids
            for text, ids in zip(texts, self._ids(texts), strict=True)
        ]

    def _ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(found.ids, np.uint32) for found in encoded]

    def _has_marks(self, ids: np.ndarray) -> bool:
        return any(bool((ids == mark).any()) for mark in (*self.start, *self.end))

    def _without_marks(self, text: str) -> np.ndarray:
        """Encode a text in parts, so that no word of it is the name of `start` or `end`: some vocabularies hold these.

        Raises:
            UserError: they are tokens of other text too.
        """
        names = [self.backend.id_to_token(mark) for mark in (*self.start, *self.end)]
        places = [0, *(found.start() + 1 for found in re.finditer("|".join(map(re.escape, names)), text)), len(text)]
        parts = [text[start:end] for start, end in itertools.pairwise(places)]
        ids = np.concatenate(self._ids(parts))
        if self._has_marks(ids):
            raise UserError(
                f"the tokenizer encodes text as {' or '.join(names)}, which is to begin or end documents: take another"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text, special tokens included."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=False)
        return text


def optional_import(module: str, purpose: str) -> Any:
    """Import a package of the extra `hf`.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(f"{purpose} needs {package}: pip install 'routerzoo[hf]'") from error


def bpe_size(name: str) -> int | None:
    """Return the vocabulary size that a name such as `bpe-8192` asks for; None for another name.

    Raises:
        UserError: too small for the bytes.
    """
    if not (found := re.fullmatch(r"bpe-(\d+)", name)):
        return None
    if (size := int(found[1])) < SMALLEST_BPE:
        raise UserError(f"{name} is too small: a byte-level BPE has at least {SMALLEST_BPE} ids")
    return size


def load_tokenizer(name: str) -> Tokenizer:
    """Load `bytes`, the path of a `tokenizer.json`, or a tokenizer of transformers by name or path.

    A tokenizer of transformers starts documents with its beginning-of-sequence token and ends them with its
    end-of-sequence token (of encoders [CLS] and [SEP]); where it has one of the two, or both are the same, that one
    starts them.

    Raises:
        UserError: there is none, it has no token to start documents with, or an extra is missing.
    """
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name).expanduser()
    if path.suffix == ".json":
        return _from_file(path)
    transformers = optional_import("transformers", f"the tokenizer {name}")
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(str(path) if path.exists() else name)
    except Exception as error:  # of the hub, of the file system, of any tokenizer's code
        raise UserError(
            f"there is no tokenizer {name!r} ({_first_sentence(error)}): take bytes, words, bpe- and a vocabulary "
            "size, the path of a tokenizer.json, or a name or folder that AutoTokenizer of transformers knows"
        ) from error
    if not getattr(loaded, "is_fast", False):
        raise UserError(f"the tokenizer {name} is written in Python alone: take one that has a tokenizer.json")
    begin, end = loaded.bos_token_id, loaded.eos_token_id
    if begin is None and end is None:
        begin, end = loaded.cls_token_id, loaded.sep_token_id  # of encoders
    if begin is None and end is None:
        raise UserError(f"the tokenizer {name} has no token that begins or ends a sequence: add one to it")
    start = begin if begin is not None else end
    return SubwordTokenizer(loaded.backend_tokenizer, (start,), () if end in (None, start) else (end,))


def _from_file(path: Path) -> Tokenizer:
    tokenizers = optional_import("tokenizers", f"the tokenizer {path}")
    if not path.is_file():
        raise UserError(f"the tokenizer {path} does not exist: python -m routerzoo tokenize trains one")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{path} is no tokenizer of the library tokenizers ({_first_sentence(error)})") from error
    if (start := backend.token_to_id(END_OF_TEXT)) is None:
        raise UserError(
            f"the tokenizer {path} has no token {END_OF_TEXT}: name the folder of its tokenizer_config.json, which "
            "says how documents begin"
        )
    return SubwordTokenizer(backend, (start,))


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a byte-level BPE, as GPT-2's (Radford et al. 2019), and write it as a `tokenizer.json`.

    Args:
        texts: what to count; read once.
        vocab_size: ids, with the 256 bytes and `END_OF_TEXT`. Of a small corpus there may be fewer.
        path: where to write it.
    """
    tokenizers = optional_import("tokenizers", "training a BPE")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    backend.save(str(temporary))
    temporary.replace(path)


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0] or type(error).__name__
