"""`python -m routerzoo routers`: the table, at any width, and what is known of one router."""

import pytest

from routerzoo.cli.routers import NARROW, main


def test_one_router(capsys):
    main(["XMoERouter", "HashRouter"])
    shown = capsys.readouterr().out
    assert "XMoERouter (routerzoo): Gate that compares a low-dimensional projection" in shown
    assert "arguments top_k, routing_dim, score, temperature" in shown
    assert "arXiv:2204.09179" in shown
    assert "requires token_ids" in shown
    assert "LinearRouter" not in shown
    with pytest.raises(SystemExit):
        main(["XMoe"])
    assert "unknown router 'XMoe'; did you mean 'XMoERouter'?" in capsys.readouterr().err


def test_a_narrow_terminal_has_no_long_cells(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal
    heights = {}
    for columns in (80, NARROW + 40):
        monkeypatch.setenv("COLUMNS", str(columns))
        main([])
        shown = capsys.readouterr().out
        assert ("batch independent" in shown) == (columns > NARROW)
        heights[columns] = shown.count("\n")
    assert heights[80] < 2 * heights[NARROW + 40]
