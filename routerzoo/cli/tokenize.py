"""`python -m routerzoo tokenize`: trains a tokenizer, and encodes a corpus, before the runs that use them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from routerzoo.cli.arguments import CommandParser
from routerzoo.data.documents import SPLITS
from routerzoo.data.text import TextData
from routerzoo.data.tokenizer import bpe_size
from routerzoo.errors import UserError


def main(args: Sequence[str]) -> None:
    """Encode a corpus, show what it holds, and check its token shards."""
    parser = CommandParser(
        prog="python -m routerzoo tokenize",
        description=(
            "Encode a corpus once, for all runs with the same options; train the tokenizer, if it is a BPE. An "
            "interrupted command continues where it was. What is there already is compared with its checksums."
        ),
    )
    parser.add_argument("dataset", nargs="+", metavar="DATASET", help="as data.dataset; several are mixed")
    parser.add_argument("--tokenizer", default="bpe-8192", help="as data.tokenizer (default: bpe-8192)")
    parser.add_argument("--save", metavar="FILE", type=Path, help="write the tokenizer to this tokenizer.json, too")
    parser.add_argument("--root", help="as data.root")
    parser.add_argument("--text_field", default="text", help="name of the text in JSON and Parquet (default: text)")
    parser.add_argument("--min_bytes", type=int, default=1, help="leave out shorter documents (default: 1)")
    parser.add_argument("--max_bytes", type=int, help="as data.max_bytes")
    parser.add_argument("--workers", type=int, default=0, help="processes that encode (default: 0, this one alone)")
    options = parser.parse_args(args)
    data = TextData(
        options.dataset[0] if len(options.dataset) == 1 else options.dataset,
        tokenizer=options.tokenizer,
        root=options.root,
        text_field=options.text_field,
        min_bytes=options.min_bytes,
        max_bytes=options.max_bytes,
        num_workers=options.workers,
    )
    trained = bpe_size(data.tokenizer)
    if options.save is not None and trained is None:
        parser.exit(2, f"error: --save keeps a BPE that is trained, and {data.tokenizer} is none\n")
    if data.tokenizer == "words" or data.counts("train") is None:
        raise UserError(f"{data.dataset} needs no token shards: its {data.tokenizer} are read as they are")
    data.verify()
    console = Console(soft_wrap=True, highlight=False)
    table = Table(title=f"{data.dataset}: {data.vocab_size} token ids", title_justify="left", title_style="bold")
    for column in ("split", "documents", "tokens", "bytes", "bytes per token"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split in SPLITS:
        counts = data.counts(split)
        assert counts is not None
        ratio = f"{counts.bytes / counts.tokens:.3f}" if counts.tokens else "-"
        table.add_row(split, f"{counts.documents:,}", f"{counts.tokens:,}", f"{counts.bytes:,}", ratio)
    console.print(table)
    if options.save is not None:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(data.trained_tokenizer, options.save)
    if trained is not None:
        console.print(f"tokenizer: {options.save or data.trained_tokenizer}", markup=False)
    for folder in data.shard_folders:
        console.print(f"token shards: {folder}", markup=False)
