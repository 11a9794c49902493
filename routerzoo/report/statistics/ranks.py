"""Mean ranks of routers over seeds and tasks, and how probable an improvement is, with a bootstrap over seeds."""
# Shape suffixes: R routers, S seeds, D draws of the bootstrap.

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from scipy import stats

from routerzoo.report.statistics.aggregates import DRAWS, percentiles, probability_of_improvement, stratified_bootstrap
from routerzoo.report.statistics.comparisons import Results
from routerzoo.report.statistics.intervals import LEVEL, Interval


def mean_ranks(tasks: Mapping[str, Results], draws: int = DRAWS, seed: int = 0) -> dict[str, Interval]:
    """Return the mean rank, 1 is best, of every router that all tasks have.

    Routers are ranked at each seed of a task, failed runs last and equal values by their mean rank; ranks are averaged
    over seeds, and then over tasks. Seeds that some router has not done yet are left out. Bounds are NaN below five.

    Args:
        tasks: results by task.
        draws: of the bootstrap: within a task, seeds are drawn with replacement.
        seed: of the bootstrap.
    """
    names = [name for name in _in_order(tasks) if all(name in results.values for results in tasks.values())]
    if not names:
        return {}
    ranks = []
    for results in tasks.values():
        losses = {name: results.losses(name) for name in names}
        common = sorted(set.intersection(*(set(losses[name]) for name in names)))
        if not common:
            return {}
        ranks.append(stats.rankdata([[losses[name][s] for s in common] for name in names], axis=0))
    center_R = np.mean([ranks_RS.mean(1) for ranks_RS in ranks], axis=0)
    generator, total_DR = np.random.default_rng(seed), np.zeros((draws, len(names)))
    for ranks_RS in ranks:
        seeds = ranks_RS.shape[1]
        counts_DS = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws)
        total_DR += counts_DS @ ranks_RS.T / seeds
    low_R, high_R = percentiles(total_DR / len(ranks), [ranks_RS.shape[1] for ranks_RS in ranks], LEVEL)
    return {name: Interval(*map(float, found)) for name, *found in zip(names, center_R, low_R, high_R, strict=True)}


def improvement(tasks: Mapping[str, Results], router: str, baseline: str) -> Interval:
    """Return the probability that a run of a router is better than one of its baseline, on an average task.

    Over the tasks and seeds that both have; NaN without any.
    """
    both = [results for results in tasks.values() if {router, baseline} <= set(results.values)]
    pair = [[results.losses(name) for results in both] for name in (router, baseline)]
    found = [set(losses) for of_tasks in pair for losses in of_tasks]
    if not found or not (seeds := sorted(set.intersection(*found))):
        return Interval(math.nan, math.nan, math.nan)
    one, other = (np.array([[losses[seed] for seed in seeds] for losses in of_tasks]) for of_tasks in pair)
    return stratified_bootstrap(probability_of_improvement, one, other)


def _in_order(tasks: Mapping[str, Results]) -> list[str]:
    return list(dict.fromkeys(name for results in tasks.values() for name in results.values))
