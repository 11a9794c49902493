"""Run folders: one of its own for each run, and found again by the next command."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from routerzoo.errors import UserError
from routerzoo.runs import folder as runs


def new(name, **content):
    """Start a run, with files of given names."""
    folder, is_new = runs.claim(None, name)
    assert is_new
    runs.write_config(folder, "model: {}\n")
    for path in content.get("files", ()):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("content")
    return folder


def test_runs_are_numbered():
    assert [new("text-Linear"), new("text-Linear"), new("text Hash")] == [
        Path("runs/text-Linear/000"),
        Path("runs/text-Linear/001"),
        Path("runs/text-Hash/000"),
    ]


def test_runs_that_start_together_never_share_a_folder():
    together, each = 4, 25
    barrier = threading.Barrier(together)

    def start(_):
        barrier.wait()
        return [runs.claim(None, "text-Linear")[0] for _ in range(each)]

    with ThreadPoolExecutor(together) as pool:
        found = [folder for folders in pool.map(start, range(together)) for folder in folders]
    assert len(set(found)) == together * each


@pytest.mark.parametrize("written", ["config.yaml", "checkpoints/best.ckpt", "logs/metrics.csv", "results.json"])
def test_a_folder_that_holds_a_run_is_refused(tmp_path, written):
    folder = tmp_path / "mine"
    (folder / written).parent.mkdir(parents=True)
    (folder / written).write_text("content")
    with pytest.raises(UserError, match=r"mine holds a run: replace it with --overwrite, or choose another --run_dir"):
        runs.claim(folder, "any")
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(UserError, match=r"holds a run: resume it with --run_dir .*mine --ckpt_path last, replace it"):
        runs.claim(folder, "any")


def test_of_two_runs_that_take_one_empty_folder_the_second_is_refused(tmp_path):
    for _ in range(2):  # both have found it empty
        folder, is_new = runs.claim(tmp_path, "any")
        assert not is_new
    runs.write_config(folder, "first")
    with pytest.raises(UserError, match="holds a run"):
        runs.write_config(folder, "second")
    assert (tmp_path / "config.yaml").read_text() == "first"


def test_what_cannot_be_a_run_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for folder, reason in ((tmp_path / "file", "File exists"), (tmp_path / ("a" * 300), "File name too long")):
        with pytest.raises(UserError, match=f"cannot create the run folder .*{reason}"):
            runs.claim(folder, "any")


def test_only_what_a_run_has_written_is_cleared(tmp_path):
    kept = ("cell.yaml", "log.txt", "notes.md", "data/train.csv")
    written = ("config.yaml", "checkpoints/last.ckpt", "logs/metrics.csv", "results.json", "routing.png")
    for name in (*kept, *written, "predictions-1.jsonl", "look.html"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    runs.discard(tmp_path, whole=False)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)


def test_a_discarded_run_leaves_no_empty_folders():
    first, second = new("text-Linear"), new("text-Linear")
    runs.discard(second, whole=True)
    assert first.is_dir()
    runs.discard(first, whole=True)
    assert not Path("runs").exists()


def started_at(folder, second):
    os.utime(folder / "config.yaml", (second, second))


def test_last_is_the_run_that_was_started_last_or_nothing():
    with pytest.raises(UserError, match=r"no checkpoint to continue from: no run matches runs/\*/\*. Train first"):
        runs.latest_run("last")
    older = new("text-Linear", files=["checkpoints/last.ckpt"])
    newer = new("text-Linear")
    other = new("text-Hash", files=["checkpoints/best.ckpt"])
    for second, folder in enumerate((older, newer, other)):
        started_at(folder, second)
    with pytest.raises(
        UserError,
        match=rf"{newer}, the run that was started last, has no last.ckpt; choose one that has: --run_dir {older}$",
    ):
        runs.latest_run("last", "text-Linear")
    assert runs.latest_run("best") == other
    with pytest.raises(UserError, match=rf"{other}, .*, has no last.ckpt; choose one that has: --run_dir {older}"):
        runs.latest_run("last")
    with pytest.raises(UserError, match=r"has no best.ckpt; no other run has one either"):
        runs.latest_run("best", "text-Linear")
    with pytest.raises(
        UserError, match=rf"matches runs/text-X/\*. Train first, or choose .*name: --run_dir {older}, or"
    ):
        runs.latest_run("last", "text-X")
    started_at(older, 5)  # as a resume does
    assert runs.latest_run("last") == runs.latest_run("last", "text-Linear") == older
