"""Compare routers at every k of the test, from the `by_k.csv` that a sweep's report writes.

    python benchmarks/by_k.py benchmarks/results/hyperrouter_by_k.csv 'HyperRouter: LinearRouter' ...

Prints a Markdown table of means by router and k, and one of paired differences, of the routers before the colons less
those behind, with halves of 95 % intervals; `*` marks differences that are significant at 5 % after Holm's correction
for all that are printed.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from routerzoo.report.statistics.comparisons import ALPHA
from routerzoo.report.statistics.holm import holm
from routerzoo.report.statistics.intervals import interval
from routerzoo.report.statistics.pair import compare_pair

Values = Mapping[tuple[str, float], Mapping[int, float]]
"""Of the metric, by seed, for each router and k."""


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="by_k.csv of a report with one task")
    parser.add_argument("pairs", nargs="+", help="'ROUTER: OTHER'")
    arguments = parser.parse_args()
    values = read(arguments.rows)
    pairs = [tuple(part.strip() for part in pair.split(":")) for pair in arguments.pairs]
    known = dict.fromkeys(router for router, _ in values)
    for name in itertools.chain.from_iterable(pairs):
        if name not in known:
            parser.error(f"there is no router {name!r}; there are {', '.join(known)}")
    ks = sorted({k for _, k in values})
    heads = [f"k = {k:g}" for k in ks]
    rows = [[router, *(_shown(list(values[router, k].values())) for k in ks)] for router in known]
    print(table(["router", *heads], rows))
    keys = [(*pair, k) for pair in pairs for k in ks]
    corrected = holm([_test(values, *key) for key in keys])
    cells = {
        key: _shown(_differences(values, *key), "+") + "*" * (found.p < ALPHA)
        for key, found in zip(keys, corrected, strict=True)
    }
    print(table(["less", "of", *heads], [[*pair, *(cells[(*pair, k)] for k in ks)] for pair in pairs]))


def read(path: Path) -> Values:
    """Return the values of a report's `by_k.csv`."""
    found: dict[tuple[str, float], dict[int, float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault((row["router"], float(row["k"])), {})[int(row["seed"])] = float(row["value"])
    return found


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, with a blank line behind."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _both(values: Values, router: str, other: str, k: float) -> tuple[list[float], list[float]]:
    seeds = sorted(values[router, k].keys() & values[other, k].keys())
    return [values[router, k][seed] for seed in seeds], [values[other, k][seed] for seed in seeds]


def _differences(values: Values, router: str, other: str, k: float) -> list[float]:
    return [one - less for one, less in zip(*_both(values, router, other, k), strict=True)]


def _test(values: Values, router: str, other: str, k: float) -> float:
    return compare_pair(*_both(values, router, other, k), paired=True).p


def _shown(values: Sequence[float], sign: str = "") -> str:
    found = interval(values)
    return f"{found.mean:{sign}.3f} ± {found.high - found.mean:.3f}"


if __name__ == "__main__":
    main()
