import os
from pathlib import Path

# Test processes share the machine: threads of several would wait for each other at every step.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where there is no GPU, Triton interprets its kernels; it looks at this when it is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from functools import partial

import pytest
import torch

import routerzoo
from routerzoo import LayerSpec, RoutingContext

SPEC = LayerSpec(d_model=16, num_experts=8, layer=0, vocab_size=40, num_positions=64)


def pytest_runtest_setup(item):
    for mark in item.iter_markers("gpu"):
        needed = mark.args[0] if mark.args else 1
        if torch.cuda.device_count() < needed:
            pytest.skip(f"needs {needed} GPU, found {torch.cuda.device_count()}")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def runs_go_into_a_folder_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


QUIET = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
    "num_sanity_val_steps": 0,
}
"""Arguments of a Trainer that prints nothing."""

# Plugins have tests of their own.
BUILT_IN = [name for name in routerzoo.list_routers() if routerzoo.registry.router_package(name) == "routerzoo"]


@pytest.fixture(params=BUILT_IN)
def router_name(request):
    return request.param


@pytest.fixture
def make_context():
    """Build a context with every field, for sequences of 8 tokens."""

    def build(num_tokens, vocab_size=40):
        tokens = torch.arange(num_tokens)
        return RoutingContext(
            token_ids=torch.randint(vocab_size, (num_tokens,)),
            positions=tokens % 8,
            sequence_ids=tokens // 8,
            step=0,
            total_steps=100,
        )

    return build


def build_router(name, spec=SPEC, **arguments):
    return routerzoo.create_router(name, spec, **arguments)


def router_factory(name, **arguments):
    return partial(routerzoo.registry.router_class(name), **arguments)
