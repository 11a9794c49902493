"""Files of a run that are damaged, and checkpoints that are whole but lack something."""

import csv
import json
import random
from pathlib import Path

import pytest
import torch

from routerzoo.cli import main as cli
from routerzoo.runs.log_file import read_log
from tests.cli.test_main import RUN, fails
from tests.cli.test_main import run as run  # fixtures
from tests.cli.test_main import trained as trained

LAST = RUN / "checkpoints" / "last.ckpt"
LOG = RUN / "logs" / "metrics.csv"
RESUME = ["fit", "--run_dir", str(RUN), "--ckpt_path", "last", "--trainer.max_steps", "6"]


@pytest.mark.parametrize(
    "damaged", [b"", *(pytest.param(d, marks=pytest.mark.full) for d in (b"{", b"null", b"[1]", b"\0\0", b'"\xff"'))]
)
def test_results_that_cannot_be_read_are_kept_aside(run, capsys, damaged):
    (RUN / "results.json").write_bytes(damaged)
    cli.main(["test", "--ckpt_path", "best"])
    assert "bpb" in json.loads((RUN / "results.json").read_text())["test"]
    assert [path.read_bytes() for path in RUN.glob("results*.json") if path.name != "results.json"] == [damaged]


@pytest.mark.parametrize(
    "damaged", [b"", b"model: [", b"caf\xe9: 1", b"\0", b"- a", b"model: {class_path: nothing.Here}"]
)
def test_the_config_of_a_run_that_is_damaged_is_named(run, damaged, capsys):
    (RUN / "config.yaml").write_bytes(damaged)
    with pytest.raises(SystemExit) as ended:
        cli.main(["test", "--ckpt_path", str(LAST)])
    line = str(ended.value.code) if isinstance(ended.value.code, str) else capsys.readouterr().err.strip()
    assert "\n" not in line
    assert str(RUN / "config.yaml") in line or "nothing.Here is of no known package" in line


def rows():
    with LOG.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("damage", [b"\xff\xfe", b'"', b"7" * 200_000, b"\0"])
def test_a_damaged_line_of_a_log_costs_no_other(tmp_path, damage):
    path = tmp_path / "metrics.csv"
    lines = [b"step,loss"] + [f"{step},{step}.5".encode() for step in range(5)]
    path.write_bytes(b"\n".join([*lines[:3], b"2" + damage + b",2.5", *lines[3:]]))
    names, found = read_log(path)
    assert names == ["step", "loss"]
    assert found == [{"step": f"{step}", "loss": f"{step}.5"} for step in range(5)]


def test_a_log_that_is_damaged_stops_no_resume(run, capsys):
    before, whole = rows(), LOG.read_bytes()
    middle = whole.index(b"\n", len(whole) // 2) + 1
    LOG.write_bytes(whole[:middle] + b'\xff"\0' + whole[middle:])
    cli.main(RESUME)
    after = rows()
    kept = [row for row in after if int(row["step"]) < 4]
    assert len(kept) >= len(before) - 1  # the damaged row alone may be lost
    assert max(int(row["step"]) for row in after) == 5


@pytest.mark.full
def test_a_log_with_random_damage_stops_no_resume(tmp_path):
    draw, path = random.Random(0), tmp_path / "metrics.csv"
    whole = ("step,loss\n" + "".join(f"{step},{step}.5\n" for step in range(50))).encode()
    for _ in range(2000):
        damaged = bytearray(whole)
        place = draw.randrange(len(damaged))
        damaged[place : place + draw.choice((0, 1, 30))] = draw.randbytes(draw.choice((0, 1, 30)))
        path.write_bytes(bytes(damaged))
        _, found = read_log(path)
        assert all(int(row["step"]) >= 0 for row in found)


def changed(**changes):
    content = torch.load(LAST, weights_only=True)
    for name, value in changes.items():
        if value is None:
            del content[name]
        else:
            content[name] = value
    torch.save(content, LAST)
    return content


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loops": None}, "it has no loops. It cannot be resumed: train again"),
        ({"random_state": None}, "it has no random_state. It cannot be resumed"),
        ({"optimizer_states": None}, "it has no optimizer_states. It cannot be resumed"),
        ({"lr_schedulers": None}, "it has no lr_schedulers. It cannot be resumed"),
        ({"callbacks": None}, "it has no callbacks. It cannot be resumed"),
        ({"loops": [1]}, "its loops is a list"),
        ({"random_state": "0"}, "it has no random_state. It cannot be resumed"),
        ({"global_step": None}, "it has no global_step. Take another checkpoint of the run"),
        ({"epoch": "two"}, "its epoch is a str"),
        ({"state_dict": None}, "it holds no state_dict"),
        ({"loops": {"fit_loop": 3}}, "does not fit the run, or is incomplete: AttributeError: 'int' object has no"),
        ({"optimizer_states": []}, "it has no optimizer_states. It cannot be resumed"),
        (
            {"optimizer_states": [{"state": {0: {}}, "param_groups": []}]},
            "does not fit the run, or is incomplete: ValueError",
        ),
        (
            {"optimizer_states": [{"state": {}, "param_groups": []}]},
            "it is of step 4, but its optimizer_states are empty. It cannot be resumed: train again",
        ),
        ({"random_state": torch.zeros(3)}, "it has no random_state. It cannot be resumed"),
    ],
    ids=lambda value: " ".join(f"{k}={type(v).__name__}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_checkpoints_that_lack_something_are_refused(run, capsys, changes, message):
    changed(**changes)
    before = rows()
    line = fails(*RESUME)
    assert message in line
    assert "\n" not in line
    assert rows() == before


@pytest.mark.parametrize(
    "change", ["shape", pytest.param("missing", marks=pytest.mark.full), pytest.param("more", marks=pytest.mark.full)]
)
@pytest.mark.parametrize("command", [RESUME, ["test", "--ckpt_path", "last"], ["look", "--ckpt_path", "last"]])
def test_weights_of_another_model_are_refused(run, capsys, change, command):
    weights = torch.load(LAST, weights_only=True)["state_dict"]
    name = next(name for name in weights if name.endswith("embedding.weight") or "embed" in name)
    if change == "shape":
        weights[name] = weights[name][:, :3].clone()
    elif change == "missing":
        del weights[name]
    else:
        weights["net.unknown"] = torch.zeros(2)
    changed(state_dict=weights)
    if command[0] == "look":
        from routerzoo.cli.look import main as look

        with pytest.raises(SystemExit) as ended:
            look(command[1:])
        line = str(ended.value.code)
    else:
        line = fails(*command)
    assert ("net.unknown" if change == "more" else name) in line
    assert "\n" not in line


def test_a_checkpoint_without_what_only_training_needs_can_be_tested(run, capsys):
    changed(loops=None, optimizer_states=None, lr_schedulers=None, random_state=None)
    cli.main(["test", "--ckpt_path", "last"])
    assert "bpb" in json.loads(Path(RUN, "results.json").read_text())["test"]
