"""k over training, in any `LightningModule`."""

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from routerzoo import KSchedule, MoE
from routerzoo.callbacks.steps import planned_steps
from routerzoo.errors import UserError
from tests.callbacks.plain import QUIET, Plain, loader


def fit(module, *callbacks, **options):
    trainer = Trainer(**{**QUIET, **options}, callbacks=list(callbacks))
    trainer.fit(module, loader(), loader(1))
    return trainer


def test_k_grows_evenly_and_the_last_is_in_the_checkpoint(tmp_path):
    module = Plain()
    trainer = fit(module, KSchedule(1, 4))
    # 1 + 3 t / 8 at t = 0 to 7, to the nearest integer: 1, 1.375, 1.75, 2.125, 2.5, 2.875, 3.25, 3.625.
    assert module.ks == [1, 1, 2, 2, 2, 3, 3, 4]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert [state[f"{name}.router.k"].item() for name in ("first", "second")] == [4, 4]


def test_a_compiled_model_is_not_compiled_for_each_k():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    layer = MoE(d_model=8, num_experts=16)
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=False):
        fit(Plain(), KSchedule(1, 4), max_steps=1)  # sets what a loop of one's own sets itself
        compiled, x_TD = torch.compile(layer, fullgraph=True, backend=backend), torch.randn(5, 8)
        for k in range(1, 13):
            layer.router.top_k = k
            torch.testing.assert_close(compiled(x_TD), layer(x_TD))
    assert len(graphs) == 2  # one for the first k, and one for all others


def test_the_run_is_planned_once_where_accumulation_changes():
    module = Plain()
    schedule = GradientAccumulationScheduler({0: 1, 1: 4})
    trainer = fit(module, KSchedule(1, 4), schedule, max_epochs=4)
    # One step a batch in the first epoch, then one for four batches: 8 + 3 * 2 = 14 steps, not 4 * 8.
    assert trainer.global_step == 14
    by_step = [*module.ks[:8], *module.ks[8::4]]
    # 1 + 3 t / 14: 1.64 at 3, 2.5 (rounded to 2) at 7, 3.57 at 12.
    assert by_step == [1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4]


def test_max_steps_bounds_the_plan():
    trainer = Trainer(**{**QUIET, "max_epochs": 4}, max_steps=9, callbacks=[GradientAccumulationScheduler({1: 4})])
    trainer.fit(Plain(), loader(), loader(1))
    assert planned_steps(trainer) == 9


def test_several_optimizers_do_not_speed_it_up():
    module = Plain(optimizers=2)
    fit(module, KSchedule(1, 4))
    assert module.ks == [1, 1, 2, 2, 2, 3, 3, 4]


def test_impossible_schedules_are_refused_before_training():
    with pytest.raises(UserError, match="KSchedule sets k to 5, but LinearRouter of MoE layer 0 can do 4 at most"):
        fit(Plain(), KSchedule(1, 5))
    with pytest.raises(UserError, match=r"when the run ends: set trainer.max_steps or trainer.max_epochs"):
        fit(Plain(), KSchedule(1, 2), max_epochs=-1)
