"""What `RoutingMonitor` counts, and when."""

import pytest
import torch
from lightning import Trainer

from routerzoo import ExpertSpecialization, RoutingMonitor, StabilityMonitor, moe_layers
from tests.callbacks.plain import PADDING, QUIET, TOKENS, Plain, loader

# Tokens times k, and the second layer is called twice.
BATCH = [2 * TOKENS, 2 * 2 * TOKENS]


def recorded(module, *, callbacks=(), **options):
    monitor = RoutingMonitor(picture=None)
    trainer = Trainer(**{**QUIET, "log_every_n_steps": 1, **options}, callbacks=[*callbacks, monitor])
    trainer.fit(module, loader(), loader(1))
    return monitor, trainer


def sums(monitor):
    return [loads_LE.sum(1).tolist() for loads_LE in monitor.loads_R]


def test_layers_without_numbers_and_every_call_are_counted():
    monitor, trainer = recorded(Plain(), log_every_n_steps=3)
    assert monitor.steps_R == [3, 6]
    assert sums(monitor) == [BATCH] * 2
    assert len(monitor.last_statistics) == 2
    for stage in ("train", "val"):
        for layer in range(2):
            assert trainer.callback_metrics[f"{stage}/moe{layer}/active_experts"] == 2
    assert not any(layer._routing_hooks for layer in moe_layers(trainer.lightning_module))


def test_load_is_that_of_the_routings():
    module = Plain()
    with torch.no_grad():
        module.first.router.weight.zero_()  # ties: every token selects the same two experts
    monitor, trainer = recorded(module, max_steps=1)
    assert sorted(monitor.loads_R[0][0].tolist()) == [0, 0, TOKENS, TOKENS]
    assert trainer.callback_metrics["train/moe0/load_max"] == 2
    assert trainer.callback_metrics["train/moe0/dead_experts"] == 2
    assert trainer.callback_metrics["train/moe0/gate_entropy"] == 1


def test_neither_padding_nor_recomputation_counts():
    monitor, _ = recorded(Plain(padded=True, recomputes=True), max_steps=2)
    real = TOKENS - PADDING
    assert sums(monitor) == [[2 * real, 2 * 2 * real]] * 2


def test_a_step_over_several_batches_is_one_record():
    monitor, _ = recorded(Plain(), accumulate_grad_batches=4)
    assert monitor.steps_R == [1, 2]
    assert sums(monitor) == [[4 * count for count in BATCH]] * 2
    monitor, _ = recorded(Plain(), accumulate_grad_batches=3, log_every_n_steps=3)
    assert monitor.steps_R == [3]  # the last step of the epoch has two batches left
    assert sums(monitor) == [[2 * count for count in BATCH]]


@pytest.mark.parametrize("backward", ["manual_backward", "backward"])
def test_several_optimizers_are_counted_as_lightning_does(backward):
    monitor, trainer = recorded(Plain(optimizers=2, backward=backward), log_every_n_steps=4)
    assert trainer.global_step == 16
    assert monitor.steps_R == [4, 8]
    assert sums(monitor) == [BATCH] * 2


@pytest.mark.parametrize("options", [{"log_every_n_steps": 0}, {"barebones": True}])
def test_nothing_is_recorded_where_lightning_logs_nothing(options):
    if "barebones" in options:
        options = {"barebones": True, "log_every_n_steps": None, **dict.fromkeys(("logger", "num_sanity_val_steps"))}
        options |= dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"))
    module = Plain()
    module.log = lambda *args, **kwargs: None  # Lightning warns that it does nothing
    monitor, _ = recorded(module, **options)
    assert monitor.steps_R == []


def test_a_run_that_is_shorter_than_the_interval_records_its_last_step(tmp_path):
    monitor, _ = recorded(Plain(), max_steps=5, log_every_n_steps=10)
    assert monitor.steps_R == [5]
    monitor = RoutingMonitor()
    options = {**QUIET, "log_every_n_steps": 10, "default_root_dir": tmp_path}
    Trainer(**options, limit_train_batches=3, callbacks=[monitor]).fit(Plain(), loader(), loader(1))
    assert monitor.steps_R == [3]
    assert (tmp_path / "routing.png").is_file()


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_batch_that_training_step_skips_is_not_recorded():
    monitor, _ = recorded(Plain(skipped=[2]), log_every_n_steps=3)
    assert monitor.steps_R == [6]
    assert sums(monitor) == [BATCH]


def test_passes_of_other_callbacks_do_not_count():
    stability = StabilityMonitor(every_n_steps=1, picture=None)
    monitor, _ = recorded(Plain(), callbacks=[stability])
    assert stability.steps_R == list(range(9))
    assert sums(monitor) == [BATCH] * 8


@pytest.mark.parametrize("build", [RoutingMonitor, ExpertSpecialization])
def test_an_exception_leaves_no_hook(build):
    module = Plain()
    module.on_validation_batch_end = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        Trainer(**QUIET, callbacks=[build()]).validate(module, loader(), verbose=False)
    assert not any(layer._routing_hooks or layer._forward_pre_hooks for layer in moe_layers(module))
    with torch.no_grad():
        module(torch.randn(3, 8))


def test_the_state_is_a_copy_and_a_new_run_starts_over():
    monitor, trainer = recorded(Plain(), log_every_n_steps=4)
    state = monitor.state_dict()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module, loader(), loader(1))
    assert state["steps"] == [4, 8]
    assert len(state["loads"]) == 2
    assert monitor.steps_R == [4, 8, 12, 16]
    restored = RoutingMonitor()
    restored.load_state_dict(state)
    assert restored.steps_R == [4, 8]
    assert torch.equal(torch.stack(restored.loads_R), state["loads"])
    Trainer(**{**QUIET, "log_every_n_steps": 1}, max_steps=1, callbacks=[monitor]).fit(Plain(), loader(), loader(1))
    assert monitor.steps_R == [1]


def test_two_of_them_have_states_of_their_own():
    Trainer(**QUIET, callbacks=[RoutingMonitor("a.png"), RoutingMonitor("b.png")])
    with pytest.raises(RuntimeError, match="must be unique"):
        Trainer(**QUIET, callbacks=[RoutingMonitor(), RoutingMonitor()])
