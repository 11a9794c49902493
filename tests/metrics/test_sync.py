"""Every metric over two processes is that of one process with all the tokens."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing import assert_close

from routerzoo import Routing, metrics

pytestmark = pytest.mark.full  # several processes


def tokens(seed=0):
    generator = torch.Generator().manual_seed(seed)
    experts = [torch.rand(30, 4, generator=generator).argsort(-1)[:, :2] for _ in range(3)]
    logits_TE = torch.randn(30, 4, generator=generator)
    return experts, logits_TE, torch.randn(30, 3, generator=generator), torch.arange(30) % 5


def updated(places):
    """Every metric, updated with some of the tokens."""
    experts, logits_TE, x_TD, labels_T = tokens()
    a, b, c = (Routing(e[places], torch.ones(len(e[places]), 2), logits_TE[places]) for e in experts)
    built = {
        "CoActivation": metrics.CoActivation(4),
        "ExpertLoad": metrics.ExpertLoad(4),
        "GateConfidence": metrics.GateConfidence(4),
        "LastFluctuation": metrics.LastFluctuation(4),
        "RepresentationCollapse": metrics.RepresentationCollapse(5, 3),
        "RouterSaturation": metrics.RouterSaturation(4),
        "RoutingFluctuation": metrics.RoutingFluctuation(4),
        "Specialization": metrics.Specialization(4, 5, min_count=1),
        "InterRunConsistency": metrics.InterRunConsistency(),
    }
    for name in ("CoActivation", "ExpertLoad", "GateConfidence"):
        built[name].update(a)
    for step, routing in enumerate((a, b, c)):
        built["LastFluctuation"].update(step, routing)
    built["RepresentationCollapse"].update(x_TD[places], labels_T[places])
    built["RouterSaturation"].update(a, b)
    built["RoutingFluctuation"].update(a, b)
    built["Specialization"].update(a, labels_T[places])
    # Runs are not split among processes: each has a run of its own.
    for run in range(2) if places == slice(None) else [0 if places.start is None else 1]:
        built["InterRunConsistency"].update(tokens(run)[1][0])
    return built


def computed(built):
    return {name: metric.compute() for name, metric in built.items()}


def work(rank, port, folder):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    # Shares of different size.
    torch.save(computed(updated(slice(None, 12) if rank == 0 else slice(12, None))), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def over_two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_every_metric_is_here():
    assert set(updated(slice(None))) == set(metrics.__all__) - {"expert_sets"}


@pytest.mark.parametrize("name", sorted(updated(slice(None))))
def test_two_processes_are_as_one(name, over_two_processes):
    for result in over_two_processes:
        assert_close(result[name], computed(updated(slice(None)))[name])
