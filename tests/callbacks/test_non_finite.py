"""Training stops on a NaN or inf loss, and names the layer."""

import pytest
import torch
from lightning import Callback, Trainer

from routerzoo.callbacks import StopOnNonFiniteLoss
from routerzoo.errors import UserError
from routerzoo.moe.layer import moe_layers
from tests.callbacks.plain import QUIET as PLAIN
from tests.callbacks.plain import Plain, loader
from tests.tasks.test_tasks import QUIET, language, text_data


class Break(Callback):
    """Writes NaN into a parameter before the third step."""

    def __init__(self, find):
        self.find = find

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            with torch.no_grad():
                self.find(pl_module).view(-1)[0] = torch.nan


@pytest.mark.parametrize(
    ("find", "message"),
    [
        (
            lambda task: list(moe_layers(task))[1].router.weight,
            "LinearRouter's router.weight of MoE layer 1",
        ),
        (lambda task: next(moe_layers(task)).experts.down, "experts.down of MoE layer 0 holds NaN or inf"),
        (lambda task: task.net.norm.weight, "net.norm.weight holds NaN or inf. Try a smaller learning rate"),
    ],
)
def test_the_step_and_the_layer_are_named(find, message):
    trainer = Trainer(**QUIET, max_steps=5, enable_checkpointing=False, callbacks=[Break(find), StopOnNonFiniteLoss()])
    with pytest.raises(UserError, match=f"the loss is nan at step 2: {message}"):
        trainer.fit(language("LinearRouter"), text_data())


def test_checks_may_be_rarer():
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        StopOnNonFiniteLoss(0)
    task, data = language("LinearRouter"), text_data()
    finding = Break(lambda task: task.net.norm.weight)
    trainer = Trainer(**QUIET, max_steps=8, enable_checkpointing=False, callbacks=[finding, StopOnNonFiniteLoss(4)])
    with pytest.raises(UserError, match="the loss is nan at step 4"):
        trainer.fit(task, data)


class BreakLoss(Callback):
    """Makes the loss of some steps NaN, and keeps the parameters of each step."""

    def __init__(self, steps):
        self.steps, self.kept = steps, []

    def on_before_backward(self, trainer, pl_module, loss):
        self.kept.append(torch.cat([p.detach().flatten() for p in pl_module.parameters()]).clone())
        if trainer.global_step in self.steps:
            loss.mul_(torch.nan)


def test_a_step_is_skipped():
    breaking = BreakLoss({2, 3})
    skipping = StopOnNonFiniteLoss(skip=2)
    trainer = Trainer(**QUIET, max_steps=6, enable_checkpointing=False, callbacks=[breaking, skipping])
    with pytest.warns(UserWarning, match="skipped step [23]: its loss or gradient is NaN or inf"):
        trainer.fit(language("LinearRouter"), text_data())
    assert skipping.skipped == 2
    changed = [not torch.equal(one, other) for one, other in zip(breaking.kept, breaking.kept[1:], strict=False)]
    assert changed == [True, True, False, False, True]
    assert all(kept.isfinite().all() for kept in breaking.kept)


@pytest.mark.filterwarnings("ignore:skipped step")
def test_a_run_stops_after_too_many_skipped_steps():
    breaking = BreakLoss({2, 3, 4})
    trainer = Trainer(
        **QUIET, max_steps=6, enable_checkpointing=False, callbacks=[breaking, StopOnNonFiniteLoss(skip=2)]
    )
    with pytest.raises(UserError, match="the loss is nan at step 4, after 2 skipped steps"):
        trainer.fit(language("LinearRouter"), text_data())


class BreakGradient(Callback):
    """Makes a gradient of some steps NaN or inf, while the loss is finite, and keeps the parameters of each step."""

    def __init__(self, steps, value=torch.nan, find=lambda task: list(moe_layers(task))[1].router.weight):
        self.steps, self.value, self.find, self.kept = steps, value, find, []

    def on_after_backward(self, trainer, pl_module):
        self.kept.append(torch.cat([p.detach().flatten() for p in pl_module.parameters()]).clone())
        if trainer.global_step in self.steps:
            self.find(pl_module).grad.view(-1)[3] = self.value


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_broken_gradient_of_a_finite_loss_stops_the_run_before_it_is_written(value):
    task, breaking = language("LinearRouter"), BreakGradient({2}, value)
    trainer = Trainer(**QUIET, max_steps=5, enable_checkpointing=False, callbacks=[breaking, StopOnNonFiniteLoss()])
    with pytest.raises(
        UserError,
        match=r"the loss is finite at step 2, but a gradient is NaN or inf: the first is that of LinearRouter's "
        r"router\.weight of MoE layer 1\. The optimizer has not used it",
    ):
        trainer.fit(task, text_data())
    assert all(parameter.isfinite().all() for parameter in task.parameters())


def test_a_large_gradient_is_no_broken_one():
    breaking = BreakGradient({2}, 1e30)  # its square is not finite
    trainer = Trainer(**QUIET, max_steps=4, enable_checkpointing=False, callbacks=[breaking, StopOnNonFiniteLoss()])
    trainer.fit(language("LinearRouter"), text_data())
    assert trainer.global_step == 4


@pytest.mark.filterwarnings("ignore:skipped step")
def test_steps_with_broken_gradients_are_skipped():
    breaking, skipping = BreakGradient({1, 3}), StopOnNonFiniteLoss(skip=1)
    trainer = Trainer(**QUIET, max_steps=5, enable_checkpointing=False, callbacks=[breaking, skipping])
    trainer.fit(language("LinearRouter"), text_data())
    assert skipping.skipped == 2
    changed = [not torch.equal(one, other) for one, other in zip(breaking.kept, breaking.kept[1:], strict=False)]
    assert changed == [True, False, True, False]


@pytest.mark.filterwarnings("ignore:skipped step")
def test_optimizers_that_share_a_loss_skip_together():
    module, skipping = Plain(optimizers=2), StopOnNonFiniteLoss(skip=1)
    breaking = BreakLoss({4, 8})  # two optimizers: steps 4 and 8 of both are the third and fifth batch
    Trainer(**PLAIN, callbacks=[breaking, skipping]).fit(module, loader(), loader(1))
    assert skipping.skipped == 2
    changed = [not torch.equal(one, other) for one, other in zip(breaking.kept, breaking.kept[1:], strict=False)]
    assert changed == [True, True, False, True, False, True, True]
