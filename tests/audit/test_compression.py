"""Experts that are pruned or merged: what stays the same, what it costs, and what cannot be cut."""

import copy
from functools import partial

import pytest
import torch
from lightning import Trainer

from routerzoo import LanguageModeling, LinearRouter, MoE, TextData
from routerzoo.audit import audit, compress, subject_of_task
from routerzoo.audit.compression import _merge
from routerzoo.errors import UserError
from tests.audit.test_audit import Net, dead, subject_of


@pytest.mark.parametrize("by", ["load", "output"])
def test_dead_experts_are_pruned_for_nothing(by):
    net = Net()
    with torch.no_grad():
        for layer in net.layers:
            dead(layer)
    subject = subject_of(net)
    ids = subject.batches[0]
    before, experts = net(ids), net.layers[0].experts.up.detach().clone()
    result = compress(subject, audit(subject), 7, by=by)
    assert result.kept == [[0, 1, 2, 4, 5, 6, 7]] * 2
    assert result.loss_after == pytest.approx(result.loss_before, abs=1e-6)
    torch.testing.assert_close(net(ids), before)
    assert torch.equal(net.layers[0].experts.up, experts[result.kept[0]])
    assert net.layers[0].router.weight.shape == (7, 16)
    assert result.parameters_after < result.parameters_before
    assert audit(subject).layers[0].num_experts == 7
    net(ids).sum().backward()  # it trains
    assert net.layers[0].router.weight.grad.abs().sum() > 0


def test_the_least_loaded_experts_go_and_the_loss_is_measured():
    subject = subject_of(Net())
    measured = audit(subject)
    result = compress(subject, measured, 4, by="load")
    for layer, kept in zip(measured.layers, result.kept, strict=True):
        gone = [load for expert, load in enumerate(layer.relative_load) if expert not in kept]
        assert max(gone) <= min(layer.relative_load[expert] for expert in kept)
    assert result.loss_before == pytest.approx(measured.loss)
    assert result.loss_after == pytest.approx(audit(subject).loss)
    assert result.merged_into == [{}, {}]


@pytest.mark.parametrize("experts", ["MLPExperts", "SwiGLUExperts"])
def test_merging_copies_in_another_order_changes_nothing(experts):
    bank = MoE(d_model=8, num_experts=4, experts=experts).experts
    order = torch.randperm(bank.hidden_dim)
    halves = bank.network().up.shape[1] // bank.hidden_dim
    with torch.no_grad():
        for bias in (bank.network().up_bias, bank.network().down_bias):
            if bias is not None:
                bias.normal_()
        for tensor, axis in zip(bank.network()[:4], (0, 0, 1, None), strict=True):
            if tensor is not None:
                shuffled = tensor[1].clone()
                if axis == 0:
                    shuffled = shuffled.view(halves, len(order), -1)[:, order].reshape(shuffled.shape)
                elif axis == 1:
                    shuffled = shuffled[:, order]
                tensor[3] = shuffled
    x_TD, before = torch.randn(5, 8), copy.deepcopy(bank)
    assert torch.allclose(bank.one(3, x_TD), bank.one(1, x_TD), atol=1e-5)
    with torch.no_grad():
        _merge(bank, {3: 1}, [1.0, 1.5, 1.0, 0.5])
        torch.testing.assert_close(bank.one(1, x_TD), before.one(1, x_TD))
        _merge(bank, {2: 0}, [3.0, 1.0, 1.0, 1.0])
    assert torch.equal(bank.down[2], before.down[2])
    assert not torch.equal(bank.down[0], before.down[0])


def test_experts_are_merged_into_those_that_are_left():
    subject = subject_of(Net())
    result = compress(subject, audit(subject), 5, method="merge")
    for kept, partners in zip(result.kept, result.merged_into, strict=True):
        assert sorted([*kept, *partners]) == list(range(8))
        assert set(partners.values()) <= set(kept)
    assert result.loss_after == pytest.approx(audit(subject).loss)


def test_what_cannot_be_cut_is_said_and_left_as_it_was():
    subject = subject_of(Net())
    measured = audit(subject)
    before = {name: value.clone() for name, value in subject.net.state_dict().items()}
    for options, told in (
        ({"num_experts": 1}, "num_experts must be at least k = 2 and below the 8 of MoE layer 0, got 1"),
        ({"num_experts": [4, 6]}, r"num_experts is one number for all layers, .* got \[4, 6\]"),
        ({"num_experts": 8}, "below the 8 of MoE layer 0, got 8"),
        ({"num_experts": 4, "by": "norm"}, "method must be prune or merge, and by load or output"),
    ):
        with pytest.raises(UserError, match=told):
            compress(subject, measured, **options)
    with pytest.raises(UserError, match=r"the audit is of layers of \[6, 6\] experts, the model's have \[8, 8\]"):
        compress(subject, audit(subject_of(Net(num_experts=6))), 4)
    hashed = subject_of(Net("HashRouter"))
    with pytest.raises(UserError, match="MoE layer 0: HashRouter is no LogitRouter by itself"):
        compress(hashed, audit(hashed), 4)
    generated = subject_of(Net("HyperRouter"))
    with pytest.raises(UserError, match="MoE layer 0: the gate of HyperRouter cannot be cut expert by expert"):
        compress(generated, audit(generated), 4)
    assert all(torch.equal(value, before[name]) for name, value in subject.net.state_dict().items())


@pytest.mark.full
def test_a_task_is_saved_with_the_experts_that_are_left(tmp_path):
    router = partial(LinearRouter, top_k=2)
    task = LanguageModeling(d_model=16, num_blocks=2, num_heads=2, num_experts=4, max_length=16, router=router)
    subject = subject_of_task(task, TextData(sequence_length=16, batch_size=4), name="task", num_batches=4)
    result = compress(subject, audit(subject), 3)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=0, barebones=True)
    trainer.strategy.connect(task)
    task.trainer = trainer
    trainer.save_checkpoint(tmp_path / "pruned.ckpt", weights_only=True)
    loaded = LanguageModeling.load_from_checkpoint(tmp_path / "pruned.ckpt")
    again = subject_of_task(loaded, TextData(sequence_length=16, batch_size=4), name="task", num_batches=4)
    assert audit(again).loss == pytest.approx(result.loss_after, rel=1e-5)


@pytest.mark.full
def test_a_released_model_goes_out_with_the_experts_that_are_left(tmp_path):
    transformers = pytest.importorskip("transformers")
    from routerzoo import hf
    from routerzoo.audit.released import subject_of_transformers

    sizes = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 40)
    for method in ("prune", "merge"):
        model = hf.replace_routers(transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).eval())
        subject = subject_of_transformers(model, tmp_path / "text.txt", name="mixtral", tokenizer="bytes", length=64)
        compress(subject, audit(subject), 5, method=method)
        ids = torch.randint(256, (2, 9))
        expected = model(input_ids=ids).logits
        model.save_pretrained("ours")
        torch.testing.assert_close(transformers.AutoModelForCausalLM.from_pretrained("ours")(ids).logits, expected)
        hf.to_transformers(model).save_pretrained("plain")
        plain = transformers.AutoModelForCausalLM.from_pretrained("plain")
        assert type(plain) is transformers.MixtralForCausalLM
        assert plain.config.num_local_experts == 5
        torch.testing.assert_close(plain(ids).logits, expected)
