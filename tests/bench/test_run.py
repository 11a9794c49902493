import dataclasses

import pytest
import torch

from routerzoo.bench import run as bench_run
from routerzoo.bench.choices import RouterChoice
from routerzoo.bench.run import DivergedError, Run, learning_rate_share, scaled
from routerzoo.bench.tasks.clusters import Clusters
from routerzoo.moe.layer import MoE
from routerzoo.router import LossWeight

FIVE = ["LinearRouter", "HyperRouter", "HashRouter", "StableMoERouter", "oracle"]


class Small(Clusters):
    tokens = 64
    evaluation_tokens = 128


def build(name, seed=0, steps=6):
    return Run(Small(seed, steps), RouterChoice(name), 0.01)


def weights(run):
    return {name: value for name, value in run.model.state_dict().items() if not name.startswith("router.")}


def test_all_but_the_router_is_equal_bit_for_bit_between_routers_of_a_seed(monkeypatch):
    draw, batches, seen = Small.batch, [], {}

    def drawn(self, *args):
        batches.append(draw(self, *args))
        return batches[-1]

    monkeypatch.setattr(Small, "batch", drawn)
    for name in FIVE:
        run = build(name)
        before = {key: value.clone() for key, value in weights(run).items()}
        run.outcome()
        seen[name] = before, batches[:]
        batches.clear()
    assert before.keys() == {"experts.up", "experts.down", "experts.up_bias", "experts.down_bias"}
    first_weights, first_batches = seen["LinearRouter"]
    assert len(first_batches) == 12  # of 6 steps and 6 evaluations
    for own_weights, own_batches in seen.values():
        assert all(torch.equal(own_weights[key], first_weights[key]) for key in first_weights)
        for one, other in zip(own_batches, first_batches, strict=True):
            for field in ("x", "target", "domain_T", "token_ids_T"):
                assert torch.equal(getattr(one, field), getattr(other, field))


def test_another_seed_changes_weights_worlds_and_routers():
    one, other = build("LinearRouter", 0), build("LinearRouter", 1)
    assert not torch.equal(one.model.experts.up, other.model.experts.up)
    assert not torch.equal(one.model.router.weight, other.model.router.weight)
    assert not torch.equal(one.task.maps_CDD, other.task.maps_CDD)


@pytest.mark.parametrize("name", ["LinearRouter", "blind", "StableMoERouter"])
def test_a_run_follows_from_its_seed_alone(name):
    first = build(name).outcome()
    torch.rand(5)  # the global state is not the run's
    state = torch.get_rng_state()
    assert build(name).outcome() == first
    assert torch.equal(torch.get_rng_state(), state)


def test_training_flops_are_three_forward_passes_of_the_tokens():
    # Two experts of two products of 32 x 32, two operations per multiply-add; the gate is 32 x 16.
    assert build("oracle").outcome().train_flops == 3 * 64 * 6 * (2 * 2 * 2 * 32 * 32)
    assert build("LinearRouter").outcome().train_flops == 3 * 64 * 6 * (2 * 2 * 2 * 32 * 32 + 2 * 32 * 16)


def test_the_oracle_knows_the_domain_and_blind_routing_does_not():
    oracle, blind, dense = (build(name).outcome() for name in ("oracle", "blind", "dense"))
    assert oracle.nmi == pytest.approx(1.0)
    assert blind.nmi < 0.5  # 128 tokens only
    assert (dense.nmi, dense.max_load) == (None, None)
    assert oracle.mean_k == blind.mean_k == dense.mean_k == 2


def test_the_curve_ends_with_the_loss():
    outcome = build("LinearRouter").outcome()
    steps, losses = zip(*(point.split(":") for point in outcome.curve.split()), strict=True)
    assert steps == ("1", "2", "3", "4", "5", "6")
    assert float(losses[-1]) == pytest.approx(outcome.loss, rel=1e-5)


def test_tokens_without_a_domain_have_no_oracle_expert():
    task = Small(0, 6)
    batch = task.batch(32, task.generator("training"), 0.0)
    batch = dataclasses.replace(batch, domain_T=torch.tensor([-1, 0, 3] + [7] * 29))
    assert task.oracle(batch)[:4].tolist() == [[-1, -1], [0, 1], [6, 7], [14, 15]]


def test_a_loss_that_is_nan_ends_the_run(monkeypatch):
    monkeypatch.setattr(Small, "token_losses", lambda self, output, batch: output.mean(1) * float("nan"))
    with pytest.raises(DivergedError, match="the training loss is nan at step 0"):
        build("LinearRouter").outcome()


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    assert learning_rate_share(0, 200, 20) == pytest.approx(1 / 20)
    assert learning_rate_share(100, 200, 20) == pytest.approx(0.55)
    assert learning_rate_share(200, 200, 20) == pytest.approx(bench_run.FINAL_LR)


@pytest.mark.parametrize(("steps", "warm_up"), [(3, 1), (10, 2), (120, 20)])
def test_the_warm_up_is_at_most_a_fifth_of_the_run(steps, warm_up, monkeypatch):
    rates, step = [], torch.optim.AdamW.step

    def watched(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    build("LinearRouter", steps=steps).outcome()
    assert rates[0] == pytest.approx(0.01 / warm_up)
    assert rates == [pytest.approx(0.01 * learning_rate_share(at, steps, warm_up)) for at in range(steps)]
    assert rates.index(max(rates)) == warm_up - 1


@pytest.mark.parametrize(("largest", "moves"), [(0.0, False), (1e-3, True)])
def test_gradients_are_scaled_down_to_the_task_s_norm(largest, moves, monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def watched(self, *args):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        return step(self, *args)

    monkeypatch.setattr(Small, "max_gradient_norm", largest)
    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    run = build("LinearRouter")
    before = run.model.experts.up.clone()
    run.outcome()
    assert norms == pytest.approx([largest] * 6, rel=1e-3)
    assert torch.equal(run.model.experts.up, before) != moves


def test_loss_weights_are_scaled_and_zeros_left_out():
    declared = {"balance": LossWeight(0.02, "mean"), "z": 0.001, "load": 0.0}
    assert scaled(declared, 0.5) == {"balance": LossWeight(0.01, "mean"), "z": LossWeight(0.0005)}
    assert scaled(declared, 0.0) == {}


def test_routers_are_built_from_generators_of_their_own(monkeypatch):
    monkeypatch.setattr(Small, "model", lambda self, router: torch.nn.ModuleList(MoE(self.spec, router) for _ in "ab"))
    run = build("LinearRouter")
    assert not torch.equal(run.model[0].router.weight, run.model[1].router.weight)
