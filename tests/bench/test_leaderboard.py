import math
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from routerzoo.__main__ import main
from routerzoo.bench.leaderboard.board import OVERALL, Board
from routerzoo.bench.leaderboard.families import family_of
from routerzoo.bench.leaderboard.findings import families, findings
from routerzoo.bench.leaderboard.page import pages, publish
from routerzoo.bench.leaderboard.record import Record, read_record
from routerzoo.bench.rows import COLUMNS, Row, row_text
from routerzoo.errors import UserError

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
AGAIN = "write it again: python -m routerzoo bench --board router_bench.csv --out router_bench.md in its folder"
SEEDS = 8
WAVE = (0.003, -0.002, 0.001, -0.004, 0.002, 0.004, -0.001, -0.003)
"""Noise of a seed, with a mean of 0."""


def final(task, router, seed, loss, **more):
    known = {"k": 2, "mean_k": 2.0, "train_k": 2.0, "train_flops": 1e9, "seconds": 0.5, "nmi_by_layer": "0.5"}
    status = "finished" if loss is not None else "failed"
    return Row(task, router, "final", seed, 200, 0.03, 1.0, status, loss=loss, **{**known, **more})


def runs(task, router, regret, wave=1.0, **more):
    """With an oracle at 1 and a blind run at 3, so that a regret of r is a loss of 1 + 2 r."""
    return [final(task, router, seed, 1 + 2 * (regret + wave * WAVE[seed]), **more) for seed in range(SEEDS)]


def controls(task):
    return [*runs(task, "oracle", 0.0, 0.0), *runs(task, "blind", 1.0, 0.0), *runs(task, "dense", 0.8, 0.5)]


ROWS = [
    *controls("clusters"),
    *controls("ids"),
    *runs("clusters", "LinearRouter", 0.2),
    *runs("ids", "LinearRouter", 0.7),
    *runs("clusters", "HashRouter", 1.0, -1.0),
    *runs("ids", "HashRouter", 0.4, -1.0),
    *runs("clusters", "XMoERouter", 0.2005, -1.0),
    *runs("ids", "XMoERouter", 0.7, 2.0)[:-2],
    *(final("ids", "XMoERouter", seed, None, reason="DivergedError: nan") for seed in (SEEDS - 2, SEEDS - 1)),
    *runs("clusters", "TopPRouter", 0.1, -1.0, k=None, mean_k=3.0, train_k=5.0, train_flops=2.5e9),
    Row("ids", "TopPRouter", "final", 0, 200, 0.03, 1.0, "not applicable", reason="it is not causal"),
]
FAMILIES = {"LinearRouter": "linear", "HashRouter": "frozen", "XMoERouter": "xmoe", "TopPRouter": "dynamic"}


@pytest.fixture(scope="module")
def board():
    return Board(Record(tuple(ROWS), (), FAMILIES))


def test_the_committed_page_follows_from_its_rows(tmp_path):
    committed = sorted(RESULTS.glob("router_bench*"))
    publish([RESULTS / "router_bench.csv"], tmp_path / "router_bench.md")
    assert [path.name for path in committed] == sorted(path.name for path in tmp_path.iterdir())
    for path in committed:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), f"{path.name}: {AGAIN}"


def test_standings_are_means_over_tasks(board):
    found = {standing.router: standing for standing in board.standings}
    assert [standing.router for standing in board.standings] == [
        "LinearRouter",
        "XMoERouter",
        "HashRouter",
        "dense",
        "TopPRouter",
    ]
    linear = found["LinearRouter"]
    assert linear.mean.mean == pytest.approx(0.45)
    # Noise is the same in both tasks: the interval is that of one. t(7) = 2.3646.
    half = 2.3646 * np.std(WAVE, ddof=1) / math.sqrt(SEEDS)
    assert linear.mean.high - linear.mean.mean == pytest.approx(half, rel=1e-4)
    # The middle half of 16 runs: four of each task, the worst of one and the best of the other.
    middle = [*(0.2 + noise for noise in sorted(WAVE)[4:]), *(0.7 + noise for noise in sorted(WAVE)[:4])]
    assert linear.iqm.mean == pytest.approx(np.mean(middle))
    assert math.isnan(linear.improvement.mean)
    assert found["HashRouter"].improvement.mean == pytest.approx(0.5)  # always better in one task, never in the other
    shares = dict(zip(board.thresholds, linear.profile_X, strict=True))
    assert (shares[0.1], shares[0.5], shares[1.0]) == (0, 0.5, 1)


def test_another_k_is_marked_and_cannot_be_the_best(board):
    found = {standing.router: standing for standing in board.standings}
    assert [name for name, standing in found.items() if not standing.is_comparable] == ["TopPRouter"]
    assert found["TopPRouter"].k == (3, 5)
    assert found["TopPRouter"].flops == pytest.approx(2.5)
    assert board.best("clusters").router == "LinearRouter"  # TopPRouter has half of its regret
    assert board.best("ids").router == "HashRouter"
    assert OVERALL in board.results
    assert "TopPRouter" not in board.results[OVERALL].values


def test_a_failed_run_counts_as_blind(board):
    regrets = [0.7 + 2 * noise for noise in WAVE[:-2]] + [1, 1]
    assert board.found["ids", "XMoERouter"].regret == pytest.approx(np.mean(regrets))
    page = pages(board.record, "board")
    assert "**2 of 72 runs failed** and count as regret 1: of XMoERouter (2 of 16)." in page["board.md"]
    assert "XMoERouter, 2 failed in ids: DivergedError: nan" in page["board.md"]
    assert f">{np.mean(regrets):.2f} †</text>" in page["board_regret.svg"]


def test_families_are_said_to_be_what_tests_carry(board):
    found = {family.name: family for family in families(board)}
    assert found["frozen"].better == ["ids (-0.30)"]
    assert found["frozen"].worse == ["clusters"]
    assert found["dynamic"].better == ["clusters (\\*-0.10)"]
    assert (found["xmoe"].better, found["xmoe"].worse) == ([], [])  # 0.0005, and failures of two seeds
    assert "linear" not in found


def test_findings(board):
    told = "\n".join(findings(board))
    assert "Over all 2 tasks LinearRouter has the lowest mean regret**, 0.450 (0.448 to 0.452)" in told
    winners = "in ids HashRouter (-0.300); in clusters none is shown to be."  # TopPRouter is, with another k
    assert f"**Better than LinearRouter**, of the routers with the common k: {winners}" in told
    half = 2.3646 * np.std(WAVE, ddof=1) / math.sqrt(SEEDS)
    cells = ["clusters", "cluster of the hidden state", "LinearRouter", "XMoERouter"]
    cells += [f"0.200 ± {half:.3f}", f"0.200 ± {half:.3f}", f"0.800 ± {half / 2:.3f}"]
    assert f"| {' | '.join(cells)} |" in pages(board.record, "board")["board.md"]
    assert "a linear gate beats a dense network of equal active size in clusters and ids." in told


def test_routers_that_are_all_alike_are_found_to_be(tmp_path):
    rng = np.random.default_rng(0)
    names = ["LinearRouter", *(f"router {number}" for number in range(12))]
    rows = [row for task in ("clusters", "xor") for row in controls(task)]
    rows += [
        final(task, name, seed, float(1.8 + 0.05 * rng.standard_normal()))
        for task in ("clusters", "xor")
        for name in names
        for seed in range(SEEDS)
    ]
    board = Board(Record(tuple(rows), (), dict.fromkeys(names, "alike")))
    (family,) = families(board)
    assert (family.better, family.worse) == ([], [])
    assert len(board.best("clusters").open) == 12
    told = "\n".join(findings(board))
    assert "Against LinearRouter it is in no task significantly better or worse" in told
    assert "**Better than LinearRouter**, of the routers with the common k: in clusters and xor none is shown" in told


def test_copies_are_not_compared(board):
    copied = [replace(row, router="SteeredRouter") for row in ROWS if row.router == "LinearRouter"]
    twice = Board(Record((*ROWS, *copied), (), {**FAMILIES, "SteeredRouter": "policies"}))
    assert twice.copies == {"SteeredRouter": "LinearRouter"}
    assert twice.pairs.keys() == board.pairs.keys()
    assert all(twice.pairs[task].keys() == board.pairs[task].keys() for task in board.pairs)
    assert findings(twice)[-1] == (
        "**Not compared**, since they made another router's runs, to the digit: SteeredRouter those of LinearRouter."
    )
    (first, *others) = copied
    almost = Board(Record((*ROWS, replace(first, loss=first.loss + 1e-6), *others), (), twice.record.families))
    assert not almost.copies
    assert "SteeredRouter" in almost.labels["clusters"]
    one_failed = [replace(row, status="failed", loss=None) if row.seed == 0 else row for row in copied]
    linear_too = [
        replace(row, status="failed", loss=None) if (row.router, row.seed) == ("LinearRouter", 0) else row
        for row in ROWS
    ]
    for rows in ((*linear_too, *one_failed), (*ROWS, *(row for row in copied if row.task == "ids" and row.seed))):
        assert Board(Record(rows, (), twice.record.families)).copies == {"SteeredRouter": "LinearRouter"}
    nothing = [final("clusters", name, seed, None) for name in ("Other", "Another") for seed in range(SEEDS)]
    assert not Board(Record((*ROWS, *nothing), (), {**FAMILIES, "Other": "other", "Another": "other"})).copies


def test_a_lead_of_one_task_is_named():
    losses = {"clusters": (0.20, 0.25), "skew": (0.30, 0.35), "ids": (0.70, 0.10)}
    rows = [row for task in losses for row in controls(task)]
    for task, (linear, hashed) in losses.items():
        rows += [*runs(task, "LinearRouter", linear), *runs(task, "HashRouter", hashed, -1.0)]
    told = findings(Board(Record(tuple(rows), (), FAMILIES)))[0]
    assert told.startswith("**Over all 3 tasks HashRouter has the lowest mean regret**, 0.233")
    # (0.20 + 0.30) / 2 and (0.25 + 0.35) / 2; without clusters or skew HashRouter has the lowest, too.
    assert told.endswith("in clusters and skew. Without ids LinearRouter has the lowest, 0.250; HashRouter has 0.300.")
    assert told.count("Without") == 1


def test_a_difference_within_the_margin_is_called_so():
    rows = [*controls("ids"), *runs("ids", "LinearRouter", 0.4), *runs("ids", "HashRouter", 0.39, 0.5)]
    rows = [row for row in rows if row.router != "dense"] + runs("ids", "dense", 0.395, 0.5)
    board = Board(Record(tuple(rows), (), FAMILIES))
    outcomes = {(one.prediction.better, one.prediction.worse): one.verdict for one in board.outcomes}
    assert outcomes["HashRouter", "LinearRouter"] == "negligible"
    told = "\n".join(findings(board))
    assert "1 by less than the margin" in told
    assert "differs from it by less than the margin in ids" in told


def test_the_baseline_is_named_where_the_first_task_has_none():
    rows = [row for row in ROWS if (row.task, row.router) != ("clusters", "LinearRouter")]
    told = "\n".join(findings(Board(Record(tuple(rows), (), FAMILIES))))
    assert "**Better than LinearRouter**, of the routers with the common k: in ids HashRouter (-0.300)." in told


def test_predictions(board):
    found = {(one.task, one.prediction.better, one.prediction.worse): one for one in board.outcomes}
    held = found["ids", "HashRouter", "LinearRouter"]
    assert held.verdict == "held"
    assert held.comparison.difference.mean == pytest.approx(-0.3)
    assert held.comparison.error == pytest.approx(2 * np.std(WAVE, ddof=1) / math.sqrt(SEEDS))
    assert found["clusters", "RandomFrozenRouter", "HashRouter"].verdict == "not run"
    turned = Board(
        Record((*controls("ids"), *runs("ids", "LinearRouter", 0.3), *runs("ids", "HashRouter", 0.4, 2)), (), FAMILIES)
    )
    outcomes = {(one.prediction.better, one.prediction.worse): one.verdict for one in turned.outcomes}
    assert outcomes["HashRouter", "LinearRouter"] == "turned"
    assert outcomes["HashRouter", "XMoERouter"] == "not run"


def test_the_pictures_have_the_numbers_of_the_page(board):
    page = pages(board.record, "board")
    texts = [node.text for node in ET.fromstring(page["board_regret.svg"]).iter("{http://www.w3.org/2000/svg}text")]
    row = texts[texts.index("HashRouter") :]
    assert row[1:4] == ["0.70", "1.00", "0.40"]
    incomplete = texts[texts.index("TopPRouter *") :]
    assert incomplete[1:4] == ["(0.10)", "0.10", "n/a"]
    assert "dense" in texts
    lines = list(ET.fromstring(page["board_profiles.svg"]).iter("{http://www.w3.org/2000/svg}polyline"))
    assert len(lines) == 4  # routers with all tasks
    # Half of the runs of the linear gate, which is the first, have a regret of at most 0.5.
    points = [tuple(map(float, point.split(","))) for point in lines[0].get("points").split()]
    assert points[50] == pytest.approx((230, 170))


def test_a_record_gives_the_page_again(tmp_path):
    source = tmp_path / "exact"
    source.mkdir()
    tuning = [
        Row("ids", "HashRouter", "tuning", seed, 200, lr, 1.0, "finished", loss=loss, seconds=0.25)
        for lr, losses in ((0.01, (1.0, 2.0)), (0.1, (None, 3.0)))
        for seed, loss in enumerate(losses, 1000)
    ]
    lines = [row_text(replace(row, curve="20:1.5 200:1.2")) for row in [*ROWS[:-1], *tuning, ROWS[-1]]]
    (source / "rows.csv").write_text(",".join(COLUMNS) + "\n" + "".join(lines))
    first = publish([source], tmp_path / "first/board.md")
    publish([tmp_path / "first/board.csv"], tmp_path / "again/board.md")
    names = {"board.csv", "board_tuning.csv", "board_routers.csv", "board.md", "board_regret.svg", "board_profiles.svg"}
    assert {path.name for path in (tmp_path / "first").iterdir()} == names
    assert set(first) <= set((tmp_path / "first").iterdir())
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    record = read_record([tmp_path / "again/board.csv"])
    assert {row.curve for row in record.rows} == {""}
    assert {(one.lr, one.runs, one.failed, one.loss, one.seconds) for one in record.tuning} == {
        (0.01, 2, 0, 1.5, 0.5),
        (0.1, 2, 1, 3.0, 0.5),
    }
    assert record.seconds == pytest.approx(0.5 * (len(ROWS) - 1) + 1)
    page = (tmp_path / "again/board.md").read_text()
    assert "HashRouter, 1 of 2 tuning runs failed in ids, at learning rate 0.1" in page


def test_the_realistic_tier_has_excess_bits():
    scopes = {"oracle": 1.0, "blind": 3.0, "all processes": 1.5, "micro-batch": 2.0}
    rows = tuple(
        final("bytes", name, seed, (loss + WAVE[seed] * place) * math.log(2), nmi_by_layer="0.5 0.25", load_entropy=0.9)
        for place, (name, loss) in enumerate(scopes.items())
        for seed in range(SEEDS)
    )
    page = pages(Record(rows, (), {}), "board")
    assert page.keys() == {"board.md"}
    assert (
        "**In bytes, all processes has the lowest excess** over the reference. All others are significantly worse."
        in page["board.md"]
    )
    alike = [row if row.router != "micro-batch" else replace(row, loss=1.5 * math.log(2)) for row in rows]
    told = findings(Board(Record(tuple(alike), (), {})))[-1]
    assert told.startswith("**In bytes, 2 of 2 are not told from the best**: ")
    half = 2.3646 * np.std([3 * noise for noise in WAVE], ddof=1) / math.sqrt(SEEDS)
    assert f"| micro-batch | 1.000 ± {half:.3f} | worse | 0.500 | 0.50 0.25 | 0.900 |" in page["board.md"]


def test_what_cannot_be_compared_is_said(tmp_path, board):
    alone = Record(tuple(runs("ids", "LinearRouter", 0.3)), (), FAMILIES)
    with pytest.raises(UserError, match="no task with runs of a router, and of oracle and blind"):
        Board(alone)
    page = pages(Record((*ROWS, *controls("skew"), *runs("xor", "LinearRouter", 0.3)), (), FAMILIES), "board")[
        "board.md"
    ]
    assert "**Left out**, since they have no runs of a router beside oracle and blind: skew, xor." in page
    turned = final("clusters", "oracle", SEEDS, 3.0), final("clusters", "blind", SEEDS, 1.0)
    page = pages(Record((*ROWS, *turned), (), FAMILIES), "board")["board.md"]
    assert "**No regret** in clusters for 1 of its seeds, which are left out: the blind control is no worse" in page
    nowhere = Row("ids", "TaskRouter", "final", 0, 200, 0.03, 1.0, "not applicable", reason="it requires task_ids")
    told = "\n".join(findings(Board(Record((*ROWS, nowhere, replace(nowhere, task="clusters")), (), FAMILIES))))
    assert "**Not applicable in any task**: TaskRouter." in told
    path = tmp_path / "rows.csv"
    path.write_text(",".join(COLUMNS) + "\n" + "".join(map(row_text, ROWS)))
    with pytest.raises(UserError, match=r"two runs of seed 0 of HashRouter in clusters"):
        read_record([path, path])


@pytest.mark.parametrize(
    ("router", "family"),
    [("LinearRouter", "linear"), ("HashRouter", "frozen"), ("XMoERouter", "xmoe"), ("noisy", "other")],
)
def test_family(router, family):
    assert family_of(router) == family


def test_the_command(tmp_path, capsys):
    rows = tmp_path / "rows.csv"
    rows.write_text(",".join(COLUMNS) + "\n" + "".join(map(row_text, ROWS)))
    main(["bench", "--board", str(rows), "--out", str(tmp_path / "out/board.md")])
    assert "board_regret.svg" in capsys.readouterr().out
    assert (tmp_path / "out/board.md").read_text().startswith("# The router benchmark")
    with pytest.raises(SystemExit, match=r"there are no rows at .*nowhere"):
        main(["bench", "--board", str(tmp_path / "nowhere")])
