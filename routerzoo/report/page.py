"""The report's files: a self-contained HTML page, Markdown, and tables as CSV."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2 import Environment
from markupsafe import Markup

from routerzoo.report import sections, tables
from routerzoo.report.analysis import analyze
from routerzoo.report.collect import Sweep, differences
from routerzoo.report.compute import by_compute
from routerzoo.report.decision import Decision, decide
from routerzoo.report.findings import findings
from routerzoo.report.palette import GLYPHS, GRID, INK, PAPER, styles
from routerzoo.runs.atomic import atomic_write
from routerzoo.runs.folder import CONFIG, LOGS, RESULTS
from routerzoo.sweep.ledger import THEN, Run
from routerzoo.sweep.progress import progress_of
from routerzoo.sweep.work import CELL, LOG

LARGEST_DIFFERENCES = 12
RUN_FILES = (LOG, CELL, CONFIG, RESULTS, f"{LOGS}/metrics.csv", "routing.png", "look.html")
"""What a run may have left that the page links to."""


class Report(NamedTuple):
    """The files that were written, the decisions, and the findings in sentences."""

    files: list[Path]
    decisions: list[Decision]
    findings: list[str]


def write_report(sweep: Sweep, *, refresh: float | None = None) -> Report:
    """Write the report into the sweep's folder.

    Args:
        sweep: the runs.
        refresh: seconds after which the page loads itself again.
    """
    known = styles(list(dict.fromkeys(run.router for run in sweep.runs)), sweep.baseline)
    analysis = analyze(sweep)
    computes = by_compute(sweep, analysis)
    means = tables.mean_rows(analysis)
    main = [analysis.tasks[task.name] for task in sweep.main_tasks()]
    parts = [
        *sections.joined(
            "compute", "Quality and compute", [sections.by_compute(found, known, sweep.baseline) for found in computes]
        ),
        *[sections.of_task(found, known, f"task-{place}") for place, found in enumerate(main)],
        *sections.joined("tuning", "Tuned and untuned", sections.tuned(sweep, analysis, known, means)),
        *([sections.over_all(analysis, known)] if analysis.ranks else []),
    ]
    counts = Counter(dict.fromkeys(("waiting", "running", "finished", "failed"), 0))
    counts.update(run.status for run in sweep.runs)
    content: dict[str, Any] = {
        "sweep": sweep,
        "refresh": refresh,
        "styles": known,
        "glyphs": GLYPHS,
        "colors": {INK: "currentColor", GRID: "var(--grid)", PAPER: "var(--paper)"},
        "decisions": (decisions := decide(sweep, analysis, computes)),
        "findings": (sentences := findings(sweep, analysis)),
        "results": [sections.results(found, means, known) for found in main],
        "sections": parts,
        "runs": [(run, _value(run)) for run in sweep.runs],
        "missing": [run for run in sweep.runs if run.status in ("failed", "running")],
        "progress": lambda run: progress_of(sweep.folder / run.folder),
        "counts": {**counts, "pending": counts["waiting"] + counts["running"]},
        "codes": (codes := sorted({run.code for run in sweep.runs if run.status == "finished" and run.code})),
        "mixed": len(codes) > 1 or any(THEN in code for code in codes),
        "hosts": sorted({run.host for run in sweep.runs if run.host}),
        "earlier": [(run, _what_differs(run, sweep.runs)) for run in sweep.earlier],
        "analysis": analysis,
        "log": LOG,
        "run_files": lambda run: [name for name in RUN_FILES if (sweep.folder / run.folder / name).is_file()],
        "commands": _commands(sweep),
    }
    csvs = {
        "means.csv": means,
        "comparisons.csv": tables.comparison_rows(analysis),
        "ranking.csv": [{"router": name, **middle._asdict()} for name, middle in analysis.ranks.items()],
        "front.csv": tables.front_rows(computes),
        "scaling.csv": tables.scaling_rows(computes, sweep.baseline),
        "multipliers.csv": tables.multiplier_rows(computes, sweep.baseline),
        "scaling_curves.csv": tables.scaling_curve_rows(computes),
        "by_k.csv": tables.by_k_rows(sweep),
        "curves.csv": tables.curve_rows(sweep),
        "runs.csv": tables.run_rows(sweep),
    }
    trials = [sections.TUNING] if (sweep.folder / sections.TUNING).is_file() else []
    content["files"] = [*(name for name, rows in csvs.items() if rows), *trials, "report.md"]
    written = {
        "report.html": _template("page.html.jinja", escape=True).render(content),
        "report.md": re.sub(r"\n{3,}", "\n\n", _template("page.md.jinja", escape=False).render(content)),
        **{name: tables.to_csv(rows) for name, rows in csvs.items()},
    }
    for name, text in written.items():
        atomic_write(sweep.folder / name, text)
    return Report([sweep.folder / name for name in written], decisions, sentences)


def _commands(sweep: Sweep) -> dict[str, str]:
    folder = shlex.quote(str(sweep.folder))
    again = f"python -m routerzoo sweep --config {shlex.quote(sweep.config)} --folder {folder}"
    if not sweep.config:
        return {}
    return {"these runs": again, "this page": f"python -m routerzoo report {folder}", "every run": f"{again} --print"}


def _value(run: Run) -> float | None:
    tested = run.results.get("test", {})
    value = tested.get(tested.get("headline_metric"))
    return None if value is None else float(value)


def _what_differs(run: Run, planned: Sequence[Run]) -> str:
    """Describe how an earlier run differs from the most similar planned one."""
    alike = [other for other in planned if (other.task, other.router, other.seed) == (run.task, run.router, run.seed)]
    if not alike:
        return "no run of this task, router and seed is planned"
    found = min((differences(run.config, other.config) for other in alike), key=len)
    if not found:
        return f"other options of the test: {' '.join(run.test) or 'none'}"
    more = f" and {len(found) - LARGEST_DIFFERENCES} more" if len(found) > LARGEST_DIFFERENCES else ""
    return "; ".join(found[:LARGEST_DIFFERENCES]) + more


def _template(name: str, *, escape: bool) -> Any:
    read = files("routerzoo.report").joinpath
    environment = Environment(autoescape=escape, trim_blocks=True, lstrip_blocks=True)
    environment.globals["include_text"] = lambda name: Markup(read(name).read_text(encoding="utf-8"))
    environment.filters["link"] = lambda path: quote(str(path))
    return environment.from_string(read(name).read_text(encoding="utf-8"))
