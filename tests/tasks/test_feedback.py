"""What tasks tell routers beside hidden states: how tokens were predicted, where they are from; and two passes."""

from typing import ClassVar

import pytest
import torch
from lightning import Callback, Trainer

from routerzoo import (
    ImageClassification,
    ImageData,
    LanguageModeling,
    LayerSpec,
    LinearRouter,
    MoE,
    Router,
    Routing,
    RoutingContext,
    TextData,
    auxiliary_loss,
)
from routerzoo.data.tokens import IGNORED_TARGET
from routerzoo.errors import UserError
from routerzoo.moe.layer import moe_layers


def language_task(router=LinearRouter, **options):
    sizes = {"d_model": 16, "num_blocks": 2, "num_heads": 2, "num_experts": 4, "max_length": 16}
    return LanguageModeling(router=router, **{**sizes, **options}), TextData(sequence_length=16, batch_size=4)


def image_task(router=LinearRouter, **options):
    arguments = {"patch_size": 14, "embed_dim": 12, "depth": 2, "num_heads": 2}
    sizes = {"image_size": 28, "in_channels": 1, "num_experts": 4, "backbone_arguments": arguments}
    return ImageClassification(router=router, **{**sizes, **options}), ImageData(batch_size=8)


def quick_trainer(**options):
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    limits = {"max_steps": 1, "limit_val_batches": 0, "num_sanity_val_steps": 0, "enable_checkpointing": False}
    return Trainer(**quiet, **limits, **options)


class Rewarded(Router):
    """Keeps what it is told of each token."""

    paper = "test"
    wants_feedback = True
    default_loss_weights: ClassVar = {"told": 0.5}

    def __init__(self, spec, *, top_k=1):
        super().__init__(spec, top_k=top_k)
        self.gate = torch.nn.Parameter(torch.zeros(spec.num_experts, spec.d_model))

    def route(self, x_TD, context):
        logits_TE = x_TD @ self.gate.T
        return Routing(logits_TE.argmax(-1, keepdim=True), torch.ones(len(x_TD), 1), logits_TE, may_drop=False)

    def feedback(self, routing, context, token_losses_T):
        self.told = token_losses_T
        return {"told": token_losses_T.mean() + 0.0 * routing.logits_TE.sum()}


@pytest.mark.parametrize("make", [language_task, image_task])
def test_routers_are_told_the_loss_of_each_token(make):
    task, data = make(router=Rewarded)
    trainer = quick_trainer()
    trainer.fit(task, data)
    for layer in moe_layers(task.net):
        told = layer.router.told
        assert not told.requires_grad
        assert told.mean() == pytest.approx(float(trainer.callback_metrics["train/loss"]), rel=1e-4)
    layers = len(list(moe_layers(task.net)))
    expected = 0.5 * layers * float(trainer.callback_metrics["train/loss"])
    assert float(trainer.callback_metrics["train/told_loss"]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("make", [language_task, image_task])
def test_two_passes_are_drawn_together(make):
    task, data = make(router=RandomChoice, consistency=2.0)
    seen = {}

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.update(loss=float(outputs["loss"]), **{k: float(v) for k, v in trainer.callback_metrics.items()})

    quick_trainer(callbacks=[Watch()]).fit(task, data)
    assert seen["train/consistency_loss"] > 0
    expected = 2 * seen["train/loss"] + 2.0 * seen["train/consistency_loss"]
    assert seen["loss"] == pytest.approx(expected, rel=1e-4)


class RandomChoice(Router):
    """Draws a new expert for everything in each training pass."""

    paper = "test"
    trainable = False

    def __init__(self, spec, *, top_k=1):
        super().__init__(spec, top_k=top_k)

    def route(self, x_TD, context):
        expert = torch.randint(self.spec.num_experts, (1, 1)) if self.training else torch.zeros(1, 1).long()
        return Routing(expert.expand(len(x_TD), 1), torch.ones(len(x_TD), 1), may_drop=False)


def test_divergence_of_equal_predictions_is_nothing():
    task, data = language_task(consistency=3.0)
    trainer = quick_trainer()
    trainer.fit(task, data)
    assert float(trainer.callback_metrics["train/consistency_loss"]) == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match="consistency must be at least 0, got -1"):
        language_task(consistency=-1)


@pytest.fixture
def corpora(tmp_path):
    files = []
    for name, text in (("a", "abc " * 500), ("b", "xyz " * 900)):
        file = tmp_path / f"{name}.txt"
        file.write_text(text)
        files.append(str(file))
    return files


def test_several_corpora_are_mixed_and_told_apart(corpora):
    data = TextData(corpora, sequence_length=16, batch_size=8)
    assert data.num_tasks == 2
    assert data.vocab_size == 256
    batches = list(data.train_dataloader())
    tasks = torch.cat([batch.task_ids_B for batch in batches])
    texts = [data.decode(row) for batch in batches for row in batch.ids_BS]
    assert all(("a" in text) == (task == 0) for text, task in zip(texts, tasks.tolist(), strict=True))
    assert 0.5 < float(tasks.float().mean()) < 0.8  # in proportion to their lengths
    # Every token of the validation splits but the first of each is predicted once.
    evaluated = sum(int((batch.targets_BS != IGNORED_TARGET).sum()) for batch in data.val_dataloader())
    assert evaluated == sum(len(corpus) for corpus in (range(100), range(180))) - 2
    assert TextData().num_tasks is None
    assert next(iter(TextData(batch_size=2).train_dataloader())).task_ids_B is None


def test_a_router_sees_the_corpus_of_each_token(corpora):
    data = TextData(corpora, sequence_length=16, batch_size=8)
    sizes = {"d_model": 16, "num_blocks": 1, "num_heads": 2, "num_experts": 4, "max_length": 16}
    task = LanguageModeling(router=ByTask, num_tasks=data.num_tasks, **sizes)
    quick_trainer().fit(task, data)
    (layer,) = moe_layers(task.net)
    assert set(layer.router.seen.tolist()) == {0, 1}


class ByTask(Router):
    """Sends a corpus to the expert of its number."""

    paper = "test"
    trainable = False
    requires = frozenset({"task_ids"})

    def route(self, x_TD, context):
        self.seen = context.task_ids
        return Routing(context.task_ids.unsqueeze(1), torch.ones(len(x_TD), 1), may_drop=False)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ([], {}, "dataset must name at least one corpus"),
        (["enwik8", "enwik8"], {}, "and none twice"),
        (["wikitext-2", "ptb"], {"tokenizer": "words"}, "several corpora have no common vocabulary of words"),
    ],
)
def test_bad_lists_of_corpora(dataset, options, message):
    with pytest.raises(UserError, match=message):
        TextData(dataset, **options)


def test_a_second_call_takes_other_losses_of_tokens():
    layer, context = MoE(LayerSpec(8, 4), Rewarded), RoutingContext()
    layer(torch.randn(2, 3, 8), context)
    for factor in (1.0, 3.0):
        assert auxiliary_loss(layer, context, token_losses=factor * torch.ones(2, 3)).item() == 0.5 * factor
    with pytest.raises(ValueError, match="token_losses has 5 entries, and Rewarded routed 6 tokens: give the loss of"):
        auxiliary_loss(layer, context, token_losses=torch.ones(5))
    fresh = RoutingContext()
    layer(torch.randn(2, 3, 8), fresh)
    with pytest.raises(ValueError, match="Rewarded learns 'told' from the task's loss of each token: give"):
        auxiliary_loss(layer, fresh)
