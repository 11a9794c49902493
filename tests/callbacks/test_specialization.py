"""Specialization and co-activation over a whole split."""

import pytest
import torch
from lightning import Trainer

from routerzoo import ExpertSpecialization, ImageData
from tests.tasks.test_tasks import QUIET, language, text_data, vision


def evaluated(tmp_path, task, data, method="test"):
    options = {**QUIET, "logger": True, "default_root_dir": tmp_path, "enable_checkpointing": False}
    trainer = Trainer(
        **options, limit_test_batches=3, limit_val_batches=3, callbacks=[ExpertSpecialization(min_count=2)]
    )
    (results,) = getattr(trainer, method)(task, data, verbose=False)
    return results


def test_a_hash_is_perfectly_specialized_in_token_ids(tmp_path):
    results = evaluated(tmp_path, language("HashRouter", eval_top_k=[1, 2]), text_data())
    assert results["test/moe0/specialization"] == 1
    assert results["test/moe0/specialization_chance"] == pytest.approx(1 / 4)
    assert results["test/moe1/collapse"] > 0
    assert (tmp_path / "test_specialization.png").stat().st_size > 20_000


def test_images_are_described_by_class(tmp_path):
    results = evaluated(tmp_path, vision("LinearRouter"), ImageData(batch_size=8), "validate")
    assert 0.5 <= results["val/moe0/specialization"] <= 1
    assert results["val/moe0/specialization_chance"] == pytest.approx(2 / 4)
    assert (tmp_path / "val_specialization.png").is_file()


def test_padding_is_not_described():
    callback, task = ExpertSpecialization(min_count=1), language("LinearRouter")
    trainer = Trainer(**QUIET)
    callback._start(trainer, task)
    mask_T = torch.arange(16) >= 6
    task.eval().net(torch.randint(256, (1, 16)), padding_mask_BS=mask_T.unsqueeze(0))
    assert len(callback._metrics) == 2
    for metrics in callback._metrics.values():
        assert metrics.co_activation.pairs_EE.diagonal().sum() == 6 * 2
        assert metrics.collapse.tokens_C.sum() == 6
        assert metrics.specialization.tokens_V.sum() == 6


@pytest.mark.parametrize("while_training", [True, False])
def test_collapse_is_followed_over_training_when_asked(while_training, tmp_path):
    options = {**QUIET, "default_root_dir": tmp_path, "enable_checkpointing": False, "max_steps": 2}
    limits = {"limit_val_batches": 2, "val_check_interval": 2}
    trainer = Trainer(**options, **limits, callbacks=[ExpertSpecialization(min_count=2, while_training=while_training)])
    trainer.fit(language("LinearRouter"), text_data())
    assert ("val/moe0/collapse" in trainer.callback_metrics) == while_training
    assert not list(tmp_path.glob("*specialization*"))
