"""Two processes on the CPU."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from routerzoo.cli.main import main
from tests.cli.test_main import CONFIG

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
ON_TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
SHORT = ["--trainer.limit_val_batches", "1.0", "--trainer.limit_test_batches", "1.0"]


def start(folder, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "routerzoo", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(folder, *arguments, code=0):
    process = start(folder, *arguments)
    out, err = process.communicate(timeout=400)
    assert process.returncode == code, err
    return out, err


@pytest.fixture
def folder(tmp_path):
    # Validation and test split have 10 windows of 15 tokens and the rest of one: 11, an odd number.
    text = "".join(chr(97 + (7 * place * place + place) % 26) for place in range(3240))
    (tmp_path / "text.txt").write_text(text)
    config = CONFIG.replace("sequence_length: 16", "sequence_length: 15, dataset: text.txt")
    (tmp_path / "config.yaml").write_text(config)
    return tmp_path


def logged(folder, name):
    with (folder / "logs" / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row[name]}


# One whose parameters stop learning on the way, without the loss that alone reaches some of them, and one with frozen
# buffers; each takes half a minute to start.
@pytest.mark.parametrize(
    ("router_name", "options"),
    [
        ("StableMoERouter", []),
        ("StableMoERouter", ["--model.loss_weights", "{balance: 0.1}"]),
        ("HyperRouter", []),
    ],
    ids=["StableMoERouter", "StableMoERouter without distillation", "HyperRouter"],
)
def test_routers_train_on_two_processes(router_name, options, tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    out, err = run(tmp_path, "fit", "--config", "config.yaml", *ON_TWO, "--model.router", router_name, *options)
    assert "Trained to step 4" in out
    assert "sync_dist" not in err
    folders = list((tmp_path / f"runs/tiny-shakespeare-{router_name}").iterdir())
    assert [path.name for path in folders] == ["000"]  # the processes agree on it
    assert (folders[0] / "checkpoints" / "last.ckpt").is_file()


def test_two_processes_share_prompts_and_refuse_a_single_one(folder):
    main(["fit", "--config", "config.yaml", "--run_dir", "one", "--model.predict_tokens", "4"])
    predict = ["predict", "--run_dir", "one", "--ckpt_path", "last", "--trainer.devices", "2"]
    _, err = run(folder, *predict, "--trainer.strategy", "ddp", code=1)
    assert "error: 1 prompt cannot be shared among 2 processes: predict with trainer.devices 1" in err
    _, err = run(folder, *predict, "--trainer.strategy", "sharded", code=1)
    assert "error: a sharded model cannot generate" in err
    assert "Traceback" not in err
    run(folder, *predict, "--trainer.strategy", "ddp", "--data.prompts", '["abc", "xyz"]')
    written = [json.loads((folder / f"one/predictions-{rank}.jsonl").read_text())["prompt"] for rank in range(2)]
    assert written == ["abc", "xyz"]


def test_an_evaluation_on_two_processes_counts_each_sample_once(folder):
    main(["fit", "--config", "config.yaml", "--run_dir", "one", *SHORT])
    _, err = run(
        folder, "fit", "--config", "config.yaml", "--run_dir", "two", *ON_TWO, *SHORT, "--data.batch_size", "4"
    )
    assert "DistributedSampler" not in err
    for name in ("train/loss", "val/loss", "val/bpb"):
        assert logged(folder / "two", name) == pytest.approx(logged(folder / "one", name), rel=1e-5), name
    main(["test", "--run_dir", "one", "--ckpt_path", "last"])
    _, err = run(folder, "test", "--run_dir", "two", "--ckpt_path", "last")
    assert "DistributedSampler" not in err
    one, two = (json.loads((folder / name / "results.json").read_text())["test"]["loss"] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)


def test_a_run_of_two_processes_resumes_on_one_at_the_right_window(folder):
    whole = ["fit", "--config", "config.yaml", "--trainer.max_steps", "8"]
    main([*whole, "--run_dir", "whole"])
    asked = ["--trainer.callbacks+=tests.distributed.killed.AskedToEndInValidation", "--trainer.callbacks.steps=4"]
    run(folder, *whole, "--run_dir", "run", *ON_TWO, "--data.batch_size", "4", *asked, code=143)
    resumed = [*whole, "--run_dir", "run", "--ckpt_path", "last"]
    with pytest.raises(SystemExit) as refused:
        main([*resumed, "--data.batch_size", "4"])
    assert "with batches of 8 samples over all processes, and data.batch_size times the processes is 4" in str(
        refused.value
    )
    main(resumed)
    losses = logged(folder / "run", "train/loss")
    assert list(losses) == list(range(8))
    assert losses == pytest.approx(logged(folder / "whole", "train/loss"), rel=1e-5)


@pytest.mark.parametrize("to_all", [False, True], ids=["first process", "all processes"])
def test_ctrl_c_saves_what_two_processes_have_trained(folder, to_all):
    options = [
        "--trainer.max_steps=100000",
        "--trainer.check_val_every_n_epoch=null",
        "--trainer.val_check_interval=100000",
    ]
    process = start(folder, "fit", "--config", "config.yaml", *ON_TWO, *options, "--run_dir", "run")
    last = folder / "run" / "checkpoints" / "last.ckpt"
    while not last.exists():
        assert process.poll() is None, process.communicate()
    (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "stopped by SIGINT; step " in err
    assert "Traceback" not in err
    assert max(logged(folder / "run", "train/loss")) + 1 == int(err.partition("; step ")[2].split()[0])
