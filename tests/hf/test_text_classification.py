"""`PretrainedTextClassification`, in Python and on the command line."""

import contextlib
import csv
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from safetensors import torch as safetensors
from torch.testing import assert_close

from routerzoo import HashRouter, LabelledText, LinearRouter, PretrainedTextClassification, moe_layers
from routerzoo.cli import audit
from routerzoo.cli import main as cli
from routerzoo.data.labelled_text import LabelledBatch
from routerzoo.errors import UserError
from tests.conftest import router_factory
from tests.hf.models import GQA, LOCAL, QUIET

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("routerzoo.hf")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
CONFIG = str(Path(__file__).parents[2] / "configs" / "pretrained" / "classify.yaml")
SIZES = {key: value for key, value in GQA.items() if "token" not in key and key != "vocab_size"}
BERT = {
    "model_type": "bert",
    **{k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")},
    "vocab_size": 256,
}
LLAMA = {"model_type": "llama", **SIZES, "vocab_size": 256}
MIXTRAL = {"model_type": "mixtral", **SIZES, **LOCAL, "vocab_size": 256}


@pytest.fixture
def moods(tmp_path):
    """Texts whose first word says their label."""
    rows = [f"{'yes' if i % 2 else 'no'} and {i},{'good' if i % 2 else 'bad'}" for i in range(400)]
    file = tmp_path / "moods.csv"
    file.write_text("text,label\n" + "\n".join(rows) + "\n")
    return str(file)


def task_of(source=BERT, **options):
    return PretrainedTextClassification(
        source, **{"max_length": 32, "num_experts": 4, "router": LinearRouter, **options}
    )


def words(folder):
    """Write a tokenizer of words, as BERT's."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", "and"]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def batch_of(lengths, high=256):
    ids_BS = torch.randint(1, high, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    mask_BS = torch.arange(max(lengths)) >= torch.tensor(lengths).unsqueeze(1)
    return LabelledBatch(ids_BS, mask_BS, torch.zeros(len(lengths)).long())


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:the upcycled model does not compute")  # it learns all the same
def test_every_router_learns_to_classify(router_name, moods):
    torch.manual_seed(0)
    task = task_of(router=router_factory(router_name, top_k=2), optimizer=partial(torch.optim.AdamW, lr=0.01))
    data = LabelledText(moods, batch_size=16)
    trainer = Trainer(**QUIET, max_steps=40, limit_val_batches=0)
    trainer.fit(task, data)
    (results,) = trainer.test(task, data, verbose=False)
    assert results["test/accuracy"] > 0.95


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_an_upcycled_classifier_starts_as_the_dense_one(kind, tmp_path):
    config = transformers.AutoConfig.for_model(kind, **SIZES, vocab_size=256, num_labels=3, pad_token_id=0)
    dense = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    dense.save_pretrained(tmp_path)
    task = task_of(str(tmp_path), num_classes=3).eval()
    batch = batch_of([3, 9, 1])
    logits_BL, context = task(batch, step=3, total_steps=7)
    # Each text alone, without padding.
    expected_BL = torch.cat(
        [
            dense(input_ids=ids[~mask][None]).logits
            for ids, mask in zip(batch.ids_BS, batch.padding_mask_BS, strict=True)
        ]
    )
    assert_close(logits_BL, expected_BL, rtol=0, atol=1e-5)
    assert (context.step, context.total_steps, len(context.routings)) == (3, 7, 2)
    assert context.routings[0].routing.expert_load(4).sum() == 2 * (3 + 9 + 1)
    # The loss of each token is its text's, and that of padding 0.
    losses_T = task.token_losses(torch.tensor([1.0, 2.0, 3.0]), batch, context)
    assert losses_T.view(3, 9).sum(1).tolist() == [3.0, 18.0, 3.0]


def trained_parts(task):
    routers, experts = (
        {p for layer in moe_layers(task) for p in getattr(layer, part).parameters()} for part in ("router", "experts")
    )
    return {
        "head"
        if "classifier" in name or "score" in name
        else "lora"
        if "lora" in name
        else "routers"
        if p in routers
        else "experts"
        if p in experts
        else "rest"
        for name, p in task.named_parameters()
        if p.requires_grad
    }


@pytest.mark.parametrize(
    ("source", "options", "parts"),
    [
        (BERT, {}, {"rest", "routers", "experts", "head"}),
        (BERT, {"train": "all-but-experts"}, {"rest", "routers", "head"}),
        (BERT, {"train": "moe"}, {"routers", "experts", "head"}),
        (BERT, {"train": "routers"}, {"routers", "head"}),
        (BERT, {"train": "routers", "router": partial(HashRouter, top_k=1)}, {"head"}),
        (BERT, {"moe_blocks": "none", "num_experts": None}, {"rest", "head"}),
        (BERT, {"lora": {"r": 2}}, {"lora", "head"}),
        (BERT, {"pooling": "mean", "train": "routers"}, {"routers", "head"}),
        (MIXTRAL, {"train": "routers", "router": "keep", "num_experts": None}, {"routers", "head"}),
    ],
)
def test_what_is_chosen_is_trained_and_the_head(source, options, parts, moods):
    task = task_of(source, **options)
    assert trained_parts(task) == parts
    before = {name: parameter.clone() for name, parameter in task.named_parameters()}
    Trainer(**QUIET, max_steps=2, limit_val_batches=1).fit(task, LabelledText(moods, sequence_length=32))
    moved = {name for name, parameter in task.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved <= {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert any("classifier" in name or "score" in name for name in moved)


def test_texts_are_read_as_the_model_reads_them(moods, tmp_path):
    data = LabelledText(moods, tokenizer=words(tmp_path), sequence_length=5, batch_size=2)
    batch = next(iter(data.val_dataloader()))
    encoded = transformers.AutoTokenizer.from_pretrained(tmp_path)(
        [example.text for example in data.examples("val")[:2]], truncation=True, max_length=5, padding=True
    )
    assert batch.ids_BS.tolist() == encoded["input_ids"]
    assert (~batch.padding_mask_BS).long().tolist() == encoded["attention_mask"]
    assert data.vocab_size == len(data.token_counts()) == 8
    assert data.token_counts()[[2, 3]].tolist() == [320, 320]  # each text begins with [CLS] and ends with [SEP]
    assert data.decode([5, 7]) == "yes and"


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("/nowhere/model", {}, "there is no folder /nowhere/model"),
        ({"model_type": "clip_vision_model"}, {}, "no classifier of texts has the config"),
        (BERT, {"num_experts": None}, "BertForSequenceClassification has no gate that is known.*set num_experts"),
        (BERT, {"max_length": 65}, "positions up to 64, and the data's sequence_length is 65"),
        ({**BERT, "model_type": "roberta"}, {"max_length": 63}, "positions up to 62, and the data"),
        ({**BERT, "vocab_size": 100}, {"vocab_size": 256}, "the data has 256 token ids, and the model 100"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(source, options, message):
    with pytest.raises(UserError, match=message):
        task_of(source, **options)


def test_a_head_for_other_labels_is_refused_or_initialized(tmp_path):
    config = transformers.AutoConfig.for_model("bert", **SIZES, vocab_size=256, num_labels=3)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"set model.options to \{ignore_mismatched_sizes: true\}"):
        task_of(str(tmp_path), num_classes=5)
    task = task_of(str(tmp_path), num_classes=5, options={"ignore_mismatched_sizes": True})
    assert task(batch_of([3, 2]))[0].shape == (2, 5)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "vocab_size": 300}))
    with pytest.raises(UserError, match=r"lacks 1 of the .* such as bert.embeddings.word_embeddings.weight"):
        task_of(str(tmp_path), num_classes=5, options={"ignore_mismatched_sizes": True})


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_the_head_may_be_new_and_nothing_else(pooling, tmp_path):
    config = transformers.BertConfig(**{k: v for k, v in BERT.items() if k != "model_type"})
    transformers.BertModel(config).save_pretrained(tmp_path)
    task_of(str(tmp_path), num_classes=2, pooling=pooling)
    path = tmp_path / "model.safetensors"
    weights = {k: v for k, v in safetensors.load_file(path).items() if "word_embeddings" not in k}
    safetensors.save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of the .* such as (bert\.)?embeddings.word_embeddings"):
        task_of(str(tmp_path), num_classes=2, pooling=pooling)


def test_too_short_a_sequence_is_refused(moods, tmp_path):
    with pytest.raises(UserError, match=r"sequence_length is 2, and the tokenizer .* with 2 tokens: raise it"):
        LabelledText(moods, tokenizer=words(tmp_path), sequence_length=2)


def test_data_of_another_vocabulary_is_refused(moods):
    with pytest.raises(UserError, match="the tokenizer bytes has 256 token ids, and the model only 100"):
        Trainer(**QUIET, max_steps=1).fit(task_of({**BERT, "vocab_size": 100}), LabelledText(moods, sequence_length=32))


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        UserError, match=r"PretrainedTextClassification needs transformers: pip install 'routerzoo\[hf\]'"
    ):
        task_of()


@torch.no_grad()
def test_a_mean_of_hidden_states_is_that_of_the_text():
    task = task_of(pooling="mean", num_classes=3).eval()
    batch = batch_of([4, 2])
    means_BD = [
        task.net.model(input_ids=ids[:n][None]).last_hidden_state.mean(1)
        for ids, n in zip(batch.ids_BS, (4, 2), strict=True)
    ]
    assert_close(task(batch)[0], task.classifier(torch.cat(means_BD)))
    assert not any(parameter.requires_grad for parameter in task.net.model.pooler.parameters())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["roberta", "mpnet"])
def test_models_whose_positions_follow_padding_have_its_id(kind):
    source = {"model_type": kind, **{k: v for k, v in BERT.items() if k not in ("model_type", "vocab_size")}}
    task = task_of(source, max_length=16, vocab_size=256).eval()
    short_BS, padded_BS = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 6, 7, 0, 0]])
    logits = [
        task(LabelledBatch(ids_BS, padding_mask_BS=ids_BS == 0, labels_B=torch.tensor([0])))[0]
        for ids_BS in (short_BS, padded_BS)
    ]
    assert_close(*logits)


def test_it_goes_out_with_its_head(moods, tmp_path):
    task = task_of(num_classes=3).eval()
    task.net.model.save_pretrained(tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    batch = batch_of([4, 2])
    inputs = {"input_ids": batch.ids_BS, "attention_mask": (~batch.padding_mask_BS).long()}
    assert_close(model(**inputs).logits, task(batch)[0])


@pytest.mark.full
def test_the_config_trains_resumes_tests_predicts_and_is_audited(moods, tmp_path):
    def run(command, folder, *options):
        cli.main([command, "--run_dir", str(tmp_path / folder), "--trainer.enable_progress_bar", "false", *options])

    short = ["--trainer.val_check_interval", "2", "--trainer.limit_val_batches", "2", "--model.lr_scheduler", "null"]
    named = ["--config", CONFIG, "--data.dataset", moods, *short]
    run("fit", "straight", *named, "--trainer.max_steps", "4")
    run("fit", "resumed", *named, "--trainer.max_steps", "2")
    run("fit", "resumed", "--ckpt_path", "last", "--trainer.max_steps", "4")
    straight, resumed = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
        for name in ("straight", "resumed")
    )
    assert_close(resumed, straight, rtol=0, atol=0)  # BERT has dropout
    fit = json.loads((tmp_path / "straight" / "results.json").read_text())["fit"]
    assert fit["training FLOPs"] > 0
    run("test", "straight", "--ckpt_path", "last")
    run("predict", "straight", "--ckpt_path", "last")
    task = PretrainedTextClassification.load_from_checkpoint(tmp_path / "straight" / "checkpoints" / "last.ckpt")
    assert task.num_classes == 2
    rows = list(csv.reader((tmp_path / "straight" / "predictions.csv").read_text().splitlines()))
    assert rows[0] == ["text", "label", "predicted", "bad", "good"]
    with contextlib.suppress(SystemExit):  # it need not be healthy
        audit.main([str(tmp_path / "straight"), "--best", "1"])
    found = json.loads((tmp_path / "straight" / "audit.json").read_text())
    assert len(found["layers"]) == 2
