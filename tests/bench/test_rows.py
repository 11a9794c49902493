import csv

import pytest

from routerzoo.bench.rows import COLUMNS, Row, RowFile, read_rows
from routerzoo.errors import UserError

ROW = Row("clusters", "LinearRouter", "final", 3, 200, 0.03, 1.0, "finished", loss=0.25, k=2, curve="100:0.5 200:0.25")


def test_rows_come_back_as_they_were(tmp_path):
    failed = Row("clusters", "mine, noisy", "tuning", 0, 100, 0.1, 0.1, "failed", 'it said "no",\nthen stopped')
    with RowFile(tmp_path) as file:
        assert file.append(ROW) == ROW
        assert file.append(failed).reason == 'it said "no", then stopped'  # a line is a row
    text = (tmp_path / "rows.csv").read_text()
    assert text.splitlines()[0] == ",".join(COLUMNS)
    assert len(text.splitlines()) == 3
    rows = read_rows(tmp_path / "rows.csv")
    assert rows[0] == ROW
    assert rows[0].losses() == [(100, 0.5), (200, 0.25)]
    assert (rows[1].router, rows[1].loss, rows[1].k) == ("mine, noisy", None, None)


def test_the_last_row_of_a_run_counts(tmp_path):
    with RowFile(tmp_path) as file:
        file.append(Row(*ROW.key, "failed", "killed by SIGKILL"))
        file.append(ROW)
    with RowFile(tmp_path) as file:
        assert list(file.rows.values()) == [ROW]


@pytest.mark.parametrize("lost", [1, 20, 60])
def test_a_torn_last_line_is_repaired(tmp_path, lost):
    other = Row("xor", "LinearRouter", "final", 3, 200, 0.03, 1.0, "finished", loss=0.5, curve="100:0.5 200:0.5")
    with RowFile(tmp_path) as file:
        file.append(ROW)
        whole = (tmp_path / "rows.csv").read_bytes()
        file.append(other)
    path = tmp_path / "rows.csv"
    path.write_bytes(path.read_bytes()[:-lost])
    assert read_rows(path) == [ROW]
    with RowFile(tmp_path) as file:
        assert path.read_bytes() == whole
        file.append(other)
    assert read_rows(path) == [ROW, other]


def test_a_file_of_another_version_or_no_rows_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("task,router\nclusters,LinearRouter\n")
    with pytest.raises(UserError, match="has other columns than this version of routerzoo writes"):
        RowFile(tmp_path)
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, ["clusters"] * len(COLUMNS)])
    with pytest.raises(UserError, match=r"line 2, is no row of a benchmark: invalid literal for int.* 'clusters'"):
        RowFile(tmp_path)


def test_two_processes_do_not_share_a_folder(tmp_path):
    with RowFile(tmp_path), pytest.raises(UserError, match="another process is at"):
        RowFile(tmp_path)
    with RowFile(tmp_path):
        pass


def test_rows_that_are_set_aside_are_kept_elsewhere(tmp_path):
    other = Row("xor", "Größe", "final", 3, 200, 0.03, 1.0, "finished", loss=0.5)
    with RowFile(tmp_path) as file:
        file.append(ROW)
        file.append(other)
        file.set_aside([ROW])
        assert read_rows(tmp_path / "rows.csv") == [other]
        file.append(ROW)
        file.set_aside([ROW])
    assert read_rows(tmp_path / "rows.csv") == [other]
    assert (tmp_path / "replaced.csv").read_text().count("LinearRouter") == 2
    torn = (tmp_path / "rows.csv").read_bytes().partition("ö".encode())[0] + "ö".encode()[:1]
    (tmp_path / "rows.csv").write_bytes(torn)
    with RowFile(tmp_path) as file:
        assert file.rows == {}
