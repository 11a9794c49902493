"""The page: findings, pictures and tables as Markdown, and the pictures beside it."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment

from routerzoo.bench.controls import CONTROLS
from routerzoo.bench.leaderboard.board import Board, Standing, title
from routerzoo.bench.leaderboard.families import OTHER
from routerzoo.bench.leaderboard.findings import MOST, cost, difference, families, findings, spread
from routerzoo.bench.leaderboard.pictures import heat_map, profiles
from routerzoo.bench.leaderboard.record import Record, read_record
from routerzoo.bench.realistic.scopes import SCOPES
from routerzoo.bench.rows import Row
from routerzoo.bench.scores import Summary, scales
from routerzoo.report.statistics.intervals import around
from routerzoo.report.statistics.margins import metric
from routerzoo.runs.atomic import atomic_write

TAUS = (0.1, 0.25, 0.5, 0.75, 1.0)
"""Of the table of profiles."""


class Table(NamedTuple):
    """Rows of text; `left` counts the columns that are not numbers."""

    columns: Sequence[str]
    rows: list[list[str]]
    left: int = 1


def publish(sources: Sequence[Path], out: Path) -> list[Path]:
    """Write the record, the page and the pictures; return their paths.

    Args:
        sources: folders of benchmarks, their rows, or a record.
        out: the page. Its name without the ending begins the names of all others.

    Raises:
        UserError: a source is missing or holds no rows.
    """
    record = read_record(sources)
    table = out.with_suffix(".csv")
    out.parent.mkdir(parents=True, exist_ok=True)
    record.write(table)
    texts = pages(record, out.stem)
    for name, text in texts.items():
        atomic_write(out.with_name(name), text)
    return [table, *map(out.with_name, texts)]


def pages(record: Record, stem: str) -> dict[str, str]:
    """Return the page and its pictures by the names of their files."""
    board = Board(record)
    names = {"regret": f"{stem}_regret.svg", "profiles": f"{stem}_profiles.svg"}
    content: dict[str, Any] = {
        "stem": stem,
        "pictures": names,
        "findings": findings(board),
        "best": _best(board),
        "families": _families(board),
        "standings": _standings(board),
        "regrets": _regrets(board),
        "settings": _settings(board),
        "routing": _routing(board),
        "shares": _shares(board),
        "outcomes": _outcomes(board),
        "realistic": {task: _realistic(board, task) for task in board.realistic},
        "reasons": _reasons(board),
        "provenance": list(_provenance(board)),
        "tasks": board.tasks,
        "margin": metric("regret").margin,
        "baseline": next(filter(None, map(board.baseline, board.tasks)), ""),
    }
    text = files("routerzoo.bench.leaderboard").joinpath("page.md.jinja").read_text(encoding="utf-8")
    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(text).render(content)
    found = {f"{stem}.md": re.sub(r"\n{3,}", "\n\n", page).strip() + "\n"}
    if board.tasks:
        found[names["regret"]] = heat_map(board)
    if content["shares"].rows:
        found[names["profiles"]] = profiles(board)
    return found


def _best(board: Board) -> Table:
    rows = []
    for task in board.tasks:
        best, baseline = board.best(task), board.baseline(task)
        rivals = [*best.as_good, *best.open]
        cells = [task, title(task) or "-", "-", ", ".join(rivals) if len(rivals) <= MOST else f"{len(rivals)} routers"]
        cells += [_regret(board, task, router) for router in (best.router or "", baseline, "dense")]
        if best.router is not None:
            cells[2] = f"{best.router}{cost(board, best.router, [task])}"
        rows.append([cell or "-" for cell in cells])
    columns = ["task", "what tells the domain", "best", "not shown to be worse", "regret", "of the linear gate"]
    return Table([*columns, "of dense"], rows, 4)


def _families(board: Board) -> Table:
    rows = [
        [family.name, ", ".join(family.routers), "; ".join(family.better) or "-", ", ".join(family.worse) or "-"]
        for family in families(board)
    ]
    return Table(["family", "routers", "better in (best router, difference, how many)", "all worse in"], rows, 4)


def _standings(board: Board) -> Table:
    rows = []
    for place, one in enumerate(board.standings, 1):
        low, high = (f"{k:.1f}" for k in one.k)
        cells = [
            str(place) if board.is_complete(one) else "-",
            _label(one),
            one.family,
            spread(one.mean),
            spread(one.iqm),
        ]
        cells += [spread(one.improvement, 2) if not math.isnan(one.improvement.mean) else "-"]
        cells += [low if low == high else f"{low} to {high}", _number(one.flops, 2)]
        cells += [f"{one.failed} of {one.runs}" if one.failed else "-", f"{len(one.tasks)} of {len(board.tasks)}"]
        rows.append(cells)
    baseline = next(filter(None, map(board.baseline, board.tasks)), "the linear gate")
    columns = [
        "",
        "router",
        "family",
        "mean regret",
        "IQM",
        f"P(better than {baseline})",
        "k",
        "FLOPs",
        "failed",
        "tasks",
    ]
    return Table(columns, rows, 3)


def _regrets(board: Board) -> Table:
    best = {task: board.best(task).router for task in board.tasks}
    rows = []
    for one in board.standings:
        cells = [_label(one)]
        for task in board.tasks:
            text = _regret(board, task, one.router)
            cells.append(f"**{text}**" if best[task] == one.router else text)
        rows.append(cells)
    return Table(["router", *board.tasks], rows)


def _regret(board: Board, task: str, router: str) -> str:
    summary = board.summary(task, router)
    if summary is None:
        return "n/a" if (task, router) in board.refused else "-"
    half, failed = summary.half_width, len(summary.failures)
    text = f"{summary.regret:.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")
    return text + (f" † {failed}" if failed else "")


def _settings(board: Board) -> Table:
    rows = []
    for label in ["oracle", "blind", *(one.router for one in board.standings)]:
        cells = [label]
        for task in board.tasks:
            summary = board.summary(task, label)
            cells.append("-" if summary is None else _setting(summary, board.has_common_k(task, label)))
        rows.append(cells)
    return Table(["router", *board.tasks], rows)


def _setting(summary: Summary, has_common_k: bool) -> str:
    """Return the tuned learning rate, the factor on auxiliary losses where it is not 1, and k where it is its own."""
    row = summary.scores[0].row
    text = f"{row.lr:g}" + (f", aux x {row.aux_scale:g}" if row.aux_scale != 1 else "")
    return text if has_common_k else f"{text}; k {_number(summary.mean('mean_k'), 1)}"


def _routing(board: Board) -> Table:
    """Return what the routing is like, means over tasks; the correlation with need is of the tasks that tell it."""
    columns = {"nmi": 2, "dead_experts": 1, "max_load": 1, "load_entropy": 2, "need_correlation": 2}
    rows = []
    for one in board.standings:
        means = {name: [board.found[task, one.router].mean(name) for task in one.tasks] for name in columns}
        known = {name: [value for value in values if not math.isnan(value)] for name, values in means.items()}
        cells = [_number(statistics.fmean(known[name]), columns[name]) if known[name] else "-" for name in columns]
        rows.append([_label(one), *cells])
    return Table(["router", "NMI", "dead experts", "largest load", "load entropy", "correlation of k and need"], rows)


def _shares(board: Board) -> Table:
    places = [board.thresholds.index(tau) for tau in TAUS]
    complete = [one for one in board.standings if board.is_complete(one)]
    rows = [[_label(one), *(f"{one.profile_X[place]:.2f}" for place in places)] for one in complete]
    return Table(["router", *(f"≤ {tau:g}" for tau in TAUS)], rows)


def _outcomes(board: Board) -> Table:
    rows = []
    for outcome in board.outcomes:
        prediction = outcome.prediction
        told = f"**{outcome.verdict}**" if outcome.verdict == "turned" else outcome.verdict
        compared = "-" if outcome.comparison is None else difference(outcome.comparison)
        if outcome.comparison is not None and outcome.task in board.realistic:
            compared += " bits"
        better, worse = prediction.better, prediction.worse
        rows.append([outcome.task, f"{better} below {worse}", prediction.source, told, compared])
    return Table(["task", "prediction", "because", "outcome", "difference"], rows, 4)


def _realistic(board: Board, task: str) -> Table:
    results, rows = board.results[task], []
    excess = {label: sum(values.values()) / len(values) for label, values in results.values.items()}
    best = board.best(task).router
    for label in sorted(excess, key=lambda label: excess[label]):
        summary, values = board.found[task, label], list(results.values[label].values())
        mark = "" if label in CONTROLS or board.has_common_k(task, label) else " \\*"
        text = _mean(values)
        compared = board.against_baseline(task, label)
        verdict = "-" if compared is None else compared.verdict
        cells = [label + mark, f"**{text}**" if label == best else text, verdict, f"{summary.regret:.3f}"]
        cells += [_by_layer(summary), _number(summary.mean("load_entropy"), 3)]
        cells += [_number(summary.mean("dead_experts"), 1), _setting(summary, True), str(len(summary.failures) or "-")]
        rows.append(cells)
    named = f"against {board.baseline(task) or 'the linear gate'}"
    head = ["router or scope", "excess bits per byte", named, "regret", "NMI by layer", "load entropy", "dead"]
    return Table([*head, "learning rate", "failed"], rows)


def _mean(values: Sequence[float]) -> str:
    """Return the mean with half of its 95 % interval; nothing but the mean where all are equal."""
    count, mean = len(values), sum(values) / len(values)
    if count < 2 or len(set(values)) == 1:
        return f"{mean:.3f}"
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return f"{mean:.3f} ± {around(mean, error, count - 1, 0.95).high - mean:.3f}"


def _by_layer(summary: Summary) -> str:
    layers = [[float(nmi) for nmi in score.row.nmi_by_layer.split()] for score in summary.scores]
    known = list(zip(*filter(None, layers), strict=True))
    return " ".join(f"{sum(layer) / len(layer):.2f}" for layer in known) or "-"


def _reasons(board: Board) -> list[str]:
    """Say what was not applicable and what failed, and why; of tuning, where."""
    refused: dict[tuple[str, str], list[str]] = {}
    for (task, router), row in board.refused.items():
        refused.setdefault((router, row.reason), []).append(task)
    told = [f"{router}, not applicable in {', '.join(tasks)}: {why}" for (router, why), tasks in refused.items()]
    failed = Counter((row.router, row.task, row.reason) for row in board.failed)
    told += [f"{router}, {count} failed in {task}: {why}" for (router, task, why), count in failed.items()]
    return told + [
        f"{one.router}, {one.failed} of {one.runs} tuning runs failed in {one.task}, at learning rate {one.lr:g}"
        for one in board.record.tuning
        if one.failed
    ]


def _provenance(board: Board) -> Iterator[str]:
    final = [row for row in board.record.rows if row.status != "not applicable"]
    tuning = board.record.tuning
    tuned = sum(setting.runs for setting in tuning)
    yield f"{len(final):,} final runs and {tuned:,} of tuning, {board.record.seconds:,.0f} CPU-seconds in all."
    if board.left_out:
        yield f"**Left out**, since they have no runs of a router beside oracle and blind: {', '.join(board.left_out)}."
    without = Counter((task, why) for (task, _), why in scales(board.record.rows).items() if isinstance(why, str))
    for (task, why), count in without.items():
        yield f"**No regret** in {task} for {count} of its seeds, which are left out: {why}."
    for tier, tasks in (("Exact", board.tasks), ("Realistic", board.realistic)):
        rows = [row for row in final if row.task in tasks]
        if not rows:
            continue
        tried = [setting for setting in tuning if setting.task in tasks]
        how = "not tuned"
        if tried:
            rates, factors = (sorted({getattr(one, key) for one in tried}) for key in ("lr", "aux_scale"))
            how = f"tuned over learning rates {_numbers(rates)} and factors {_numbers(factors)} on auxiliary losses"
            chosen = {(row.task, row.router): row.lr for row in rows}
            edges = sum(lr in (rates[0], rates[-1]) for lr in chosen.values())
            how += f" ({edges} of {len(chosen)} chose the lowest or highest rate, so that others may be better)"
        codes = Counter("+".join(row.code.split("+")[:2]) for row in rows)
        counted = ", ".join(f"{code} ({count:,} runs)" for code, count in codes.items())
        made = f"code (version and digest of the sources) {counted if len(codes) == 1 else f'**{counted}**'}"
        yield f"{tier} tier: {_seeds(rows)}; {_steps(rows)}; {how}; {made}."
        if command := _command(board.record, rows):
            yield f"Its runs: `{command}`"


def _command(record: Record, rows: Sequence[Row]) -> str:
    """Return what makes a tier's final runs; nothing where a label does not tell which router it is."""
    labels = sorted({row.router for row in rows} - CONTROLS.keys())
    scopes = [scope.label for scope in SCOPES]
    if set(scopes) <= set(labels):
        labels = ["scopes", *(label for label in labels if label not in scopes)]
    if any(record.families.get(label, OTHER) == OTHER for label in labels if label != "scopes"):
        return ""
    tasks, seeds = sorted({row.task for row in rows}), len({row.seed for row in rows})
    return f"python -m routerzoo bench --seeds {seeds} --tasks {' '.join(tasks)} --routers {' '.join(labels)}"


def _seeds(rows: Sequence[Row]) -> str:
    counts = Counter((row.task, row.router) for row in rows).values()
    most, fewer = max(counts), sum(count < max(counts) for count in counts)
    return f"{most} seeds" + (f" (fewer in {fewer} of {len(counts)} pairs of router and task)" if fewer else "")


def _steps(rows: Iterable[Row]) -> str:
    steps = sorted({row.steps for row in rows})
    return f"{steps[0]} steps" if len(steps) == 1 else f"{steps[0]} to {steps[-1]} steps"


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _label(standing: Standing) -> str:
    return standing.router if standing.is_comparable else f"{standing.router} \\*"


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"
