"""Sentences that the numbers carry: a difference is named where it is significant and larger than the margin."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from routerzoo.bench.leaderboard.board import Board, Standing
from routerzoo.report.statistics.comparisons import Comparison


class Family(NamedTuple):
    """What a family of routers is good for.

    Args:
        name: see `family_of`.
        routers: its members, best first.
        better: tasks in which a member beats the linear gate, with the best one of them and its difference.
        worse: tasks in which every member that was run loses to it.
    """

    name: str
    routers: list[str]
    better: list[str]
    worse: list[str]


def findings(board: Board) -> list[str]:
    """Return the sentences at the head of the page."""
    found = [*_leader(board), *_best_by_task(board), *_dense(board), *_predicted(board), *_failed(board)]
    return [*found, *(sentence for task in board.realistic for sentence in _excess(board, task))]


def families(board: Board) -> list[Family]:
    """Return what each family of the exact tier is good for, those that are better in more tasks first."""
    groups: dict[str, list[str]] = {}
    for standing in board.standings:
        if standing.family != "control" and not _is_baseline(board, standing):
            groups.setdefault(standing.family, []).append(standing.router)
    found = [Family(name, routers, *_good_and_bad(board, routers)) for name, routers in groups.items()]
    return sorted(found, key=lambda family: (-len(family.better), len(family.worse), family.name))


def _good_and_bad(board: Board, routers: Sequence[str]) -> tuple[list[str], list[str]]:
    better, worse = [], []
    for task in board.tasks:
        known = {router: found for router in routers if (found := board.against_baseline(task, router))}
        wins = {router: found for router, found in known.items() if found.verdict == "better"}
        if wins:
            best = min(wins, key=lambda router: wins[router].difference.mean)
            count = f", {len(wins)} of {len(known)}" if len(known) > 1 else ""
            mark = "" if board.has_common_k(task, best) else "\\*"
            better.append(f"{task} ({best}{mark} {wins[best].difference.mean:+.3f}{count})")
        elif known and all(found.verdict == "worse" for found in known.values()):
            worse.append(task)
    return better, worse


def _leader(board: Board) -> Iterator[str]:
    complete = [one for one in board.standings if board.is_complete(one) and one.family != "control"]
    leader = next((one for one in complete if one.is_comparable), None)
    if leader is None:
        return
    told = f"**Over all {len(board.tasks)} tasks {leader.router} has the lowest regret**, {spread(leader.iqm)} (IQM"
    told += " of all runs" if math.isnan(leader.iqm.low) else ", 95 % interval"
    baseline = next((one for one in complete if _is_baseline(board, one)), None)
    if baseline is None or leader is baseline:
        yield f"{told})."
        return
    counts = _counts(board, leader.router)
    yield f"{told}; {baseline.router} {spread(baseline.iqm)}). {counts} than {baseline.router}."


def _counts(board: Board, router: str) -> str:
    verdicts = {task: found.verdict for task in board.tasks if (found := board.against_baseline(task, router))}
    better = [task for task, verdict in verdicts.items() if verdict == "better"]
    worse = [task for task, verdict in verdicts.items() if verdict == "worse"]
    parts = [f"{word} in {listed(tasks)}" for word, tasks in (("better", better), ("worse", worse)) if tasks]
    return f"It is {' and '.join(parts)}" if parts else "In no task is it significantly better or worse"


def _best_by_task(board: Board) -> Iterator[str]:
    told = []
    for task in board.tasks:
        best = board.best(task)
        if best.router is None:
            continue
        rivals = len(best.as_good) + len(best.open)
        told.append(f"{task}: {best.router}" + (f" (or {rivals} more)" if rivals else ""))
    if told:
        yield (
            "**Best of each task**, of the routers with the common k (in brackets: how many others are not "
            f"significantly worse by more than the margin): {'; '.join(told)}."
        )


def _dense(board: Board) -> Iterator[str]:
    verdicts: dict[str, list[str]] = {"worse": [], "better": [], "": []}
    for task in board.tasks:
        if found := board.against_baseline(task, "dense"):
            verdicts[found.verdict if found.verdict in verdicts else ""].append(task)
    parts = [
        f"a linear gate beats a dense network of equal active size in {listed(verdicts['worse'])}",
        f"is beaten by it in {listed(verdicts['better'])}",
        f"is not told apart from it in {listed(verdicts[''])}",
    ]
    known = [part for part, tasks in zip(parts, verdicts.values(), strict=True) if tasks]
    if known:
        text = ", and ".join(known) if verdicts["worse"] else "a linear gate " + ", and ".join(known)
        yield f"**Where routing pays**: {text}."


def _predicted(board: Board) -> Iterator[str]:
    counts = Counter(outcome.verdict for outcome in board.outcomes)
    if made := counts.total() - counts["not run"]:
        turned = [
            f"{outcome.prediction.better} below {outcome.prediction.worse} in {outcome.task}"
            for outcome in board.outcomes
            if outcome.verdict == "turned"
        ]
        told = f"{counts['held']} held and {counts['inconclusive']} are inconclusive"
        told += f"; the opposite was found of {listed(turned)}" if turned else "; the opposite was found of none"
        yield f"**Of {made} predictions** from theory and papers {told}."


def _failed(board: Board) -> Iterator[str]:
    failing = [f"{one.router} ({one.failed} of {one.runs} runs)" for one in board.standings if one.failed]
    if failing:
        yield f"**Failed runs** count as regret 1: {listed(failing)}."


def _excess(board: Board, task: str) -> Iterator[str]:
    best = board.best(task)
    if best.router is None:
        return
    rivals = [*best.as_good, *best.open]
    told = f"**{task}: {best.router} has the lowest excess** over the reference"
    yield f"{told}; not significantly worse: {listed(rivals)}." if rivals else f"{told}; all others are worse."


def _is_baseline(board: Board, standing: Standing) -> bool:
    return any(standing.router == board.baseline(task) for task in standing.tasks)


def listed(names: Sequence[str]) -> str:
    """Return names as a part of a sentence."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def spread(values: tuple[float, float, float], digits: int = 3) -> str:
    """Return a mean with its interval."""
    mean, low, high = values
    return f"{mean:.{digits}f}" if math.isnan(low) else f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def difference(comparison: Comparison) -> str:
    """Return a difference with its standard error."""
    error = "" if math.isnan(comparison.error) else f" ± {comparison.error:.3f}"
    return f"{comparison.difference.mean:+.3f}{error}"
