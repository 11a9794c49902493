"""The page of a report: that it is well-formed, stands alone, and shows what its CSV files have."""

import csv
import math
import re
from html.parser import HTMLParser

import pytest

from routerzoo.errors import UserError
from routerzoo.report.collect import read_sweep
from routerzoo.report.page import write_report

VOID = {"meta", "br", "input", "link", "img", "hr"}


class Page(HTMLParser):
    """Elements of a page; raises where one is not closed in its place."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "parents": [e["tag"] for e in self.open], "text": "", **dict(attrs)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append({"tag": tag, "parents": [], "text": "", **dict(attrs)})

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, **attributes):
        return [e for e in self.elements if e["tag"] == tag and attributes.items() <= e.items()]


def tables_of(text):
    """Return rows of texts and sorting values by caption, of all tables."""
    found = {}
    for table in re.findall(r"<table.*?</table>", text, flags=re.DOTALL):
        page = Page(table)
        heads = [cell["text"] for cell in page.all("th", scope="col")]
        rows = [Page(row) for row in re.findall(r"<tr class=.*?</tr>", table, flags=re.DOTALL)]
        cells = [[row.all("th")[0]["text"], *row.all("td")] for row in rows]
        found[page.all("caption")[0]["text"]] = heads, cells
    return found


@pytest.fixture
def report(made_up):
    """Return a function that writes a report of a made-up sweep, and returns its folder and page."""

    def write(**content):
        folder = made_up(**content)
        write_report(read_sweep(folder))
        return folder, (folder / "report.html").read_text()

    return write


def read(folder, name):
    return list(csv.DictReader((folder / name).read_text().splitlines()))


SMALL = {"routers": ("LinearRouter", "XMoERouter", "HashRouter"), "seeds": 3}


def test_the_page_is_well_formed_stands_alone_and_is_labelled(report):
    routers = {"routers": ("LinearRouter", "HashRouter"), "seeds": 2}
    folder, text = report(**routers, tasks=("language", "vision"), by_k=(1, 2), failed=("language HashRouter seed 1",))
    page = Page(text)
    names = [element["id"] for element in page.elements if "id" in element]
    assert len(names) == len(set(names))
    links = [element["href"] for element in page.all("a")]
    assert all(link[1:] in names for link in links if link.startswith("#"))
    assert all((folder / link).exists() for link in links if not link.startswith("#"))
    assert "runs/language-HashRouter-1/log.txt" in links
    # Nothing from elsewhere.
    assert not re.search(r"https?://(?!www\.w3\.org/)|@import|url\((?!#)|\bsrc=", text)
    pictures = page.all("svg")
    assert len(pictures) > 5
    for picture in pictures:
        assert picture["role"] == "img"
        assert set(picture["aria-labelledby"].split()) <= set(names)
    assert len(page.all("title")) > len(page.all("desc")) >= len(pictures)
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(cell["scope"] in ("col", "row") for cell in page.all("th"))
    assert len(page.all("h1")) == 1
    # The decision comes first.
    assert text.index('id="decision"') < text.index('id="results"') < text.index("<svg")
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize(
    "content",
    [
        {**SMALL, "failed": ("language HashRouter seed 1",), "curves": False, "flops": {"HashRouter": 0.5}},
        pytest.param({**SMALL, "seeds": 1, "curves": False}, marks=pytest.mark.full),
    ],
)
def test_every_number_of_the_table_is_in_the_csv(report, content):
    folder, text = report(**content)
    rows = {row["router"]: row for row in read(folder, "means.csv")}
    heads, table = tables_of(text)["language"]
    assert sorted(rows) == sorted(name for name, *_ in table)
    keys = ["mean", "standing", "seeds", "failed", "trained k", "training FLOPs", "difference", "p adjusted", "verdict"]
    keys += ["active parameters", "FLOPs per token", "training seconds", "peak memory, GB"]
    assert len(heads) == 1 + len(keys)
    for name, *cells in table:
        assert [cell["data-v"] for cell in cells] == [rows[name][key] for key in keys]
        assert cells[0]["text"].startswith(f"{float(rows[name]['mean']):.4f}")
        for bound in ("low", "high"):
            value = float(rows[name][bound])
            assert math.isnan(value) or f"{value:.4f}" in cells[0]["text"]
    # And the means are those of the runs.
    for name, row in rows.items():
        runs = [r for r in read(folder, "runs.csv") if r["variant"] == name]
        values = [float(run["test bpb"]) for run in runs if run["status"] == "finished"]
        assert float(row["mean"]) == pytest.approx(sum(values) / len(values))
        assert int(row["failed"]) == len(runs) - len(values)
    assert [name for name, *_ in table] == sorted(rows, key=lambda n: (rows[n]["failed"], float(rows[n]["mean"])))


@pytest.mark.parametrize(("status", "told"), [("failed", "finished: "), ("waiting", "finished yet: ")])
def test_a_watched_sweep_without_results_says_so(made_up, status, told):
    folder = made_up(routers=("LinearRouter",), seeds=1, curves=False, **{status: ("language LinearRouter seed 0",)})
    why = "of 1 failed, the first: the loss is NaN" if status == "failed" else "has finished yet"
    with pytest.raises(UserError, match=why):
        read_sweep(folder)
    write_report(read_sweep(folder, may_be_empty=True))
    text = (folder / "report.html").read_text()
    assert "0 of 1 runs finished" in text
    assert f"No run has {told}there is nothing to decide." in text
    assert "0 of 1 runs finished" in (folder / "report.md").read_text()


@pytest.mark.full
def test_what_is_empty_is_a_sentence(report):
    _, text = report(**{**SMALL, "seeds": 2}, curves=False)
    assert "All routers trained with the same FLOPs (1.0 G)" in text
    assert "A scaling law needs 3 budgets; here is one." in text
    assert "No learning curves" in text
    assert len(Page(text).all("svg")) == 1  # every seed


@pytest.mark.full
def test_unequal_budgets_are_marked_and_their_front_is_drawn(report):
    flops = {"HashRouter": 0.5, "XMoERouter": 2.0}
    folder, text = report(**{**SMALL, "tasks": ("language", "vision")}, curves=False, flops=flops)
    _, table = tables_of(text)["language"]
    marked = {(name, cell["text"]) for name, *cells in table for cell in cells if "unequal" in cell["text"]}
    assert marked == {
        ("HashRouter", "1 (unequal)"),
        ("HashRouter", "500.0 M (unequal)"),
        ("XMoERouter", "2.0 G (unequal)"),
    }
    front = {row["router"]: row["is on the front"] for row in read(folder, "front.csv")}
    assert front == {"LinearRouter": "True", "XMoERouter": "True", "HashRouter": "True"}
    assert {f"{task}: Quality and training FLOPs" for task in ("language", "vision")} <= {
        element["text"] for element in Page(text).all("h3")
    }
    assert "XMoERouter has the best mean" in text
    assert "with up to 4 times the FLOPs of others" in text


@pytest.mark.full
def test_budgets_have_scaling_curves_and_tuned_runs_stand_beside_untuned_ones(report):
    folder, text = report(**{**SMALL, "seeds": 5}, steps=(100, 400, 1600), tuned=True, noise=0.002)
    gains = {row["router"]: row for row in read(folder, "scaling.csv")}
    # The made-up law: offsets of -0.012 and 0.16, halved by tuning, at b = 0.3.
    for name, offset in (("XMoERouter", -0.006), ("HashRouter", 0.08)):
        multiplier = float(gains[name]["multiplier mean"])
        assert multiplier == pytest.approx(math.exp(-offset / 0.3), abs=0.03)
        assert float(gains[name]["multiplier low"]) <= multiplier <= float(gains[name]["multiplier high"])
    assert len(read(folder, "scaling_curves.csv")) == 3 * 60
    alone = [float(row["mean"]) for row in read(folder, "multipliers.csv") if row["router"] == "HashRouter"]
    assert alone == pytest.approx([math.exp(-0.08 / 0.3)] * 3, abs=0.05)
    tables = tables_of(text)
    heads, _ = tables["Compute multipliers, with 95 % intervals"]
    assert heads[:2] == ["router", "against LinearRouter"]
    assert all(head.startswith("at ") and head.endswith(" alone") for head in heads[2:])
    assert len(heads) == 2 + 3
    heads, rows = tables["language, max_steps=100: Tuned beside untuned"]
    assert heads == ["router", "untuned", "tuned", "chosen"]
    assert [row[-1]["text"] for row in rows] == ["lr 0.002", "lr 0.003", "lr 0.002"]
    assert {"language, max_steps=400, tuned", "language, max_steps=400: Untuned"} < set(tables)
    assert '<a href="tuning.csv">' in text
    # One decision for each budget, of tuned runs alone, and one over all.
    answers = [element["text"] for element in Page(text).elements if element.get("class") == "answer"]
    assert len(answers) == 4
    assert Page(text)


@pytest.mark.full
def test_one_router_has_a_law_and_no_multiplier(report):
    folder, text = report(**{**SMALL, "routers": ("LinearRouter",), "seeds": 2}, steps=(100, 400, 1600))
    assert [row["router"] for row in read(folder, "scaling.csv")] == ["LinearRouter"]
    assert "Compute multipliers" not in text


@pytest.mark.full
def test_equal_reports_are_equal_bytes(report):
    folder, text = report(**{**SMALL, "seeds": 2})
    write_report(read_sweep(folder))
    assert (folder / "report.html").read_text() == text
