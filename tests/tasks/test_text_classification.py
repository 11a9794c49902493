"""Labels of texts: the model, fine-tuning from a language model, and the command line."""

import csv
from functools import partial

import pytest
import torch
from lightning import Trainer
from torch.testing import assert_close

from routerzoo import LabelledText, LanguageModeling, LinearRouter, TextClassification, TextData
from routerzoo.callbacks import FineTune
from routerzoo.cli import main as cli
from routerzoo.data.labelled_text import LabelledBatch
from routerzoo.errors import UserError
from routerzoo.moe.layer import moe_layers
from tests.conftest import router_factory

SIZES = {"d_model": 16, "num_blocks": 2, "num_heads": 2, "num_experts": 4}
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}


@pytest.fixture
def moods(tmp_path):
    """Texts whose first word says their label."""
    rows = [f"{'yes' if i % 2 else 'no'} and {i},{'good' if i % 2 else 'bad'}" for i in range(400)]
    file = tmp_path / "moods.csv"
    file.write_text("text,label\n" + "\n".join(rows) + "\n")
    return str(file)


def test_every_router_learns_to_classify(router_name, moods):
    torch.manual_seed(0)
    optimizer = partial(torch.optim.AdamW, lr=0.01)
    task = TextClassification(router=router_factory(router_name, top_k=2), optimizer=optimizer, **SIZES)
    limits = {"max_steps": 60, "num_sanity_val_steps": 0, "enable_checkpointing": False}
    trainer = Trainer(**QUIET, **limits)
    data = LabelledText(moods, batch_size=16)
    trainer.fit(task, data)
    (results,) = trainer.test(task, data, verbose=False)
    assert results["test/accuracy"] > 0.95


def test_padding_changes_nothing():
    torch.manual_seed(0)
    task = TextClassification(router=LinearRouter, **SIZES).eval()
    ids = torch.randint(256, (2, 6))
    short = LabelledBatch(ids[:1, :4], torch.zeros(1, 4, dtype=torch.bool), torch.zeros(1).long())
    mask = torch.tensor([[False] * 4 + [True] * 2, [False] * 6])
    padded = LabelledBatch(ids, mask, torch.zeros(2).long())
    assert_close(task(padded)[0][:1], task(short)[0])
    hidden, _ = task.net.hidden(ids, padding_mask_BS=mask)
    assert_close(task(padded)[0], task.classifier(torch.stack([hidden[0, 3], hidden[1, 5]])))


@pytest.mark.parametrize("frozen", [False, True])
def test_fine_tuning_starts_from_a_language_model(frozen, moods, tmp_path):
    torch.manual_seed(0)
    pretrained = LanguageModeling(router=LinearRouter, max_length=32, **SIZES)
    limits = {"limit_val_batches": 1, "num_sanity_val_steps": 0, "default_root_dir": tmp_path}
    trainer = Trainer(**QUIET, **limits, max_steps=5)
    trainer.fit(pretrained, TextData(sequence_length=32, batch_size=2))
    trainer.save_checkpoint("language.ckpt")

    task = TextClassification(
        router=LinearRouter, max_length=32, optimizer=partial(torch.optim.AdamW, lr=0.01), **SIZES
    )
    tuning = FineTune("language.ckpt", freeze_router=frozen, freeze_experts=frozen, except_for=["classifier"])
    Trainer(**QUIET, **limits, max_steps=3, enable_checkpointing=False, callbacks=[tuning]).fit(
        task, LabelledText(moods, sequence_length=32)
    )
    before = dict(pretrained.net.named_parameters())
    moved = {name: not torch.equal(value, before[name]) for name, value in task.net.named_parameters()}
    parts = (".router.", ".experts.")
    assert all(moved[name] != frozen for name in moved if any(part in name for part in parts))
    assert moved["blocks.0.attention.qkv.weight"]
    for layer in moe_layers(task.net):
        assert layer.router.is_frozen == frozen


def test_labels_must_be_those_of_the_data(moods):
    with pytest.raises(UserError, match="the data has 2 classes, the model 5: set num_classes to 2"):
        Trainer(**QUIET, max_steps=1).fit(TextClassification(num_classes=5, **SIZES), LabelledText(moods))


def test_the_command_line_trains_tests_and_predicts(moods, tmp_path, capsys):
    model = ["--model=TextClassification", *(f"--model.{name}={value}" for name, value in SIZES.items())]
    data = ["--data=LabelledText", f"--data.dataset={moods}", "--data.sequence_length=32"]
    quick = ["--trainer.max_steps=4", "--trainer.limit_val_batches=1", "--trainer.num_sanity_val_steps=0"]
    quick += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--run_dir=run"]
    cli.main(["fit", *model, "--model.router=HyperRouter", *data, *quick])
    assert "most frequent class" in capsys.readouterr().out
    cli.main(["test", "--ckpt_path", "run/checkpoints/last.ckpt", "--trainer.enable_progress_bar=false"])
    assert "accuracy" in capsys.readouterr().out
    cli.main(["predict", "--ckpt_path", "run/checkpoints/last.ckpt", "--trainer.enable_progress_bar=false"])
    rows = list(csv.reader((tmp_path / "run" / "predictions.csv").read_text().splitlines()))
    assert rows[0] == ["text", "label", "predicted", "bad", "good"]
    assert len(rows) == 1 + 40
