"""What a sweep shows: a table on a terminal, lines elsewhere."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from routerzoo.sweep import work
from routerzoo.sweep.ledger import Ledger
from routerzoo.sweep.progress import Progress, headline, progress_of


@pytest.fixture
def runs(tmp_path):
    row = {"stage": "final", "task": "text", "config": "", "test": []}
    ledger = Ledger(tmp_path)
    grid = [(router, seed) for router in ("Linear", "Hyper") for seed in (0, 1)]
    ledger.plan([{**row, "key": f"{r}{s}", "router": r, "variant": r, "seed": s, "folder": f"{r}{s}"} for r, s in grid])
    done, running, failed, waiting = ledger.runs()
    (tmp_path / running.folder).mkdir()
    told = {"step": 30, "total_steps": 120, "metric": 2.5}
    (tmp_path / running.folder / work.PROGRESS).write_text(json.dumps(told))
    return [
        replace(done, status="finished", results={"test": {"headline_metric": "bpb", "loss": 1.9, "bpb": 2.75}}),
        replace(running, status="running"),
        replace(failed, status="failed", reason="the loss is nan at step 7"),
        waiting,
    ]


def test_a_terminal_shows_the_grid(runs, tmp_path):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, color_system=None)
    with Progress(tmp_path, 2, console) as progress:
        progress.ended(runs[0], "finished", "", 60.0, runs)
        progress.show(runs)
    shown = out.getvalue()
    for expected in ("Linear", "seed 1", "✓ bpb 2.7500", "▶ 30/120 2.500", "✗ the loss is nan", "·"):
        assert expected in shown
    assert "1 of 4 finished, 1 running, 1 failed; about 1 min left" in shown


def test_a_log_gets_lines(runs, tmp_path):
    out = io.StringIO()
    with Progress(tmp_path, 2, Console(file=out, width=200)) as progress:
        progress.started(runs[1], resumes=True)
        progress.ended(runs[2], "failed", runs[2].reason, 3.2, runs)
        progress.show(runs)
    assert out.getvalue().splitlines() == [
        "resumed text Linear seed 1: Linear1",
        "[2/4] failed text Hyper seed 0 in 3 s: the loss is nan at step 7",
    ]


def test_what_is_not_there_yet_is_no_error(tmp_path):
    assert progress_of(tmp_path) == "starting"
    (tmp_path / work.PROGRESS).write_text("{")
    assert progress_of(tmp_path) == "starting"
    assert headline({}) == "done"
    assert headline({"test": {"headline_metric": "accuracy", "accuracy": 0.5, "loss": 2.0}}) == "accuracy 0.5000"
