"""Upcycle a real sentence encoder, all-MiniLM-L6-v2, and measure what stays of its embeddings.

    python benchmarks/minilm.py cut --out data
    python benchmarks/minilm.py upcycle all-MiniLM-L6-v2 --data data --out benchmarks/results/minilm_upcycling.csv
    python benchmarks/minilm.py neighbors FOLDER_OR_CHECKPOINT ... --data data

`cut` writes fixed parts of SST-2 and BANKING77, which are downloaded or found in `$ROUTERZOO_DATA`. all-MiniLM-L6-v2 is
the folder of the model and its tokenizer. `neighbors` takes such folders, and checkpoints of
`PretrainedTextClassification`. Routers in fine-tuning: benchmarks/minilm_routers.py.
"""
# Shape suffixes: N texts, B texts of a batch, S tokens of the longest one, D model width.

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from routerzoo import (
    HashRouter,
    HyperRouter,
    LinearRouter,
    PretrainedTextClassification,
    RandomFrozenRouter,
    StableMoERouter,
    XMoERouter,
    hf,
)
from routerzoo.costs import count_costs
from routerzoo.data.labelled_text import Example, LabelledText, read_csv
from routerzoo.moe.layer import moe_layers

KEPT = {"train": None, "val": 300, "test": 1000}
"""Texts of each split that are kept, drawn at random once; None for all."""
NUM_EXPERTS, LENGTH, BATCH = 8, 32, 50
REFERENCES, QUERIES = 2000, 500
"""Texts of BANKING77's training and test splits between which neighbors are sought."""
ROUTERS = {
    "LinearRouter, k = 1": partial(LinearRouter, top_k=1, renormalize=True),
    "LinearRouter, k = 2": partial(LinearRouter, top_k=2),
    "LinearRouter, k = 2, not renormalized": partial(LinearRouter, top_k=2, renormalize=False),
    "HashRouter, k = 2": partial(HashRouter, top_k=2),
    "RandomFrozenRouter, k = 2": partial(RandomFrozenRouter, top_k=2),
    "HyperRouter, k = 2": partial(HyperRouter, top_k=2),
    "XMoERouter, k = 2": partial(XMoERouter, top_k=2),
    "StableMoERouter, k = 2": partial(StableMoERouter, top_k=2),
}


def cut(out: Path) -> None:
    """Write a folder of CSV files for each data set."""
    for name in ("sst-2", "banking77"):
        data = LabelledText(name)
        for split, size in KEPT.items():
            examples = data.examples(split)
            kept = np.random.default_rng(0).permutation(len(examples))[:size]
            path = out / name / f"{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="", encoding="utf-8") as file:
                rows = csv.writer(file)
                rows.writerow(["text", "label"])
                rows.writerows((examples[place].text, examples[place].label) for place in sorted(kept))


@torch.no_grad()
def embed(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Return the mean of each text's last hidden states, of length 1: `[N, D]`."""
    model.eval()
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    embedded_ND = torch.empty(len(texts), model.config.hidden_size)
    for places in (order[first : first + BATCH] for first in range(0, len(texts), BATCH)):
        batch = tokenizer(
            [texts[place] for place in places], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        hidden_BSD = model(**batch).last_hidden_state
        read_BS1 = batch["attention_mask"].unsqueeze(-1)
        mean_BD = (hidden_BSD * read_BS1).sum(1) / read_BS1.sum(1)
        embedded_ND[places] = torch.nn.functional.normalize(mean_BD, dim=-1)
    return embedded_ND


def neighbor_accuracy(model: Any, tokenizer: Any, references: list[Example], queries: list[Example]) -> float:
    """Return how often the label of the nearest reference is a query's own."""
    references_ND, queries_ND = (embed(model, tokenizer, [e.text for e in part]) for part in (references, queries))
    nearest = (queries_ND @ references_ND.T).argmax(1).tolist()
    hits = [references[place].label == query.label for place, query in zip(nearest, queries, strict=True)]
    return sum(hits) / len(hits)


def banking(data: Path) -> tuple[list[Example], list[Example]]:
    """Return references and queries."""
    examples = read_csv(data / "banking77" / "train.csv")
    places = np.random.default_rng(0).permutation(len(examples))[:REFERENCES]
    return [examples[place] for place in places], read_csv(data / "banking77" / "test.csv")[:QUERIES]


def upcycle(folder: str, data: Path, out: Path) -> None:
    """Measure the dense model, and one upcycled by each router; each row is written as soon as it is known."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    references, queries = banking(data)
    texts = [e.text for name in ("sst-2", "banking77") for e in read_csv(data / name / "test.csv")[:QUERIES]]
    ids_BS = torch.randint(1000, 20000, [8, LENGTH], generator=torch.Generator().manual_seed(0))

    def measured(name: str, model: Any, seconds: float, dense_ND: Tensor | None) -> Tensor:
        def run() -> int:
            model(input_ids=ids_BS)
            return ids_BS.numel()

        start = time.process_time()
        embedded_ND = embed(model, tokenizer, texts)
        passed, costs = time.process_time() - start, count_costs(model, run)
        difference = 0.0 if dense_ND is None else (embedded_ND - dense_ND).abs().max().item()
        cosine = 1.0 if dense_ND is None else (embedded_ND * dense_ND).sum(1).mean().item()
        row = {
            "model": name,
            "upcycling_s": round(seconds, 2),
            "parameters": costs.total,
            "active": costs.active,
            "embedding_s": round(passed, 1),
            "largest_difference": difference,
            "mean_cosine": round(cosine, 6),
            "neighbor_accuracy": neighbor_accuracy(model, tokenizer, references, queries),
        }
        print(row, flush=True)
        new = dense_ND is None
        with out.open("w" if new else "a", newline="", encoding="utf-8") as file:
            rows = csv.DictWriter(file, row)
            if new:
                rows.writeheader()
            rows.writerow(row)
        return embedded_ND

    dense_ND = measured("dense", transformers.AutoModel.from_pretrained(folder), 0.0, None)
    for name, router in ROUTERS.items():
        torch.manual_seed(0)
        model = transformers.AutoModel.from_pretrained(folder)
        start = time.process_time()
        hf.upcycle(model, num_experts=NUM_EXPERTS, router=router)
        measured(name, model, time.process_time() - start, dense_ND)


def neighbors(models: Sequence[str], data: Path) -> None:
    """Print the accuracy of nearest neighbors."""
    for name in models:
        if name.endswith(".ckpt"):
            task = PretrainedTextClassification.load_from_checkpoint(name)
            model, source = task.net.model, task.hparams["source"]
        else:
            model, source = transformers.AutoModel.from_pretrained(name), name
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        experts = {layer.num_experts for layer in moe_layers(model)}
        print(name, "experts", experts, "accuracy", neighbor_accuracy(model, tokenizer, *banking(data)), flush=True)


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first, second, third = (commands.add_parser(name) for name in ("cut", "upcycle", "neighbors"))
    first.add_argument("--out", type=Path, required=True)
    second.add_argument("folder")
    second.add_argument("--out", type=Path, required=True)
    third.add_argument("models", nargs="+")
    for command in (second, third):
        command.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if options.command == "cut":
        cut(options.out)
    elif options.command == "upcycle":
        upcycle(options.folder, options.data, options.out)
    else:
        neighbors(options.models, options.data)


if __name__ == "__main__":
    main()
