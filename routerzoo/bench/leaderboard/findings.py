"""Sentences that the numbers carry: a difference is named where it is significant and larger than the margin."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from routerzoo.bench.leaderboard.board import OVERALL, Board, Standing
from routerzoo.report.statistics.comparisons import Comparison

MOST = 5
"""Routers that a sentence on failures names."""
COSTLY = 1.1
"""Training FLOPs over those of the linear gate, from which a sentence names them."""


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
    found = [*_leader(board), *_winners(board), *_dense(board), *_predicted(board)]
    return [
        *found,
        *_failed(board),
        *_refused(board),
        *_copied(board),
        *(sentence for task in board.realistic for sentence in _excess(board, task)),
    ]


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
            mark = "" if board.has_common_k(task, best) else "\\*"
            named = f"{best}{mark} " if len(routers) > 1 else mark
            count = f", {len(wins)} of {len(known)}" if len(routers) > 1 else ""
            better.append(f"{task} ({named}{wins[best].difference.mean:+.2f}{count})")
        elif known and all(found.verdict == "worse" for found in known.values()):
            worse.append(task)
    return better, worse


def _leader(board: Board) -> Iterator[str]:
    if OVERALL not in board.results:
        return
    best = board.best(OVERALL)
    if best.router is None:
        return
    standings = {one.router: one for one in board.standings}
    named = f"{best.router}{cost(board, best.router, board.tasks)}"
    told = f"**Over all {len(board.tasks)} tasks {named} has the lowest mean regret**"
    told += f", {spread(standings[best.router].mean)}"
    baseline = board.baseline(board.tasks[0])
    if baseline in standings and baseline != best.router:
        told += f"; {baseline} has {spread(standings[baseline].mean)}"
    rivals = [*best.as_good, *best.open]
    told += (
        f". Not shown to be worse: {listed(rivals)}."
        if rivals
        else ". All others with the common k that were run in every task are significantly worse."
    )
    if baseline and baseline != best.router:
        told += f" {_counts(board, best.router, baseline)}."
    yield told + "".join(f" {sentence}" for sentence in _without_one(board, best.router))


def _without_one(board: Board, leader: str) -> Iterator[str]:
    """Say where a single task makes the lead: without it another router has the lowest mean."""
    candidates = [label for label in board.results[OVERALL].values if board.is_candidate(OVERALL, label)]
    for left_out in board.tasks if len(board.tasks) > 2 else []:
        means = {
            label: statistics.fmean(board.found[task, label].regret for task in board.tasks if task != left_out)
            for label in candidates
        }
        first = min(means, key=lambda label: means[label])
        if first != leader:
            yield f"Without {left_out} {first} has the lowest, {means[first]:.3f}; {leader} has {means[leader]:.3f}."


def cost(board: Board, router: str, tasks: Sequence[str]) -> str:
    """Return in brackets how many times the linear gate's training FLOPs a router takes; nothing if about as many."""
    flops = board.flops(router, tasks) if all(map(board.baseline, tasks)) else math.nan
    return f" ({flops:.2g} x FLOPs)" if flops >= COSTLY else ""


def _counts(board: Board, router: str, baseline: str) -> str:
    verdicts = {task: found.verdict for task in board.tasks if (found := board.against_baseline(task, router))}
    better = [task for task, verdict in verdicts.items() if verdict == "better"]
    worse = [task for task, verdict in verdicts.items() if verdict == "worse"]
    parts = [f"{word} in {listed(tasks)}" for word, tasks in (("better", better), ("worse", worse)) if tasks]
    return f"Against {baseline} it is {' and '.join(parts) or 'in no task significantly better or worse'}"


def _winners(board: Board) -> Iterator[str]:
    """Say where a router with the common k beats the linear gate, and where none is shown to."""
    winners, none = [], []
    for task in filter(board.baseline, board.tasks):
        rivals = [label for label in board.labels[task] if board.is_candidate(task, label)]
        compared = {label: found for label in rivals if (found := board.against_baseline(task, label))}
        better = [label for label, found in compared.items() if found.verdict == "better"]
        if better:
            first = min(better, key=lambda label: compared[label].difference.mean)
            others = f" and {len(better) - 1} more" if len(better) > 1 else ""
            gain = (
                f"{compared[first].difference.mean:+.3f}{cost(board, first, [task]).replace(' (', ', ', 1).rstrip(')')}"
            )
            winners.append(f"{task} {first} ({gain}){others}")
        elif compared:
            none.append(task)
    if winners or none:
        told = f": in {'; in '.join(winners)}" if winners else ""
        told += f"{'; in' if winners else ': in'} {listed(none)} none is shown to be" if none else ""
        baseline = next(filter(None, map(board.baseline, board.tasks)))
        yield f"**Better than {baseline}**, of the routers with the common k{told}."


def _dense(board: Board) -> Iterator[str]:
    verdicts: dict[str, list[str]] = {"worse": [], "better": [], "equivalent": [], "": []}
    for task in board.tasks:
        if found := board.against_baseline(task, "dense"):
            verdict = "equivalent" if _is_small(found) else found.verdict
            verdicts[verdict if verdict in verdicts else ""].append(task)
    parts = [
        f"a linear gate beats a dense network of equal active size in {listed(verdicts['worse'])}",
        f"is beaten by it in {listed(verdicts['better'])}",
        f"differs from it by less than the margin in {listed(verdicts['equivalent'])}",
        f"is not told from it in {listed(verdicts[''])}",
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
        small = f"{counts['negligible']} by less than the margin, " if counts["negligible"] else ""
        told = f"{counts['held']} held, {small}{counts['inconclusive']} remained open, and "
        told += f"{len(turned)} turned: {listed(turned)}" if turned else "none turned"
        yield f"**Of {made} predictions** from theory and papers {told}."


def _failed(board: Board) -> Iterator[str]:
    failing = sorted((one for one in board.standings if one.failed), key=lambda one: -one.failed)
    if failing:
        most = listed([f"{one.router} ({one.failed} of {one.runs})" for one in failing[:MOST]])
        count, runs = sum(one.failed for one in failing), sum(one.runs for one in board.standings)
        told = f"**{count:,} of {runs:,} runs failed** and count as regret 1"
        yield f"{told}: of {most}." if len(failing) <= MOST else f"{told}: of {len(failing)} routers, most of {most}."


def _refused(board: Board) -> Iterator[str]:
    refused = Counter(router for task, router in board.refused if task in board.tasks)
    nowhere = sorted(router for router, count in refused.items() if count == len(board.tasks))
    if nowhere:
        yield f"**Not applicable in any task**: {listed(nowhere)}."


def _copied(board: Board) -> Iterator[str]:
    if board.copies:
        told = listed([f"{router} those of {other}" for router, other in sorted(board.copies.items())])
        yield f"**Not compared**, since they made another router's runs, to the digit: {told}."


def _excess(board: Board, task: str) -> Iterator[str]:
    best = board.best(task)
    if best.router is None:
        return
    rivals = [*best.as_good, *best.open]
    others = [one for one in board.results[task].values if board.is_candidate(task, one) and one != best.router]
    worse = [router for router in others if router not in rivals]
    if not rivals:
        told = f"**In {task}, {best.router} has the lowest excess** over the reference"
        yield f"{told}. All others are significantly worse."
    elif len(worse) < len(rivals):
        told = f"**In {task}, {len(rivals) + 1} of {len(others) + 1} are not told from the best**: {best.router}, which"
        told += f" has the lowest excess over the reference, {listed(rivals)}"
        yield f"{told}. Significantly worse: {listed(worse)}." if worse else f"{told}."
    else:
        told = f"**In {task}, {best.router} has the lowest excess** over the reference"
        yield f"{told}. Not shown to be worse: {listed(rivals)}."


def _is_small(found: Comparison) -> bool:
    """Whether a difference is shown to be within the margin."""
    return found.verdict in ("equivalent", "negligibly better", "negligibly worse")


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
