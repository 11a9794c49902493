"""What an audit without counterfactuals takes, relative to plain forward passes, and its memory.

OMP_NUM_THREADS=1 python benchmarks/audit.py
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from functools import partial

import torch

from routerzoo import LanguageModeling, LinearRouter, tune_cpu
from routerzoo.audit import Subject, audit, subject_of_task
from routerzoo.audit.observation import evaluating
from routerzoo.data import TextData


def main() -> None:
    """Alternate plain passes and audits, and print the ratio of the medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--d_model", type=int, default=256)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    task = LanguageModeling(
        d_model=options.d_model,
        num_blocks=options.blocks,
        num_heads=4,
        num_experts=options.experts,
        max_length=options.length,
        router=partial(LinearRouter, top_k=2),
    )
    tune_cpu()
    subject = subject_of_task(
        task,
        TextData(sequence_length=options.length, batch_size=options.batch_size),
        name="model",
        num_batches=options.batches,
    )
    plain, audited = [], []
    for _ in range(options.rounds):
        plain.append(_seconds(lambda: _plain(subject)))
        audited.append(_seconds(lambda: audit(subject)))
    weights = sum(parameter.numel() * parameter.element_size() for parameter in task.parameters())
    print(f"plain {statistics.median(plain):.2f} s, audit {statistics.median(audited):.2f} s")
    ratios = [one / other for one, other in zip(audited, plain, strict=True)]
    print(f"ratio {statistics.median(audited) / statistics.median(plain):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
    print(
        f"weights {weights / 2**20:.0f} MiB, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB"
    )


@torch.inference_mode()
def _plain(subject: Subject) -> None:
    with evaluating(subject.net):
        for batch in subject.batches:
            subject.losses(batch)


def _seconds(run: object) -> float:
    start = time.process_time()
    run()  # type: ignore[operator]
    return time.process_time() - start


if __name__ == "__main__":
    main()
