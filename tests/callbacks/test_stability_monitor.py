"""The same tokens, followed over training."""

import warnings

import pytest
import torch
from lightning import Trainer

from routerzoo import KSchedule, LabelledText, StabilityMonitor, TextClassification
from routerzoo.errors import UserError
from tests.callbacks.plain import PADDING, TOKENS, Plain, loader
from tests.callbacks.plain import QUIET as PLAIN
from tests.tasks.test_tasks import QUIET, language, text_data


def followed(tmp_path, task, *callbacks):
    trainer = Trainer(
        **{**QUIET, "logger": True},
        default_root_dir=tmp_path,
        max_steps=8,
        limit_val_batches=1,
        enable_checkpointing=False,
        callbacks=list(callbacks),
        log_every_n_steps=1,
    )
    trainer.fit(task, text_data())
    return trainer


def test_a_learned_gate_moves_and_the_curves_are_drawn(tmp_path):
    monitor = StabilityMonitor(every_n_steps=3, max_tokens=40)
    # Validation itself routes with another k.
    trainer = followed(tmp_path, language("LinearRouter", eval_top_k=[1, 3]), monitor, KSchedule(1, 4))
    curves = monitor.curves()
    assert set(curves) == {0, 1}
    for curve in curves.values():
        assert curve["steps"] == [0, 3, 6, 8]
        assert curve["saturation"][-1] == curve["settled"][-1] == 1
        assert curve["chance"] == [0.5] * 4  # two of four experts, whatever k is trained with
        assert 0 < max(curve["fluctuation"]) < 1
    assert "stability/moe0/fluctuation" in trainer.logged_metrics
    assert (tmp_path / "stability.png").stat().st_size > 10_000


def test_a_hash_never_fluctuates(tmp_path):
    monitor = StabilityMonitor(every_n_steps=4)
    followed(tmp_path, language("HashRouter"), monitor)
    for curve in monitor.curves().values():
        assert curve["fluctuation"] == [0, 0, 0]
        assert curve["saturation"] == curve["settled"] == [1, 1, 1]


def plain(module, *callbacks, **options):
    trainer = Trainer(**{**PLAIN, **options}, callbacks=list(callbacks))
    trainer.fit(module, loader(), loader(1))
    return trainer


def test_padding_is_not_followed_and_every_call_is():
    monitor = StabilityMonitor(every_n_steps=8, picture=None)
    plain(Plain(padded=True), monitor)
    first, second = (records[0] for records in monitor.state_dict()["experts"])
    real = TOKENS - PADDING
    assert [list(first.shape), list(second.shape)] == [[real, 2], [2 * real, 2]]
    assert (first >= 0).all()


def test_texts_of_different_lengths_are_followed_without_their_padding(tmp_path):
    rows = [f"{'yes ' * (i % 9 + 1)},{i % 2}" for i in range(40)]
    (tmp_path / "texts.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    data = LabelledText(str(tmp_path / "texts.csv"), batch_size=8)
    task = TextClassification(d_model=16, num_blocks=1, num_heads=2, num_experts=4)
    monitor = StabilityMonitor(every_n_steps=2, picture=None)
    Trainer(**QUIET, max_steps=2, enable_checkpointing=False, callbacks=[monitor]).fit(task, data)
    mask_BS = next(iter(data.val_dataloader())).padding_mask_BS
    (records,) = monitor.state_dict()["experts"]
    assert 0 < len(records[0]) == int((~mask_BS).sum()) < mask_BS.numel()
    assert (records >= 0).all()


def test_the_experts_are_those_of_the_validation_batch():
    module = Plain()
    x_TD = next(iter(loader(1)))
    expected_TK = module.first.router(x_TD).experts_TK.sort(-1).values
    monitor = StabilityMonitor(every_n_steps=8, picture=None)
    plain(module, monitor)
    assert torch.equal(monitor.state_dict()["experts"][0][0].long(), expected_TK)
    after_TK = module.first.router(x_TD).experts_TK.sort(-1).values
    assert torch.equal(monitor.state_dict()["experts"][0][-1].long(), after_TK)
    changed = [1 - len(set(a) & set(b)) / 2 for a, b in zip(expected_TK.tolist(), after_TK.tolist(), strict=True)]
    assert monitor.curves()[0]["fluctuation"] == pytest.approx([0, sum(changed) / TOKENS])


def test_the_run_is_the_same_without_it():
    results = []
    for callbacks in ([], [StabilityMonitor(every_n_steps=1, picture=None)]):
        torch.manual_seed(0)
        module = Plain()
        trainer = plain(module, *callbacks, val_check_interval=4)
        assert module.training
        assert module.outputs == []
        results.append({name: value.item() for name, value in trainer.callback_metrics.items() if "moe" not in name})
    assert results[0] == results[1]
    assert results[0]["val/batches"] == 8


def test_monitors_of_different_k_work_side_by_side():
    one, two = (StabilityMonitor(every_n_steps=4, top_k=top_k, picture=None) for top_k in (1, 2))
    plain(Plain(), one, two)
    assert one.curves()[0]["chance"] == [0.25] * 3
    assert two.curves()[0]["chance"] == [0.5] * 3
    state = one.state_dict()
    plain(Plain(), one)  # another run starts over
    assert one.steps_R == state["steps"] == [0, 4, 8]
    assert state["steps"] is not one.steps_R


def test_a_resumed_run_continues_the_records_and_another_batch_starts_them_over(tmp_path):
    trainer = plain(Plain(), StabilityMonitor(every_n_steps=4, picture=None))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    for batch_size, steps in ((TOKENS, [0, 4, 8, 12, 16]), (3, [12, 16])):
        monitor = StabilityMonitor(every_n_steps=4, picture=None)
        resumed = Trainer(**{**PLAIN, "max_epochs": 2}, callbacks=[monitor])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            resumed.fit(Plain(), loader(), loader(1, batch_size), ckpt_path=tmp_path / "half.ckpt")
        assert any("records start over" in str(warning.message) for warning in caught) == (batch_size == 3)
        assert monitor.steps_R == steps


def test_what_cannot_be_followed_is_refused():
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 5"):
        StabilityMonitor(every_n_steps=0, max_tokens=5)
    with pytest.raises(UserError, match="the model has no MoE layer"):
        Trainer(**PLAIN, callbacks=[StabilityMonitor()]).fit(language("LinearRouter", moe_blocks="none"), text_data())
    with pytest.raises(UserError, match="top_k must be between 1 and 4 for LinearRouter, got 5"):
        plain(Plain(), StabilityMonitor(top_k=5))
    with pytest.raises(UserError, match="there is no validation batch to follow"):
        plain(Plain(), StabilityMonitor(), limit_val_batches=0)
