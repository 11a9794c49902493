"""Processes with a share of a batch each do what one does with the whole batch."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def started(module, how, ranks, folder, device="cpu"):
    port, file = free_port(), folder / f"{how}-{ranks}.json"
    command = [sys.executable, "-m", module, how]
    processes = [
        subprocess.Popen([*command, str(rank), str(ranks), str(port), str(file), device], cwd=ROOT)
        for rank in range(ranks)
    ]
    return file, processes


def finished(file, processes):
    try:
        assert [process.wait(300) for process in processes] == [0] * len(processes)
    finally:
        for process in processes:
            process.kill()
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return finished(*started("tests.distributed.data_parallel", "ddp", 1, tmp_path_factory.mktemp("one")))


def assert_like_one_process(one, several, how):
    refused = {name for name, result in several.items() if "refused" in result}
    # Where experts are merged, there is none to send a token to.
    assert refused == ({"SMEARRouter"} if how[0] == "2" else set())
    # In float64, where what is not the same computation cannot pass for rounding.
    for name in one.keys() - refused:
        assert several[name]["losses"] == pytest.approx(one[name]["losses"], rel=1e-10), name
        assert several[name]["state"] == pytest.approx(one[name]["state"], rel=1e-9, abs=1e-10), name
    assert {"LinearRouter", "StableMoERouter", "loss-free", "transport"} <= set(one)


# Replicated; sharded by FSDP2; two ranks that share experts; four, of which each two share experts and shard them.
@pytest.mark.parametrize(
    ("how", "ranks"),
    [("ddp", 2), ("ddp-checkpoint", 2), ("fsdp", 2), ("fsdp-checkpoint", 2), ("2", 2), ("2-checkpoint", 2), ("2", 4)],
)
def test_every_router_has_the_losses_and_parameters_of_one_process(one, how, ranks, tmp_path):
    several = finished(*started("tests.distributed.data_parallel", how, ranks, tmp_path))
    assert_like_one_process(one, several, how)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("how", ["ddp", "fsdp", "2"])
def test_so_it_does_on_gpus(one, how, tmp_path):
    several = finished(*started("tests.distributed.data_parallel", how, 2, tmp_path, "cuda"))
    assert_like_one_process(one, several, how)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("experts", ["mlp", "swiglu"])
def test_processes_with_few_tokens_or_none_share_experts(experts, ranks, tmp_path):
    differences = finished(*started("tests.distributed.uneven_loads", experts, ranks, tmp_path))
    assert len(differences) >= 12  # two ranks have one case twice
    assert max(differences.values()) < 1e-11, differences


def test_a_model_that_its_owner_shards_trains_as_one_process_does(tmp_path):
    one, two = (finished(*started("tests.distributed.own_sharding", "own", ranks, tmp_path)) for ranks in (1, 2))
    assert two.pop("losses") == pytest.approx(one.pop("losses"), rel=1e-10)
    assert two.pop("bias") == pytest.approx(one.pop("bias"))
    assert two == one
    assert one["stage"] == 2
    assert one["idle"] == [[0, 0, 0, 0]] * 6
