"""The best router of a task, and those that may be as good: comparisons of each with the best."""

from __future__ import annotations

import math
from dataclasses import dataclass

from routerzoo.report.statistics.comparisons import Pairs, Results


@dataclass(frozen=True)
class Best:
    """The best router of a task.

    The best is the one of the smallest mean loss among those with the fewest failed runs. Which one that is need not be
    significant: `open` says what else it may be. All pairs are corrected for, so its selection is, too.

    Args:
        router: None without a finished run.
        second: the next one; None where there is none.
        as_good: shown to be within the margin of the best.
        open: neither significantly different from the best nor shown to be as good.
        worse: significantly worse than the best, or failed.
        left_out: with fewer runs than others so far; no candidates for the best.
    """

    router: str | None
    second: str | None
    as_good: tuple[str, ...]
    open: tuple[str, ...]
    worse: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def is_settled(self) -> bool:
        """Whether every other router is either as good as the best or worse."""
        return self.router is not None and not self.open and not self.left_out


def find_best(results: Results, pairs: Pairs) -> Best:
    """Find the best router of a task."""
    most = max(map(len, results.values.values()), default=0)
    left_out = tuple(name for name, values in results.values.items() if len(values) < most)
    ranked = sorted(
        (name for name in results.values if name not in left_out and not results.has_failed(name)),
        key=lambda name: _failures_and_mean(results, name),
    )
    if not ranked:
        return Best(None, None, (), (), tuple(name for name in results.values if name not in left_out), left_out)
    best = ranked[0]
    groups: dict[str, list[str]] = {"as_good": [], "open": [], "worse": []}
    for name in results.values:
        if name != best and name not in left_out:
            groups[_group(pairs[name, best].verdict)].append(name)
    second = ranked[1] if len(ranked) > 1 else None
    return Best(best, second, **{key: tuple(names) for key, names in groups.items()}, left_out=left_out)


def _group(verdict: str) -> str:
    if verdict in ("equivalent", "negligibly worse", "negligibly better"):
        return "as_good"
    return "worse" if verdict in ("worse", "failed") else "open"


def _failures_and_mean(results: Results, router: str) -> tuple[int, float]:
    losses = results.losses(router).values()
    finished = [loss for loss in losses if math.isfinite(loss)]
    return len(losses) - len(finished), sum(finished) / len(finished)
