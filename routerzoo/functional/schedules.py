"""How many experts are active over training: the published growths of k."""

from __future__ import annotations

import math
from typing import Literal

Growth = Literal["linear", "cosine", "exponential", "multi-step"]


def k_at(step: int, total_steps: int, start: int, end: int, growth: Growth = "linear") -> int:
    """Return k at a step of training, between `start` and `end`.

    As in the code of SMoE-Dropout (Chen et al., ICLR 2023), which HyperRouter (Do et al., EMNLP 2023) shares; the
    published runs go from 8 to 16 of 16 experts. With t the step and S the total:

    - `linear`: `start + (end - start) * t / S`
    - `cosine`: `end - (end - start) * cos(pi * t / 2S)`
    - `exponential`: `end - (end - start) * 0.99 ^ floor(t / floor(S / 300))`
    - `multi-step`: the doublings of 1 up to the larger end (1, 2, 4, 8, 16) at equal intervals, but no less than the
      smaller end: from 8 to 16, k grows after four fifths of training

    each rounded to the nearest integer. The growth may also go down.

    Raises:
        ValueError: an unknown growth, or k below 1.
    """
    if start < 1 or end < 1:
        raise ValueError(f"k must be at least 1, got a growth from {start} to {end}")
    step = min(max(step, 0), total_steps)
    share = step / max(total_steps, 1)
    if growth == "linear":
        k = start + (end - start) * share
    elif growth == "cosine":
        k = end - (end - start) * math.cos(math.pi * share / 2)
    elif growth == "exponential":
        k = end - (end - start) * 0.99 ** (step // max(total_steps // 300, 1))
    elif growth == "multi-step":
        stages = _doublings(max(start, end))
        stages = stages if start <= end else stages[::-1]
        k = stages[min(int(share * len(stages)), len(stages) - 1)]
    else:
        raise ValueError(f"growth must be linear, cosine, exponential or multi-step, got {growth!r}")
    return min(max(round(k), min(start, end)), max(start, end))


def _doublings(high: int) -> list[int]:
    stages = [1]
    while stages[-1] < high:
        stages.append(min(stages[-1] * 2, high))
    return stages
