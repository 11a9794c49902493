"""Fine-tune the last feed-forward network of all-MiniLM-L6-v2, upcycled, with each router, on BANKING77 and SST-2.

    python benchmarks/minilm.py cut --out data
    python benchmarks/minilm_routers.py all-MiniLM-L6-v2 --data data --out benchmarks/results/minilm_routers.csv
    python benchmarks/minilm_routers.py --report benchmarks/results/minilm_routers.csv

The network of the last block becomes 8 experts, copies of it, of which a token takes 2. They, their router and a new
linear classifier of the mean hidden state are trained. All else is frozen, and what it computes of each text is kept
in a file, so that a run takes seconds. Rows are written as runs finish: the same command resumes. To train all
weights there is the task `PretrainedTextClassification`.
"""
# Shape suffixes: B texts, S tokens of the longest one, D model width, L labels.

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from routerzoo import (
    HashRouter,
    HyperRouter,
    LinearRouter,
    RandomFrozenRouter,
    RoutingContext,
    StableMoERouter,
    XMoERouter,
    attach,
    auxiliary_loss,
    hf,
    moe_layers,
    provide_context,
)
from routerzoo.data.labelled_text import Example, read_csv
from routerzoo.optim import WarmupCosine
from routerzoo.report.statistics.comparisons import Results, compare_all
from routerzoo.report.statistics.intervals import interval
from routerzoo.report.statistics.margins import metric

ARMS: dict[str, tuple[int, Any]] = {
    "LinearRouter": (8, partial(LinearRouter, top_k=2)),
    "XMoERouter": (8, partial(XMoERouter, top_k=2)),
    "HashRouter": (8, partial(HashRouter, top_k=2)),
    "RandomFrozenRouter": (8, partial(RandomFrozenRouter, top_k=2)),
    "HyperRouter": (8, partial(HyperRouter, top_k=2)),
    "StableMoERouter": (8, partial(StableMoERouter, top_k=2)),
    # The network as it is, and a dense one of the active size of the others: two copies, mixed by a gate.
    "dense": (1, partial(LinearRouter, top_k=1, renormalize=True)),
    "dense, 2 copies": (2, partial(LinearRouter, top_k=2)),
}
"""Experts and router of what is compared."""
TASKS = ("banking77", "sst-2")
LENGTH, BATCH, STEPS, WARMUP = 32, 16, 40, 4
TRAINING, TESTED = 2000, 600
"""Texts of the training and test splits that are used, drawn at random once."""
RATES, TUNING_SEED, SEEDS = (1e-3, 4e-3), 100, range(5)
COLUMNS = ("stage", "task", "router", "seed", "rate", "accuracy", "loss", "least_load", "most_load", "cpu_s")


class Text(NamedTuple):
    """A text's token ids, int64 `[S]`, what goes into the last feed-forward network, `[S, D]`, and its label."""

    ids_S: Tensor
    x_SD: Tensor
    label: int


@torch.no_grad()
def features(folder: str, data: Path, task: str) -> tuple[dict[str, list[Text]], int]:
    """Return the texts of each split, and how many labels there are; from a file if they are there."""
    splits: dict[str, list[Example]] = {s: read_csv(data / task / f"{s}.csv") for s in ("train", "val", "test")}
    labels = sorted({example.label for example in splits["train"]})
    told = (Path(folder) / "model.safetensors").read_bytes() + repr((LENGTH, TRAINING, TESTED)).encode()
    kept = data / task / f"features-{hashlib.sha256(told).hexdigest()[:12]}.pt"
    if not kept.is_file():
        tokenizer, model = (
            auto.from_pretrained(folder) for auto in (transformers.AutoTokenizer, transformers.AutoModel)
        )
        model.eval()
        seen: list[Tensor] = []
        model.encoder.layer[-1].intermediate.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        found = {}
        for split, size in (("train", TRAINING), ("val", None), ("test", TESTED)):
            drawn = np.random.default_rng(0).permutation(len(splits[split]))[:size]
            texts = []
            for place in drawn:
                ids_1S = tokenizer(
                    splits[split][place].text, truncation=True, max_length=LENGTH, return_tensors="pt"
                ).input_ids
                model(input_ids=ids_1S)
                texts.append((ids_1S[0], seen.pop()[0], labels.index(splits[split][place].label)))
            found[split] = texts
        torch.save(found, kept)
    return {s: [Text(*text) for text in texts] for s, texts in torch.load(kept).items()}, len(labels)


class Classifier(nn.Module):
    """The last block from its feed-forward network on, and a classifier of the mean hidden state."""

    def __init__(self, block: nn.Module, width: int, num_labels: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, num_labels)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)
        self.block: Any = block
        (self.moe,) = moe_layers(block)
        trained = {*self.moe.parameters(), *self.classifier.parameters()}
        for parameter in self.parameters():
            parameter.requires_grad_(parameter in trained)

    def forward(self, batch: Sequence[Text], **progress: int) -> tuple[Tensor, RoutingContext]:
        """Return logits `[B, L]` and the context with the routing."""
        x_BSD = pad_sequence([text.x_SD for text in batch], batch_first=True)
        padding_BS = torch.arange(x_BSD.shape[1]) >= torch.tensor([len(text.ids_S) for text in batch]).unsqueeze(1)
        context = RoutingContext(
            token_ids=pad_sequence([text.ids_S for text in batch], batch_first=True),
            sequence_ids=torch.arange(len(batch)).unsqueeze(1).expand_as(padding_BS),
            padding_mask=padding_BS,
            compute_aux_losses=self.training,
            **progress,
        )
        with provide_context(self.block, context):
            y_BSD = self.block.feed_forward_chunk(x_BSD)
        read_BS1 = (~padding_BS).unsqueeze(-1)
        return self.classifier((y_BSD * read_BS1).sum(1) / read_BS1.sum(1)), context


def build(model: Any, arm: str, seed: int, num_labels: int) -> Classifier:
    """Return a classifier; those of one seed start from the same classifier and the same network."""
    num_experts, router = ARMS[arm]
    model = copy.deepcopy(model)
    torch.manual_seed(seed)
    hf.upcycle(model, num_experts=num_experts, router=router, blocks=[len(model.encoder.layer) - 1])
    torch.manual_seed(seed)
    return Classifier(model.encoder.layer[-1], model.config.hidden_size, num_labels)


def order(count: int, seed: int) -> Iterator[list[int]]:
    """Yield the places of each batch."""
    generator = np.random.default_rng(seed)
    while True:
        places = generator.permutation(count)
        yield from places[: count // BATCH * BATCH].reshape(-1, BATCH).tolist()


def train(net: Classifier, texts: list[Text], seed: int, rate: float) -> None:
    """Train for `STEPS` steps."""
    optimizer = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), rate, weight_decay=0.01, fused=True)
    schedule = WarmupCosine(optimizer, STEPS, warmup_steps=WARMUP)
    counts_V = torch.bincount(torch.cat([text.ids_S for text in texts]), minlength=net.moe.spec.vocab_size or 0)
    updates = attach(net, optimizer, STEPS, token_counts=counts_V)
    net.train()
    torch.manual_seed(seed)  # the same dropout for all
    for step, places in zip(range(STEPS), order(len(texts), seed), strict=False):
        batch = [texts[place] for place in places]
        logits_BL, context = net(batch, step=step, total_steps=STEPS)
        loss = F.cross_entropy(logits_BL, torch.tensor([text.label for text in batch])) + auxiliary_loss(net, context)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    updates.remove()


@torch.no_grad()
def test(net: Classifier, texts: list[Text]) -> dict[str, float]:
    """Return accuracy, loss and the load of the least and the most loaded expert, relative to the mean."""
    net.eval()
    hits, loss, load_E = 0, 0.0, torch.zeros(net.moe.num_experts)
    for first in range(0, len(texts), 50):
        batch = texts[first : first + 50]
        logits_BL, context = net(batch)
        labels_B = torch.tensor([text.label for text in batch])
        hits += int((logits_BL.argmax(1) == labels_B).sum())
        loss += F.cross_entropy(logits_BL, labels_B, reduction="sum").item()
        load_E += context.routings_of(net.moe)[0].expert_load(net.moe.num_experts)
    load_E /= load_E.mean()
    shares = {"accuracy": hits / len(texts), "loss": loss / len(texts)}
    return shares | {"least_load": load_E.min().item(), "most_load": load_E.max().item()}


def read(out: Path) -> list[dict[str, str]]:
    """Return the rows that there are."""
    if not out.is_file():
        return []
    with out.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def best_rate(rows: list[dict[str, str]], task: str, arm: str) -> float:
    """Return the learning rate of the best validation accuracy; the smaller loss decides between equals."""
    tried = [r for r in rows if (r["stage"], r["task"], r["router"]) == ("tune", task, arm)]
    return float(max(tried, key=lambda r: (float(r["accuracy"]), -float(r["loss"])))["rate"])


def run(folder: str, data: Path, out: Path) -> None:
    """Do the runs that are left: for each task tuning first, then seed after seed."""
    torch.set_num_threads(1)
    model = transformers.AutoModel.from_pretrained(folder)
    sets = {task: features(folder, data, task) for task in TASKS}

    def one(stage: str, task: str, arm: str, seed: int, rate: float) -> None:
        key = [stage, task, arm, str(seed), str(rate)]
        if any([row[column] for column in COLUMNS[:5]] == key for row in read(out)):
            return
        start, (splits, num_labels) = time.process_time(), sets[task]
        net = build(model, arm, seed, num_labels)
        train(net, splits["train"], seed, rate)
        found = test(net, splits["val" if stage == "tune" else "test"])
        new = not out.is_file()
        with out.open("a", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            if new:
                rows.writerow(COLUMNS)
            numbers = [f"{value:.4f}" for value in (*found.values(), time.process_time() - start)]
            rows.writerow([*key, *numbers])

    for task in TASKS:
        for arm in ARMS:
            for rate in RATES:
                one("tune", task, arm, TUNING_SEED, rate)
        for seed in SEEDS:
            for arm in ARMS:
                one("final", task, arm, seed, best_rate(read(out), task, arm))


def report(out: Path) -> None:
    """Print a table for each task that all have run on: what differs from the linear gate, by a report's statistics."""
    rows = [row for row in read(out) if row["stage"] == "final"]
    results = {}
    for task in TASKS:
        values: dict[str, dict[int, float]] = {arm: {} for arm in ARMS}
        for row in rows:
            if row["task"] == task:
                values[row["router"]][int(row["seed"])] = float(row["accuracy"])
        if not all(values.values()):
            continue
        baselines = {arm: "LinearRouter" for arm in ARMS if arm != "LinearRouter"}
        results[task] = Results(values, False, metric("accuracy"), baselines)
    compared = compare_all(results)
    for task, result in results.items():
        print(f"\n### {task}\n\n| router | rate | accuracy | seeds | difference | p | verdict | load |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for arm, by_seed in result.values.items():
            own = [row for row in rows if (row["task"], row["router"]) == (task, arm)]
            mean, low, high = interval(list(by_seed.values()), is_share=True)
            load = "{:.2f} to {:.2f}".format(
                min(float(row["least_load"]) for row in own), max(float(row["most_load"]) for row in own)
            )
            pair = compared[task].get((arm, "LinearRouter"))
            told = "| | | baseline"
            if pair is not None:
                d = pair.difference
                told = f"| {d.mean:+.4f} ({d.low:+.4f} to {d.high:+.4f}) | {pair.p_adjusted:.3f} | {pair.verdict}"
            rate = ", ".join(sorted({row["rate"] for row in own}))
            print(f"| {arm} | {rate} | {mean:.4f} ({low:.4f} to {high:.4f}) | {len(by_seed)} {told} | {load} |")
        others = [(pair, c.verdict) for pair, c in compared[task].items() if "LinearRouter" not in pair]
        told = [f"{one} {verdict} than {other}" for (one, other), verdict in others if verdict in ("better", "worse")]
        print(f"\nOther pairs that differ: {'; '.join(told) or 'none'}.")


def main() -> None:
    """Run, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    if options.report is not None:
        report(options.report)
    elif None in (options.folder, options.data, options.out):
        parser.error("give a folder, --data and --out, or --report")
    else:
        run(options.folder, options.data, options.out)


if __name__ == "__main__":
    main()
