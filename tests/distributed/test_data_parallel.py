"""Two processes with half a batch each do what one does with the whole batch."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def started(ranks, folder):
    port, file = free_port(), folder / f"{ranks}.json"
    command = [sys.executable, "-m", "tests.distributed.data_parallel"]
    processes = [
        subprocess.Popen([*command, str(rank), str(ranks), str(port), str(file)], cwd=ROOT) for rank in range(ranks)
    ]
    return file, processes


def test_every_router_has_the_losses_and_parameters_of_one_process(tmp_path):
    runs = [started(1, tmp_path), started(2, tmp_path)]
    for _, processes in runs:
        assert [process.wait(300) for process in processes] == [0] * len(processes)
    one, two = (json.loads(file.read_text()) for file, _ in runs)
    # In float64, where what is not the same computation cannot pass for rounding.
    for name, alone in one.items():
        assert two[name]["losses"] == pytest.approx(alone["losses"], rel=1e-10), name
        assert two[name]["state"] == pytest.approx(alone["state"], rel=1e-9, abs=1e-10), name
    assert {"LinearRouter", "StableMoERouter", "loss-free", "transport"} <= set(one)
