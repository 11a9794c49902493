"""Observed routing in numbers, pictures and a page."""

import re
from functools import partial

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from routerzoo import HashRouter, ImageClassification, ImageData, LanguageModeling, LinearRouter, Routing, TextData
from routerzoo.__main__ import main
from routerzoo.data.tokens import TextBatch
from routerzoo.errors import UserError
from routerzoo.look import claims, observe
from routerzoo.look.drawings import draw, expert_colors
from routerzoo.look.observe import expert_weights
from routerzoo.runs.routing_pictures import RoutingPictures

TEXT = {"d_model": 16, "num_blocks": 2, "num_heads": 2, "num_experts": 4, "max_length": 16}
IMAGES = {
    "image_size": 28,
    "in_channels": 1,
    "num_experts": 4,
    "patch_ids": "position",
    "backbone_arguments": {"patch_size": 14, "embed_dim": 12, "depth": 2, "num_heads": 2},
}


def test_weights_of_every_form():
    sparse = Routing(torch.tensor([[1, -1], [0, 2]]), torch.tensor([[0.5, 0.0], [0.3, 0.7]]))
    assert expert_weights(sparse, 3, 2).tolist() == [[0, 0.5, 0], pytest.approx([0.3, 0, 0.7])]
    flat = Routing(token_N=torch.tensor([1, 1]), expert_N=torch.tensor([0, 2]), weight_N=torch.tensor([1.0, 2.0]))
    assert expert_weights(flat, 3, 2).tolist() == [[0, 0, 0], [1, 0, 2]]
    share = torch.rand(1, 2, 3, 2)
    assert torch.equal(expert_weights(Routing(dispatch_GSEP=share, combine_GSEP=share), 3, 2), share.sum(-1)[0])
    merged = Routing(merge_GE=torch.tensor([[0.2, 0.8, 0.0]]), group_T=torch.tensor([0, -1]))
    assert expert_weights(merged, 3, 2).tolist() == [pytest.approx([0.2, 0.8, 0.0]), [0, 0, 0]]


def test_claims_count_tokens_by_label():
    task = LanguageModeling(router=HashRouter, vocab_size=256, **TEXT)
    ids = torch.randint(97, 100, (3, 16))
    observation = observe(task, TextBatch(ids, ids))
    counts = claims([observation, observation], 256)
    for index, block in enumerate(task.net.blocks):
        table = block.feed_forward.router.table[:, 0].long()
        counted = counts[index]
        for label in range(97, 100):
            assert counted[table[label], label] == 2 * (ids == label).sum()
        assert counted.sum() == 2 * ids.numel()
    assert task.training  # as it was


def test_every_call_of_a_shared_layer_is_observed():
    task = LanguageModeling(router=HashRouter, vocab_size=256, **TEXT)
    task.net.blocks[1] = task.net.blocks[0]  # a weight-shared Transformer
    ids = torch.randint(97, 100, (3, 16))
    observation = observe(task, TextBatch(ids, ids))
    assert {index: list(weights.shape) for index, weights in observation.weights.items()} == {0: [6, 16, 4]}
    assert torch.equal(*observation.experts(0).split(3))  # a hash routes both calls alike
    assert claims([observation], 256)[0].sum() == 2 * ids.numel()


def test_a_task_that_looks_its_metrics_up_is_observed(monkeypatch):
    task = LanguageModeling(router=HashRouter, vocab_size=256, **TEXT)
    monkeypatch.setattr(task, "evaluate", lambda batch, metrics: metrics["loss"].update(task.predict_batch(batch).loss))
    ids = torch.randint(97, 100, (3, 16))
    assert list(observe(task, TextBatch(ids, ids)).weights) == [0, 1]
    assert not task.evaluated[0]["loss"].update_called  # it counts what is validated, and nothing else


def test_what_has_no_routing_is_refused():
    with pytest.raises(UserError, match="the model has no MoE layer"):
        observe(LanguageModeling(moe_blocks="none", **TEXT), None)
    with pytest.raises(UserError, match="shown for text and images, not for a dict"):
        observe(LanguageModeling(**TEXT), {})


@pytest.mark.parametrize("num_experts", [2, 10, 16, 64])
def test_experts_have_different_colors(num_experts):
    colors = expert_colors(num_experts)
    assert len(set(colors)) == num_experts
    assert all(re.fullmatch("#[0-9a-f]{6}", color) for color in colors)


@pytest.mark.parametrize("domain", ["language", "vision"])
def test_a_checkpoint_is_looked_at(domain, tmp_path, capsys):
    if domain == "language":
        model = [
            "--model=LanguageModeling",
            *(f"--model.{name}={value}" for name, value in TEXT.items() if name != "max_length"),
        ]
        data = ["--data=TextData", "--data.sequence_length=16", "--data.batch_size=4"]
    else:
        model = ["--model=ImageClassification", "--model.num_experts=4", "--model.patch_ids=position"]
        model += [f"--model.backbone_arguments={IMAGES['backbone_arguments']}"]
        data = ["--data=ImageData", "--data.batch_size=8"]
    quick = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.num_sanity_val_steps=0"]
    quick += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--run_dir=run"]
    main(["fit", *model, *data, *quick])
    before = (tmp_path / "run" / "results.json").read_text()
    main(["look", "--ckpt_path", "run/checkpoints/last.ckpt", "--batches", "2", "--examples", "2"])
    assert (tmp_path / "run" / "results.json").read_text() == before
    page = (tmp_path / "run" / "look.html").read_text()
    assert "MoE layer 0" in page
    assert "claims" in page
    assert "http" not in page.replace("http-equiv", "")  # it needs no other file
    assert (tmp_path / "run" / "look.png").stat().st_size > 5000
    if domain == "language":
        shown = re.findall(r'<span style="background:#\w+" title="expert \d: 0\.\d\d, expert \d: 0\.\d\d">(.)', page)
        assert len(shown) >= 40
    else:
        assert "data:image/png;base64," in page
        assert "Sneaker" in page
    with pytest.raises(SystemExit) as ended:
        main(["look", "--ckpt_path", "run/checkpoints/last.ckpt", "--batches", "0"])
    assert ended.value.code == 2
    assert "error: --examples 6 and --batches 0 must be at least 1\n" in capsys.readouterr().err


def test_tensorboard_gets_a_picture_now_and_then_and_the_run_is_the_same(tmp_path):
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    limits = {"max_steps": 8, "val_check_interval": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0}
    losses = []
    for callbacks in ([RoutingPictures(every_n_validations=2)], []):
        torch.manual_seed(0)
        task = LanguageModeling(router=partial(LinearRouter, top_k=2), dropout=0.2, **TEXT)
        logger = TensorBoardLogger(tmp_path, name="", version=f"logs{len(callbacks)}")
        data = TextData(sequence_length=16, batch_size=4)
        trainer = Trainer(**quiet, **limits, logger=logger, callbacks=callbacks, enable_checkpointing=False)
        trainer.fit(task, data)
        losses.append(float(trainer.callback_metrics["train/loss"]))
    assert losses[0] == losses[1]
    events = EventAccumulator(str(tmp_path / "logs1"))
    events.Reload()
    assert [event.step for event in events.Images("routing/by expert")] == [2, 6]


def test_images_are_drawn_with_their_classes():
    task = ImageClassification(router=HashRouter, num_classes=10, **IMAGES)
    data = ImageData(batch_size=3)
    data.setup("test")
    figure = draw(task, data, observe(task, next(iter(data.test_dataloader()))), examples=2)
    assert len(figure.axes) == 2 * (1 + 1)  # of each image, itself and one MoE layer
    assert figure.axes[0].get_ylabel() in data.class_names
