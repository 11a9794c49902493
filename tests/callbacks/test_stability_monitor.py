"""The same tokens, followed over training."""

import pytest
from lightning import Trainer

from routerzoo import KSchedule, StabilityMonitor
from routerzoo.errors import UserError
from tests.tasks.test_tasks import QUIET, language, text_data


def followed(tmp_path, router, monitor, *callbacks):
    trainer = Trainer(
        **{**QUIET, "logger": True},
        default_root_dir=tmp_path,
        max_steps=8,
        limit_val_batches=1,
        enable_checkpointing=False,
        callbacks=[monitor, *callbacks],
        log_every_n_steps=1,
    )
    trainer.fit(language(router), text_data())
    return trainer


def test_a_learned_gate_moves_and_the_curves_are_drawn(tmp_path):
    monitor = StabilityMonitor(every_n_steps=3, max_tokens=40)
    trainer = followed(tmp_path, "LinearRouter", monitor, KSchedule(1, 4))
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
    followed(tmp_path, "HashRouter", monitor)
    for curve in monitor.curves().values():
        assert curve["fluctuation"] == [0, 0, 0]
        assert curve["saturation"] == curve["settled"] == [1, 1, 1]


def test_what_cannot_be_followed_is_told(tmp_path):
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 5"):
        StabilityMonitor(every_n_steps=0, max_tokens=5)
    trainer = Trainer(
        **QUIET, max_steps=1, limit_val_batches=1, enable_checkpointing=False, callbacks=[StabilityMonitor()]
    )
    with pytest.raises(UserError, match="the model has no MoE layer"):
        trainer.fit(language("LinearRouter", moe_blocks="none"), text_data())
