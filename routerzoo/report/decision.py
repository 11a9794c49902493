"""What to choose, task by task and over all: the head of a report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from routerzoo.costs import short
from routerzoo.report.analysis import Analysis, TaskAnalysis
from routerzoo.report.collect import Sweep
from routerzoo.report.compute import Compute
from routerzoo.report.statistics.comparisons import Comparison
from routerzoo.report.statistics.intervals import Interval
from routerzoo.sweep.plan import TOLERANCE

LISTED = 7
"""Names in a line, before the rest are counted."""


@dataclass(frozen=True)
class Decision:
    """A box at the head of the page.

    Args:
        title: what is decided, and at which budget.
        answer: a short sentence.
        is_settled: every other router is shown to be as good or worse.
        is_provisional: runs are still to come.
        lines: what qualifies the answer, by what it is about.
    """

    title: str
    answer: str
    is_settled: bool
    is_provisional: bool
    lines: Mapping[str, str]


def decide(sweep: Sweep, analysis: Analysis, computes: Sequence[Compute] = ()) -> list[Decision]:
    """Return a decision for each task, and one over all first where there are several."""
    found = {task.name: analysis.tasks[task.name] for task in sweep.main_tasks()}
    each = [_of_task(one, analysis.is_provisional) for one in found.values()]
    return [_over_all(found, analysis, computes, sweep.baseline), *each] if len(found) > 1 else each


def _of_task(found: TaskAnalysis, is_provisional: bool) -> Decision:
    answer, is_settled = _answer(found)
    compared = {} if found.best.router is None else _compared(found)
    lines = {
        **compared,
        "Failed runs": _failed(found),
        "Not equal": _unequal(found),
        "Still running": _list(found.best.left_out),
    }
    return Decision(_title(found), answer, is_settled, is_provisional, {k: text for k, text in lines.items() if text})


def _compared(found: TaskAnalysis) -> dict[str, str]:
    return {
        "As good": _as_good(found),
        "Open": _open(found),
        "Worse": _list([f"{n} (all failed)" if found.results.has_failed(n) else n for n in found.best.worse]),
        "Cost of choosing wrong": _cost(found),
        "Detectable": _detectable(found),
        "To settle it": _settle(found),
    }


def _title(found: TaskAnalysis) -> str:
    task = found.task
    name = ", ".join([task.base or task.name, *task.setting.split()])
    flops = [flops for n in task.values if not math.isnan(flops := task.budget(n).flops)]
    if not flops:
        return name
    if max(flops) <= (1 + TOLERANCE) * min(flops):
        return f"{name}: at {short(sum(flops) / len(flops))} training FLOPs"
    return f"{name}: at {short(min(flops))} to {short(max(flops))} training FLOPs"


def _answer(found: TaskAnalysis) -> tuple[str, bool]:
    best, names = found.best, list(found.results.values)
    if best.router is None:
        return "Every run failed.", False
    if len(names) == 1:
        return f"Only {best.router} was run: there is nothing to choose from.", False
    mean = f"{found.task.metric} {found.mean(best.router).mean:.4g}"
    pairs = [found.pairs[name, best.router] for name in names if name != best.router and name not in best.left_out]
    if pairs and all(pair.verdict in ("untestable", "failed") for pair in pairs):
        why = "one seed shows" if max(pair.seeds for pair in pairs) < 2 else "so few seeds show"
        return f"Nothing can be decided: {why} no spread. {best.router} had the best run, {mean}.", False
    if not best.as_good and not best.worse:
        return f"No router can be told from the best. The best mean is that of {best.router}, {mean}.", False
    flops = {name: found.task.budget(name).flops for name in names}
    least = min((other for other in flops.values() if not math.isnan(other)), default=math.nan)
    if flops[best.router] > (1 + TOLERANCE) * least:
        times = f"{flops[best.router] / least:.2g}"
        return f"{best.router} has the best mean, {mean}, with up to {times} times the FLOPs of others.", False
    if best.is_settled:
        return f"Choose {best.router}{' or one as good' if best.as_good else ''}: {mean}.", True
    return f"{best.router} has the best mean, {mean}, but {_count(best.open)} may be as good or better.", False


def _count(names: Sequence[str]) -> str:
    if not names:
        return "routers with fewer seeds so far"
    return names[0] if len(names) == 1 else f"{len(names)} others"


def _as_good(found: TaskAnalysis) -> str:
    return f"{_list(found.best.as_good)} (within {found.results.metric.stated})" if found.best.as_good else ""


def _open(found: TaskAnalysis) -> str:
    if not found.best.open:
        return ""
    return f"{_list(found.best.open)} (neither different from {found.best.router} nor shown to be as good)"


def cost(found: TaskAnalysis, interval: Interval) -> Interval:
    """Return a difference from the best as a loss: positive where the best is better."""
    if found.results.lower_is_better:
        return interval
    return Interval(-interval.mean, -interval.high, -interval.low)


def _cost(found: TaskAnalysis) -> str:
    best, unit = found.best, found.results.metric.unit
    told = []
    highs = {
        name: cost(found, found.pairs[name, best.router or ""].bounds).high for name in (*best.as_good, *best.open)
    }
    if bounds := {name: high for name, high in highs.items() if not math.isnan(high)}:
        most = max(bounds, key=lambda name: bounds[name])
        less = ", the others less" if len(bounds) > 1 else ""
        told.append(f"{most} at most {_number(max(0.0, bounds[most]))} {unit}{less}")
    if unknown := [name for name in highs if name not in bounds]:
        told.append(f"{_list(unknown)} not known")
    worse = {name: cost(found, found.pairs[name, best.router or ""].difference) for name in best.worse}
    if known := {name: middle for name, middle in worse.items() if not math.isnan(middle.mean)}:
        worst = max(known, key=lambda name: known[name].mean)
        told.append(f"{worst}{', the worst,' if len(known) > 1 else ''} {_shown(known[worst])} {unit}")
    return "; ".join(told)


def _shown(middle: Interval, digits: int = 2) -> str:
    bounds = "" if math.isnan(middle.low) else f" ({_number(middle.low, digits)} to {_number(middle.high, digits)})"
    return f"{_number(middle.mean, digits)}{bounds}"


def _detectable(found: TaskAnalysis) -> str:
    pairs = [pair for name in found.best.open or found.results.values if (pair := found.against_best(name))]
    sizes = [size for pair in pairs if not math.isnan(size := found.outlook(pair).detectable)]
    if not sizes or math.isinf(max(sizes)):
        return ""
    seeds = max(pair.seeds for pair in pairs)
    return f"differences of {_number(max(sizes))} {found.results.metric.unit}, with {seeds} seeds and 80 % power"


def _settle(found: TaskAnalysis) -> str:
    by_count: dict[str, list[str]] = {}
    for name, pair in found.open_pairs():
        by_count.setdefault(_more_seeds(found, pair), []).append(name)
    return "; ".join(f"{more} for {_list(names)}" for more, names in by_count.items())


def _more_seeds(found: TaskAnalysis, pair: Comparison) -> str:
    if math.isnan(pair.error):
        return "at least 5 seeds" if pair.seeds < 5 else "an unknown number of seeds"
    enough = found.outlook(pair).seeds_to_settle
    if enough is None:
        return "more than 1,000 seeds"
    more = max(enough - pair.seeds, 1)
    return f"{more} more seed{'s' if more > 1 else ''}"


def _failed(found: TaskAnalysis) -> str:
    failures = {name: found.task.failures(name) for name in found.task.values}
    return _list([f"{name} {n} of {len(found.task.values[name])}" for name, n in failures.items() if n])


def _unequal(found: TaskAnalysis) -> str:
    told = []
    for what, names in found.unequal().items():
        budgets = {name: found.task.budget(name) for name in names}
        shown = [f"{name} {b.k:g}" if what == "k" else f"{name} {short(b.flops)}" for name, b in budgets.items()]
        told.append(f"{'trained k' if what == 'k' else 'training FLOPs'} ({_list(shown)})")
    return "; ".join(told)


def _over_all(
    found: Mapping[str, TaskAnalysis], analysis: Analysis, computes: Sequence[Compute], baseline: str
) -> Decision:
    candidates = [{one.best.router, *one.best.as_good, *one.best.open} - {None} for one in found.values()]
    everywhere = [name for name in _routers(found) if all(name in some for some in candidates)]
    tried = [name for name in _routers(found) if all(name in one.results.values for one in found.values())]
    if not everywhere:
        answer = "No router is the choice for every task."
    elif len(everywhere) == len(tried) > 1:
        answer = "No router can be told from the best in any task."
    else:
        answer = f"{_list(everywhere)}: in no task shown to be worse than the best."
    best = {name: one.best.router or "none" for name, one in found.items()}
    same = len(set(best.values())) == 1
    lines = {
        "Best mean": f"{next(iter(best.values()))} in all of them"
        if same
        else "; ".join(f"{name}: {router}" for name, router in best.items())
    }
    if analysis.ranks:
        first = sorted(analysis.ranks.items(), key=lambda item: item[1].mean)[:3]
        lines["Mean rank"] = _list([f"{name} {_shown(rank)}" for name, rank in first])
    for compute in computes:
        if (fit := compute.fit) is not None and baseline in fit.routers and len(fit.routers) > 1:
            gains = {name: fit.multiplier(name, baseline) for name in fit.routers if name != baseline}
            turning = [name for name in gains if fit.turns(name, baseline)]
            ordered = sorted(gains.keys() - set(turning), key=lambda name: -gains[name].mean)
            told = [f"{_list([f'{n} {_shown(gains[n], 3)}' for n in ordered])}, against {baseline}"] if ordered else []
            if turning:
                told.append(f"none for {_list(turning)}, which are ahead of it at one budget and behind at another")
            about = f"Compute multiplier, {compute.name}" if len(computes) > 1 else "Compute multiplier"
            lines[about] = "; ".join(told)
    is_settled = all(one.best.is_settled for one in found.values())
    what = (
        "tasks"
        if len({one.task.base or one.task.name for one in found.values()}) == len(found)
        else "tasks and settings"
    )
    return Decision(f"All {len(found)} {what}", answer, is_settled, analysis.is_provisional, lines)


def _routers(found: Mapping[str, TaskAnalysis]) -> Iterable[str]:
    return dict.fromkeys(name for one in found.values() for name in one.results.values)


def _list(names: Sequence[str]) -> str:
    more = [f"and {len(names) - LISTED} more"] if len(names) > LISTED else []
    return ", ".join([*names[:LISTED], *more])


def _number(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}g}" if abs(value) < 100 else f"{value:.0f}"
