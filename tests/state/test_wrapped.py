"""Checkpoints of models that were wrapped when they were saved, or that are wrapped when they load one."""

import pytest
import torch
from lightning import Trainer

from routerzoo.callbacks import FineTune
from routerzoo.checkpoints.names import under_own_names
from tests.state.test_formats import QUIET, data, task

STEPS = {**QUIET, "limit_val_batches": 0, "enable_checkpointing": False}


def test_only_wrappers_are_seen_through():
    own = ["net.a.weight", "net.module.b", "net.b", "head.weight"]
    saved = {"net._orig_mod.a.weight": 1, "net.module.b": 2, "module.net.b": 3, "module.head.weight": 4, "other": 5}
    # `b` and `module.b` are two weights here: what could be either keeps its name.
    expected = {"net.a.weight": 1, "net.module.b": 2, "module.net.b": 3, "head.weight": 4, "other": 5}
    assert under_own_names(saved, own) == expected
    assert under_own_names({"net.a": 1}, ["net._orig_mod.a"]) == {"net._orig_mod.a": 1}


@pytest.fixture(params=["net._orig_mod.", "net.module.", "net.module._orig_mod."])
def wrapped(request):
    """Return a plain and a wrapped checkpoint of one run."""
    trainer = Trainer(**STEPS, max_steps=2)
    trainer.fit(task(), data())
    trainer.save_checkpoint("plain.ckpt")
    content = torch.load("plain.ckpt", weights_only=True)
    content["state_dict"] = {k.replace("net.", request.param, 1): v for k, v in content["state_dict"].items()}
    torch.save(content, "wrapped.ckpt")
    return "plain.ckpt", "wrapped.ckpt"


def test_a_run_resumes_from_a_wrapped_checkpoint(wrapped):
    ends = []
    for path in wrapped:
        resumed = task()
        Trainer(**STEPS, max_steps=4).fit(resumed, data(), ckpt_path=path, weights_only=True)
        ends.append(resumed.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_fine_tuning_starts_from_a_wrapped_checkpoint(wrapped):
    tuned = task()
    callback = FineTune(wrapped[1])
    Trainer(**STEPS, max_steps=1, callbacks=[callback]).fit(tuned, data())
    frozen = "net.blocks.0.feed_forward.experts.up"
    assert torch.equal(tuned.state_dict()[frozen], torch.load(wrapped[0], weights_only=True)["state_dict"][frozen])


def test_a_wrapped_model_reads_a_plain_checkpoint(wrapped):
    module = task()
    module.net = torch.compile(module.net, backend="eager")
    path = wrapped[0]
    module.on_load_checkpoint(content := torch.load(path, weights_only=True))
    module.load_state_dict(content["state_dict"])
    saved = torch.load(path, weights_only=True)["state_dict"]["net.embedding.weight"]
    assert torch.equal(module.net.embedding.weight, saved)
