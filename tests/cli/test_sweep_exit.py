"""A sweep that lacks a result does not exit as one that has all."""

import pytest
import yaml

from routerzoo.__main__ import main
from tests.cli.test_main import CONFIG

pytestmark = pytest.mark.full


@pytest.mark.parametrize("refused", [False, True])
def test_a_sweep_with_refused_points_does_not_exit_with_0(tmp_path, capsys, refused):
    (tmp_path / "base.yaml").write_text(CONFIG)
    routers = ["LinearRouter", *(["RouterOfNobody"] if refused else [])]
    sweep = {"tasks": {"text": "base.yaml"}, "routers": routers, "seeds": [0], "set": {"trainer.max_steps": 2}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    command = ["sweep", "--config", "sweep.yaml", "--folder", "out", "--workers", "1"]
    if not refused:
        main(command)
        assert "1 finished; " in capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 1
    shown = capsys.readouterr().out
    assert "refused: text RouterOfNobody seed 0: unknown router 'RouterOfNobody'" in shown
    assert "1 finished, 1 refused; " in shown
