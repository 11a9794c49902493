"""What a report says in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from routerzoo.costs import short
from routerzoo.report.analysis import Analysis, TaskAnalysis
from routerzoo.report.collect import Sweep


def findings(sweep: Sweep, analysis: Analysis) -> list[str]:
    """Return the findings: what the whole report is subject to, each task in a sentence or a few, and the ranks."""
    told = [*_conditions(sweep, analysis)]
    told += [" ".join(_of_task(name, found, sweep.baseline)) for name, found in analysis.tasks.items()]
    if analysis.ranks:
        told.append(_ranking(analysis))
    return told


def _conditions(sweep: Sweep, analysis: Analysis) -> Iterable[str]:
    failed = sum(run.status == "failed" for run in sweep.runs)
    pending = sum(run.status in ("waiting", "running") for run in sweep.runs)
    trials = f" and {sweep.pending_trials} trials" if sweep.pending_trials else ""
    if analysis.is_provisional:
        yield (
            f"Provisional: {pending} of {len(sweep.runs)} runs{trials} are pending. Until they are done, a verdict "
            f"needs a corrected p below {analysis.alpha:g}, so that looking early finds nothing false."
        )
    if failed:
        yield f"{failed} of {len(sweep.runs)} runs failed; they count as the worst of their task."
    for task in dict.fromkeys(run.task for run in sweep.runs if run.status == "failed"):
        if task not in analysis.tasks:
            yield f"{task}: no run has finished."
    measured = {found.task.metric for found in analysis.tasks.values()}
    for name in sweep.margins if measured else ():
        if name not in measured:
            yield f"The margin for {name} has no effect: the tasks are measured in {_list(sorted(measured))}."


def _of_task(name: str, found: TaskAnalysis, baseline: str) -> Iterable[str]:
    best, stated = found.best, found.results.metric.stated
    if best.router is None:
        yield f"{name}: no router has finished."
        return
    worse = [router for router in best.worse if not found.results.has_failed(router)]
    mean = f"the best mean {found.task.metric} is {found.mean(best.router).mean:.4f}, of {best.router}"
    if best.is_settled and worse:
        is_all = len(worse) == len(found.results.values) - 1
        yield f"{name}: {mean}, significantly better than {'all others' if is_all else _list(worse)}."
    else:
        yield f"{name}: {mean}."
    if best.as_good:
        yield f"As good, within {stated}: {_list(best.as_good)}."
    if best.open:
        yield f"Not significantly different from it, nor shown to be as good: {_list(best.open)}."
    if worse and not best.is_settled:
        yield f"Significantly worse: {_list(worse)}."
    if best.left_out:
        yield f"Left out, with fewer seeds: {_list(best.left_out)}."
    yield from _against_baseline(found, baseline)
    yield from _outlook(found)
    if failures := [f"{variant} {count}" for variant in found.task.values if (count := found.task.failures(variant))]:
        yield f"Failed runs: {_list(failures)}."
    yield from _budgets(found)


VERDICTS = {
    "better": "better",
    "negligibly better": "better, but by less than the margin",
    "equivalent": "equivalent",
    "negligibly worse": "worse, but by less than the margin",
    "worse": "worse",
    "failed": "failed at every seed",
    "inconclusive": "inconclusive",
    "untestable": "not testable",
}


def _against_baseline(found: TaskAnalysis, baseline: str) -> Iterable[str]:
    by_verdict: dict[str, list[str]] = {verdict: [] for verdict in VERDICTS}
    for variant in found.results.values:
        if comparison := found.against_baseline(variant):
            by_verdict[comparison.verdict].append(variant)
    told = [f"{VERDICTS[verdict]}: {_list(names)}" for verdict, names in by_verdict.items() if names]
    if told:
        yield f"Against {baseline}, {'; '.join(told)}."


def _outlook(found: TaskAnalysis) -> Iterable[str]:
    """Say what the seeds at hand can show, and what more of them could, of the pairs with the best that are open."""
    outlooks = {name: found.outlook(comparison) for name, comparison in found.open_pairs()}
    known = {name: outlook for name, outlook in outlooks.items() if not math.isnan(outlook.detectable)}
    if not known:
        return
    largest, unit = max(outlook.detectable for outlook in known.values()), found.results.metric.unit
    yield f"With so many seeds, differences of {largest:.2g} {unit} are found with 80 % power."
    if found.results.metric.margin is None:
        yield f"Equivalence is not tested: {unit} has no margin (give the sweep margin: {{{unit}: ...}})."
    elif not any(outlook.can_show_equivalence for outlook in known.values()):
        yield f"Equivalence within {found.results.metric.stated} cannot be shown with so few seeds, whatever they give."
    enough = [f"{name} {o.seeds_to_settle}" for name, o in known.items() if o.seeds_to_settle is not None]
    if enough:
        yield f"Seeds that would settle it, should the differences stay: {_list(enough)}."
    if more := [name for name, outlook in known.items() if outlook.seeds_to_settle is None]:
        yield f"More than 1,000 seeds: {_list(more)}."


def _budgets(found: TaskAnalysis) -> Iterable[str]:
    for what, names in found.unequal().items():
        baselines = list(dict.fromkeys(found.results.baselines[name] for name in names))
        budgets = {name: found.task.budget(name) for name in [*baselines, *names]}
        shown = [f"{n} {b.k:g}" if what == "k" else f"{n} {short(b.flops)}" for n, b in budgets.items()]
        consequence = ": differences between them are those of budgets, too" if what == "FLOPs" else ""
        yield f"Not trained with equal {what} ({_list(shown)}){consequence}."


def _ranking(analysis: Analysis) -> str:
    lowest = min(middle.mean for middle in analysis.ranks.values())
    first = [name for name, middle in analysis.ranks.items() if math.isclose(middle.mean, lowest)]
    has = "has the best mean rank" if len(first) == 1 else "share the best mean rank"
    sentence = f"Over {len(analysis.tasks)} tasks {' and '.join(first)} {has}, {lowest:.2f}; a description, no test."
    if all(math.isnan(middle.low) for middle in analysis.ranks.values()):
        sentence += " Intervals of ranks need five seeds."
    return sentence


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)
