"""The same sweep on a Ray cluster of two nodes, on this machine."""

import time
from collections import Counter

import pytest
import yaml

ray = pytest.importorskip("ray", reason="needs pip install 'routerzoo[ray]'")
cluster_utils = pytest.importorskip("ray.cluster_utils")

from routerzoo.cli.sweep import main  # noqa: E402
from routerzoo.sweep.code import OtherCodeError, code_version  # noqa: E402
from routerzoo.sweep.ledger import Ledger  # noqa: E402
from routerzoo.sweep.ray_engine import RayEngine  # noqa: E402
from tests.sweep.test_sweep import BASE, measured  # noqa: E402


@pytest.fixture
def cluster():
    nodes = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=2)
    ray.init(address=nodes.address, log_to_driver=False)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


# What Ray itself leaves open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_sweep_on_two_nodes_gives_the_same_numbers(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**BASE, "checkpoint_every": 100}))
    routers = [
        "LinearRouter",
        "HyperRouter",
        {"label": "too fast", "class_path": "LinearRouter", "set": {"model.init_args.optimizer.init_args.lr": 1e30}},
    ]
    pair = {"label": "pair", "class_path": "LinearRouter", "set": {"trainer.devices": 2}}  # two processes, on one node
    plan = {"tasks": {"text": "base.yaml"}, "routers": [*routers, pair], "set": {"trainer.max_steps": 10}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(plan))
    for folder, engine in (("here", "local"), ("there", "ray")):
        with pytest.raises(SystemExit) as ended:
            main(["--config", "sweep.yaml", "--folder", folder, "--engine", engine, "--workers", "2"])
        assert ended.value.code == 1  # one run failed
    here, there = ({run.variant: run for run in Ledger(tmp_path / name).runs()} for name in ("here", "there"))
    assert Counter(run.status for run in there.values()) == {"finished": 3, "failed": 1}
    assert "the loss is" in there["too fast"].reason
    for name in ("LinearRouter", "HyperRouter", "pair"):
        assert measured(there[name].results) == measured(here[name].results)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_run_that_finds_no_room_waits_and_is_stopped(cluster, tmp_path):
    engine = RayEngine(slots=1, threads=64, gpus=0.0)  # no node has so many
    ledger = Ledger(tmp_path)
    row = {"task": "t", "router": "R", "variant": "R", "seed": 0, "folder": ".", "config": "", "test": []}
    ledger.plan([{**row, "key": "a", "stage": "final"}])
    run = ledger.claim(code_version())
    engine.start(run, tmp_path)
    time.sleep(1)
    assert engine.ended() == []
    assert engine.stop() == [run]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_node_of_other_code_stops_the_sweep(cluster, tmp_path):
    engine = RayEngine(slots=1, threads=1, gpus=0.0)
    ledger = Ledger(tmp_path)
    row = {"task": "t", "router": "R", "variant": "R", "seed": 0, "folder": ".", "config": "", "test": []}
    ledger.plan([{**row, "key": "a", "stage": "final"}])
    engine.start(ledger.claim("0.1+older"), tmp_path)
    ray.wait(list(engine._running))
    with pytest.raises(OtherCodeError, match=r"has other code .* than the command \(0.1\+older\): give all machines"):
        engine.ended()
