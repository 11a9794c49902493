"""What is planned against what is built, counted and measured."""

import json
import multiprocessing
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import routerzoo
from routerzoo import LanguageModeling, LinearRouter, SwiGLUExperts
from routerzoo.__main__ import main
from routerzoo.cli.plan import _saved, plan
from routerzoo.errors import UserError
from tests.tasks.test_tasks import vision

CONFIG = """
model:
  class_path: LanguageModeling
  init_args: {d_model: 64, num_blocks: 2, num_heads: 2, num_experts: 8, experts: SwiGLUExperts}
data: {class_path: TextData, init_args: {sequence_length: 64, batch_size: 4}}
"""


def language(router, **arguments):
    sizes = {"d_model": 32, "num_blocks": 2, "num_heads": 2, "num_experts": 8, "max_length": 64}
    return LanguageModeling(router=router, **{**sizes, **arguments})


def kept(task, batch):
    """Return what autograd keeps of a real batch."""
    ids_BS = torch.randint(256, (batch, 64))
    with _saved(task) as saved:
        logits_BSV, _ = task.train().net(ids_BS, step=0, total_steps=1)
        F.cross_entropy(logits_BSV.flatten(0, 1), ids_BS.flatten())
    return saved.bytes


@pytest.mark.parametrize("build", [language, vision])
def test_parameters_and_operations_are_those_of_the_model(router_name, build):
    router = routerzoo.registry.router_class(router_name) if build is language else router_name
    costs = build(router).costs()
    needs = plan(build(router), 3)
    assert (needs.parameters, needs.trainable, needs.active) == (costs.total, costs.trainable, costs.active)
    assert needs.flops == pytest.approx(costs.flops)
    assert needs.router_flops == pytest.approx(costs.router_flops)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"experts": SwiGLUExperts}, {"num_shared_experts": 2}, {"router": partial(LinearRouter, top_k=4)}],
    ids=["plain", "swiglu", "shared", "k4"],
)
def test_activations_are_what_autograd_keeps(arguments):
    arguments = {"router": LinearRouter, **arguments}
    needs = plan(language(**arguments), 4)
    assert needs.tokens == 4 * 64
    assert needs.activations == pytest.approx(kept(language(**arguments), 4), rel=0.1)


def test_sharding_divides_what_it_shards():
    one = plan(language(LinearRouter), 4)
    four = plan(language(LinearRouter), 4, 4, sharded=True, expert_parallel=2)
    routers = 2 * 32 * 8 * 4
    assert four.weights == pytest.approx((one.weights - routers) / 4 + routers)
    assert four.optimizer == 2 * four.gradients
    assert four.activations == one.activations
    # Two processes of two that share experts: half of the rows leave, four times.
    assert four.token_traffic == 4 * 2 * (4 * 64) * 2 * 32 * 4 / 2
    replicated = plan(language(LinearRouter), 4, 4)
    assert replicated.gradient_traffic == pytest.approx(2 * one.gradients * 3 / 4)
    assert replicated.token_traffic == replicated.weight_traffic == 0


def test_numbers_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="must divide the number of processes = 4"):
        plan(language(LinearRouter), 4, 4, sharded=True, expert_parallel=3)
    with pytest.raises(UserError, match="must divide num_experts = 8"):
        plan(language(LinearRouter), 4, 16, sharded=True, expert_parallel=16)
    with pytest.raises(UserError, match="only shared where weights are sharded"):
        plan(language(LinearRouter), 4, 4, expert_parallel=2)


@pytest.mark.full
def test_a_model_that_no_laptop_holds(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(CONFIG)
    large = ["--model.d_model=4096", "--model.num_heads=32", "--model.num_experts=64"]
    main(["plan", "--config", "config.yaml", *large, "--processes", "64", "--strategy", "sharded", "--json"])
    needs = json.loads(capsys.readouterr().out)
    # Two blocks of 64 SwiGLU experts, and the attention's four maps.
    hidden = -(-8 * 4096 // 24) * 8
    experts, attention = 2 * 64 * 3 * 4096 * hidden, 2 * 4 * 4096**2
    assert needs["parameters"] == pytest.approx(experts + attention, rel=1e-3)
    assert needs["weights"] == pytest.approx(4 * (experts + attention) / 64, rel=0.01)


def peak(config, options, answers):
    from routerzoo.cli.main import main as fit

    torch.set_num_threads(1)
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.max_steps=3", "--trainer.num_sanity_val_steps=0"]
    folder = "large" if options else "small"
    fit(["fit", "--config", config, "--run_dir", folder, "--trainer.limit_val_batches=0", *quiet, *options])
    with open(f"{folder}/results.json") as file:
        answers.put(json.load(file)["fit"]["peak memory, bytes"])


@pytest.mark.full
def test_memory_is_what_a_run_takes(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(CONFIG)
    large = ["--model.d_model=384", "--data.batch_size=16", "--data.sequence_length=256"]
    planned, measured = [], []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["routerzoo.sweep.preloaded"])
    for options in ([], large):
        main(["plan", "--config", "config.yaml", "--json", *options])
        planned.append(json.loads(capsys.readouterr().out)["memory"])
        answers = context.Queue()
        process = context.Process(target=peak, args=("config.yaml", options, answers))
        process.start()
        measured.append(answers.get(timeout=300))
        process.join()
    assert planned[1] > 8e8
    # The difference, since the libraries take their own; passing tensors add to the peak.
    assert measured[1] - measured[0] == pytest.approx(planned[1] - planned[0], rel=0.25)
