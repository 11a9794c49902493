"""Fine-tuning with frozen routing."""

import pytest
import torch
from lightning import Trainer

from routerzoo import FineTune, RoutingContext, auxiliary_loss, moe_layers
from routerzoo.errors import UserError
from tests.tasks.test_tasks import QUIET, language, text_data, vision


def trained(task, tmp_path, name="first.ckpt"):
    trainer = Trainer(**QUIET, max_steps=3, limit_val_batches=1, enable_checkpointing=False)
    trainer.fit(task, text_data())
    trainer.save_checkpoint(tmp_path / name)
    return {key: value.clone() for key, value in task.state_dict().items()}


def fine_tuned(task, tmp_path, steps=4, ckpt_path=None, **options):
    callback = FineTune(str(tmp_path / "first.ckpt"), **options)
    trainer = Trainer(**QUIET, max_steps=steps, limit_val_batches=1, enable_checkpointing=False, callbacks=[callback])
    trainer.fit(task, text_data(), ckpt_path=ckpt_path)
    return trainer


def test_router_and_experts_stay_and_the_rest_learns(router_name, tmp_path):
    before = trained(language(router_name), tmp_path)
    task = language(router_name)
    trainer = fine_tuned(task, tmp_path)
    for name, value in task.state_dict().items():
        frozen = ".router." in name or ".experts." in name
        if value.is_floating_point():
            assert torch.equal(value, before[name]) == frozen, name
    if router_name == "XMoERouter":
        # The balance loss goes on; it shapes the hidden states alone.
        assert trainer.callback_metrics["train/balance_loss"] > 0


def test_the_balance_loss_of_a_frozen_router_reaches_the_hidden_states():
    layer = next(moe_layers(language("XMoERouter")))
    layer.router.freeze()
    x_TD, context = torch.randn(9, 16, requires_grad=True), RoutingContext()
    layer(x_TD, context)
    auxiliary_loss(layer, context, {"balance": 1.0}).backward()
    assert x_TD.grad.abs().sum() > 0
    assert layer.router.projection.grad is None


def test_a_resumed_fine_tuning_keeps_its_own_weights(tmp_path):
    before = trained(language("XMoERouter"), tmp_path)
    task = language("XMoERouter")
    fine_tuned(task, tmp_path).save_checkpoint(tmp_path / "second.ckpt")
    own = task.state_dict()["net.embedding.weight"].clone()
    resumed = language("XMoERouter")
    fine_tuned(resumed, tmp_path, steps=6, ckpt_path=tmp_path / "second.ckpt")
    assert not any(p.requires_grad for layer in moe_layers(resumed) for p in layer.router.parameters())
    name = "net.blocks.0.feed_forward.router.projection"
    assert torch.equal(resumed.state_dict()[name], before[name])
    moved = (resumed.state_dict()["net.embedding.weight"] - own).abs().max()
    assert 0 < moved < (own - before["net.embedding.weight"]).abs().max() * 10


def test_only_what_is_asked_for_is_frozen_and_k_is_the_new_runs(tmp_path):
    before = trained(language("LinearRouter"), tmp_path)
    task = language("LinearRouter")
    for layer in moe_layers(task):
        layer.router.top_k = 3
    fine_tuned(task, tmp_path, freeze_experts=False)
    after = task.state_dict()
    layer = "net.blocks.0.feed_forward"
    assert torch.equal(after[f"{layer}.router.weight"], before[f"{layer}.router.weight"])
    assert not torch.equal(after[f"{layer}.experts.up"], before[f"{layer}.experts.up"])
    assert [layer.router.top_k for layer in moe_layers(task)] == [3, 3]


def test_a_second_fit_continues(tmp_path):
    trained(language("LinearRouter"), tmp_path)
    task = language("LinearRouter")
    trainer = fine_tuned(task, tmp_path)
    own = task.net.embedding.weight.detach().clone()
    callback = trainer.callbacks[0]
    callback.on_fit_start(trainer, task)
    assert torch.equal(task.net.embedding.weight, own)


def test_another_model_is_refused_with_the_names(tmp_path):
    trained(language("LinearRouter"), tmp_path)
    with pytest.raises(
        UserError, match=r"does not fit the model at net\..*name the weights that are not to be loaded in except_for"
    ):
        fine_tuned(language("LinearRouter", vocab_size=300, tie_weights=False), tmp_path)
    with pytest.raises(UserError, match="no checkpoint to fine-tune from"):
        fine_tuned(language("LinearRouter"), tmp_path / "nowhere")


def test_a_new_head_keeps_its_initialization(tmp_path):
    task = vision("LinearRouter", num_classes=10)
    trainer = Trainer(**QUIET, max_steps=1, limit_val_batches=1, enable_checkpointing=False)
    trainer.strategy.connect(task)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    new = vision("LinearRouter", num_classes=3)
    callback = FineTune(str(tmp_path / "first.ckpt"), except_for=["net.vit.head"])
    callback.on_fit_start(trainer, new)
    assert torch.equal(new.state_dict()["net.vit.pos_embed"], task.state_dict()["net.vit.pos_embed"])
