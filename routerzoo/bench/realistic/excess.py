"""Excess bits per byte over the reference, by domain, beside what the routing says of domains and utilization."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from rich import box
from rich.table import Table
from scipy import stats

from routerzoo.bench.controls import CONTROLS
from routerzoo.bench.realistic.byte_model import ByteLanguageModel
from routerzoo.bench.rows import Row
from routerzoo.bench.scores import Summary, mean_and_error

REFERENCE = "oracle"


def bits_by_domain(row: Row) -> list[float]:
    """Return the bits per byte of each domain; none of a run that failed."""
    return [float(loss) / math.log(2) for loss in row.loss_by_domain.split()]


def excess_bits(summary: Summary, others: Sequence[Summary]) -> list[float]:
    """Return the excess of each seed's run over the reference of its seed, in bits per byte.

    A run that failed counts as the worst run of its seed.

    Args:
        summary: of the router.
        others: of all routers of the task, the reference among them.
    """
    losses: dict[int, list[float]] = {}
    reference: dict[int, float] = {}
    for other in others:
        for row in (score.row for score in other.scores):
            if row.loss is not None:
                losses.setdefault(row.seed, []).append(row.loss)
                if row.router == REFERENCE:
                    reference[row.seed] = row.loss
    rows = [score.row for score in summary.scores if score.row.seed in reference]
    reached = [(max(losses[row.seed]) if row.loss is None else row.loss, reference[row.seed]) for row in rows]
    return [(loss - best) / math.log(2) for loss, best in reached]


def excess_table(found: Sequence[Summary]) -> Table:
    """Return the table of all routers of a task, the lowest excess first, with 95 % intervals over seeds."""
    table = _table("excess bits per byte over the reference", ["excess", "NMI by layer", "load entropy", "dead"])
    for summary, excess in _ordered(found):
        mean, error = mean_and_error(excess)
        half = error * float(stats.t.ppf(0.975, max(len(excess) - 1, 1)))
        layers = [[float(value) for value in score.row.nmi_by_layer.split()] for score in summary.scores]
        by_layer = " ".join(f"{statistics.fmean(layer):.2f}" for layer in zip(*filter(None, layers), strict=True))
        entropy, dead = summary.mean("load_entropy"), summary.mean("dead_experts")
        cells = [f"{mean:.3f}" if math.isnan(half) else f"{mean:.3f} ± {half:.3f}", by_layer or "-"]
        cells += ["-" if math.isnan(value) else f"{value:.{digits}f}" for value, digits in ((entropy, 3), (dead, 1))]
        table.add_row(summary.router, *cells, style="dim" if summary.router in CONTROLS else "")
    return table


def domain_table(task: type[ByteLanguageModel], found: Sequence[Summary]) -> Table:
    """Return the table of the excess in each domain, means over the seeds that have finished."""
    table = _table("by domain", [domain.partition("=")[0] for domain in task.domains])
    finished = {
        summary.router: {
            score.row.seed: bits_by_domain(score.row) for score in summary.scores if score.row.loss_by_domain
        }
        for summary in found
    }
    best = finished.get(REFERENCE, {})
    for summary, _ in _ordered(found):
        of_seeds = [(bits, best[seed]) for seed, bits in finished[summary.router].items() if seed in best]
        excess = [[ours - theirs for ours, theirs in zip(*pair, strict=True)] for pair in of_seeds]
        cells = [f"{statistics.fmean(column):.2f}" for column in zip(*excess, strict=True)]
        table.add_row(summary.router, *(cells or ["-"] * task.num_domains))
    return table


def _ordered(found: Sequence[Summary]) -> list[tuple[Summary, list[float]]]:
    excess = [(summary, excess_bits(summary, found)) for summary in found]
    return sorted((pair for pair in excess if pair[1]), key=lambda pair: statistics.fmean(pair[1]))


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("router", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table
