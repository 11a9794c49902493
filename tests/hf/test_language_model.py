"""`PretrainedLanguageModeling`, in Python and on the command line."""

import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from torch.testing import assert_close

from routerzoo import HashRouter, HyperRouter, LinearRouter, PretrainedLanguageModeling, TextData, moe_layers
from routerzoo.cli import main as cli
from routerzoo.errors import UserError
from tests.hf.models import GQA, LOCAL, QUIET, build

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
hf = pytest.importorskip("routerzoo.hf")

SIZES = {**{key: value for key, value in GQA.items() if "token" not in key}, "max_position_embeddings": 512}
LLAMA = {"model_type": "llama", **SIZES}
MIXTRAL = {"model_type": "mixtral", **SIZES, **LOCAL}
ENCODER = {"model_type": "bert", **{key: SIZES[key] for key in SIZES if key.startswith(("hidden", "num_h", "num_att"))}}
CONFIGS = [
    path
    for path in sorted((Path(__file__).parents[2] / "configs" / "pretrained").glob("*.yaml"))
    if path.stem != "classify"
]


def task_of(source, **options):
    return PretrainedLanguageModeling(source, **{"max_length": 16, "metric": "bpb", **options})


def fitted(task, steps=2):
    trainer = Trainer(**QUIET, max_steps=steps, limit_val_batches=1)
    trainer.fit(task, TextData(sequence_length=16, batch_size=2))
    return trainer


def trained_parts(task):
    routers, experts = (
        {p for layer in moe_layers(task) for p in getattr(layer, part).parameters()} for part in ("router", "experts")
    )
    return {
        "lora" if "lora" in name else "routers" if p in routers else "experts" if p in experts else "rest"
        for name, p in task.named_parameters()
        if p.requires_grad
    }


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"train": "all-but-experts"}, {"rest", "routers"}),
        ({"train": "routers", "router": HyperRouter}, {"routers"}),
        ({"lora": {"r": 2}}, {"lora"}),
        ({"lora": {"r": 2, "modules_to_save": ["moe.router"]}}, {"lora", "routers"}),
    ],
    ids=["all-but-experts", "routers", "lora", "lora-and-routers"],
)
def test_what_is_chosen_is_trained_and_nothing_else(options, parts):
    task = task_of({**MIXTRAL, "vocab_size": 256}, **options)
    assert trained_parts(task) == parts
    before = {name: parameter.clone() for name, parameter in task.named_parameters()}
    fitted(task)
    for name, parameter in task.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, before[name]), name
    assert any(not torch.equal(parameter, before[name]) for name, parameter in task.named_parameters())


def test_an_upcycled_model_starts_as_the_dense_one(tmp_path):
    dense = build("Llama")
    dense.save_pretrained(tmp_path)
    task = task_of(str(tmp_path), num_experts=4, router=partial(LinearRouter, top_k=2)).eval()
    ids_BS = torch.randint(3, 40, (2, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits_BSV, context = task.net(ids_BS, step=3, total_steps=7)
        expected_BSV = dense(input_ids=ids_BS).logits
    assert_close(logits_BSV, expected_BSV, rtol=0, atol=1e-5 * expected_BSV.std().item())
    assert (context.step, context.total_steps, len(context.routings)) == (3, 7, 2)
    costs = task.costs()
    # Two of four experts of 3 x 16 x 24 parameters idle, in two layers.
    assert costs.total - costs.active == 2 * 2 * 3 * 16 * 24


@torch.no_grad()
def test_documents_that_are_kept_apart_do_not_see_each_other():
    task = task_of({**MIXTRAL, "vocab_size": 256}).eval()
    ids_BS = torch.randint(256, (1, 9), generator=torch.Generator().manual_seed(0))
    sequences_BS = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2]])
    padding_BS = torch.tensor([[False] * 8 + [True]])
    options = {"sequence_ids_BS": sequences_BS, "padding_mask_BS": padding_BS}
    apart_BSV, context = task.net(ids_BS, attend_across=False, **options)
    assert context.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1]
    assert context.routings[0].routing.expert_load(8).sum() == 2 * 8
    assert_close(apart_BSV[:, 4:7], task.net(ids_BS[:, 4:7])[0], rtol=1e-4, atol=1e-5)
    joined_BSV, context = task.net(ids_BS, **options)
    assert context.sequence_ids.tolist() == sequences_BS[0].tolist()
    assert_close(joined_BSV[:, :8], task.net(ids_BS)[0][:, :8], rtol=1e-4, atol=1e-5)
    sliding = {**LLAMA, "model_type": "gemma2", "vocab_size": 256, "sliding_window": 4}
    with pytest.raises(UserError, match=r"Gemma2ForCausalLM cannot keep documents apart.*marked or joined"):
        task_of(sliding, num_experts=2, router=LinearRouter).net(ids_BS, attend_across=False, **options)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("/nowhere/model", {}, "there is no folder /nowhere/model"),
        ({"model_type": "lama"}, {}, "names no architecture of transformers; did you mean 'llama'"),
        ({"hidden_size": 8}, {}, "names no architecture of transformers, such as llama"),
        ({**LLAMA, "hiden_size": 8}, {}, "the config of llama has no 'hiden_size'; did you mean 'hidden_size'"),
        ({**LLAMA, "max_length": 8}, {}, "the config of llama has no 'max_length'"),
        ({**LLAMA, "hidden_size": 15}, {}, r"no causal language model has .*hidden size \(15\) is not a multiple"),
        ({**LLAMA, "hidden_size": "16"}, {}, "no causal language model has .*expected int, got str"),
        ({**LLAMA, "hidden_act": "sillu"}, {}, "no causal language model has .*transformers does not know 'sillu'"),
        (LLAMA, {}, "LlamaForCausalLM has no gate that is known.*set num_experts"),
        (LLAMA, {"num_experts": 4}, "is dense and has no router to keep"),
        (MIXTRAL, {"num_experts": 4}, "MixtralForCausalLM has experts already: leave num_experts out"),
        (MIXTRAL, {"num_shared_experts": 1}, "num_shared_experts is for dense models"),
        (MIXTRAL, {"lora": {"rank": 4}}, "lora: .*'rank'"),
        (MIXTRAL, {"lora": {"r": 4}, "train": "routers"}, "LoRA trains its adapters alone"),
        (MIXTRAL, {"router": partial(HashRouter, top_k=1), "train": "routers"}, "nothing would be trained"),
        (MIXTRAL, {"lora": {"bias": "some"}}, "lora: Requested bias: some, is not implemented"),
        (
            MIXTRAL,
            {"lora": {"target_modules": ["q_proj", "v_prj"]}},
            "'v_prj', as no part of the model with weights is called; did you mean 'v_pr",
        ),
        (
            MIXTRAL,
            {"lora": {"modules_to_save": ["gate"]}},
            "modules_to_save names 'gate', as no part of the model with weights is called",
        ),
        (
            MIXTRAL,
            {"lora": {"target_parameters": ["experts.down", "experts.up"]}},
            "target_parameters names 'experts.up'",
        ),
        (MIXTRAL, {"lora": {"target_modules": ("q_proj", "v_prj")}}, "target_modules names 'v_prj'"),
        (MIXTRAL, {"lora": {"modules_to_save": "lm_head"}}, r"modules_to_save is 'lm_head', not a list: \[lm_head\]"),
        (MIXTRAL, {"lora": {"rank_pattern": {"experts.up": 4}}}, "rank_pattern has 'experts.up', which matches no"),
        (
            MIXTRAL,
            {"lora": {"target_modules": "all-linear", "exclude_modules": ["lm_hed"]}},
            "exclude_modules names 'lm_hed'",
        ),
        (MIXTRAL, {"lora": {"layers_to_transform": [0]}}, "PEFT ignores layers_to_transform for target_parameters"),
        (MIXTRAL, {"train": "router"}, "train must be one of all, all-but-experts, .*got 'router'"),
        (MIXTRAL, {"options": {"dtype": "float7"}}, "has no attribute 'float7'"),
        ({**ENCODER, "vocab_size": 40}, {"num_experts": 2}, "BertLMHeadModel sees the tokens that it is to predict"),
        ({**MIXTRAL, "vocab_size": 100}, {"vocab_size": 256}, "the data has 256 token ids, and the model 100"),
        (MIXTRAL, {"max_length": 600}, "positions up to 512, and the data's sequence_length is 600"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(source, options, message):
    if isinstance(source, dict) and "vocab_size" not in source:
        source = {**source, "vocab_size": 256}
    with pytest.raises(UserError, match=message):
        task_of(source, **options)


def test_names_of_older_configs_are_read():
    older = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "torch_dtype": "bfloat16"}
    source = {**LLAMA, **older, "attn_implementation": "eager", "num_labels": 3, "vocab_size": 40}
    config = task_of(source, moe_blocks="none").net.base.config
    assert config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    assert (config._attn_implementation, config.num_labels) == ("eager", 3)


def test_a_model_of_another_vocabulary_is_refused(tmp_path):
    build("Mixtral").save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=f"the data has 20 token ids, and the model 40: set data.tokenizer to {tmp_path}"
    ):
        task_of(str(tmp_path), vocab_size=20)


@pytest.fixture
def folder(tmp_path):
    build("Mixtral").save_pretrained(tmp_path)
    return tmp_path


def of_weights(folder, change):
    path = folder / "model.safetensors"
    weights = safetensors.load_file(path)
    safetensors.save_file(change(weights), path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "Error no file named model.safetensors"),
        (lambda f: os.truncate(f / "model.safetensors", 2000), "deserializing header"),
        (lambda f: (f / "config.json").write_text("{"), "not a valid JSON file"),
        (
            lambda f: of_weights(f, lambda w: {k: v for k, v in w.items() if "q_proj" not in k}),
            r"lacks 2 of the weights of a MixtralForCausalLM, such as model.layers.0.self_attn.q_proj.weight",
        ),
        (lambda f: of_weights(f, lambda w: {f"x.{k}": v for k, v in w.items()}), "lacks [0-9]* of the weights"),
        (
            lambda f: of_weights(f, lambda w: {k: v[:8].clone() if "norm" in k else v for k, v in w.items()}),
            "have other sizes than its config says: they are another model's",
        ),
    ],
    ids=["no-weights", "truncated", "no-config", "some-missing", "other-names", "other-sizes"],
)
def test_a_folder_without_all_weights_is_refused(damage, message, folder):
    damage(folder)
    with pytest.raises(UserError, match=message):
        task_of(str(folder))


def test_a_file_is_no_source(folder):
    with pytest.raises(UserError, match=r"model.safetensors is a file: name the folder that it is in"):
        task_of(str(folder / "model.safetensors"))


def test_a_router_that_the_loss_does_not_reach_is_named():
    one = partial(LinearRouter, top_k=1, renormalize=True)
    with pytest.warns(UserWarning, match="LinearRouter gives its one choice a weight that does not depend on it"):
        task_of({**MIXTRAL, "vocab_size": 256}, router=one, train="routers")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 1.0}, "router_options: AdamW has no option 'learning_rate'"),
        ({"lr": -1.0}, r"router_options: AdamW refuses \{'lr': -1.0\}: Invalid learning rate"),
        ({"lr": "0.1"}, "router_options: AdamW refuses"),
    ],
)
def test_options_that_the_optimizer_would_not_take_are_refused(options, message):
    task = task_of({**MIXTRAL, "vocab_size": 256}, router_options=options, lr_scheduler=None)
    with pytest.raises(UserError, match=message):
        task.configure_optimizers()


@pytest.mark.parametrize("package", ["transformers", "peft"])
def test_what_is_not_installed_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs {package}: pip install 'routerzoo\[hf\]'"):
        task_of({**MIXTRAL, "vocab_size": 256}, lora={"r": 2})


@pytest.mark.full
def test_a_saved_model_of_ours_keeps_its_routers_or_gets_others(tmp_path):
    hf.upcycle(build("Llama"), num_experts=4, router=partial(HyperRouter, top_k=1)).save_pretrained(tmp_path)
    kept = task_of(str(tmp_path))
    assert {type(layer.router) for layer in moe_layers(kept)} == {HyperRouter}
    other = task_of(str(tmp_path), router=LinearRouter)
    assert {(type(layer.router), layer.router.top_k) for layer in moe_layers(other)} == {(LinearRouter, 1)}


@pytest.mark.full
def test_routers_have_a_learning_rate_of_their_own():
    task = task_of({**MIXTRAL, "vocab_size": 256}, router_options={"lr": 0.5}, lr_scheduler=None)
    trainer = fitted(task)
    groups = trainer.optimizers[0].param_groups
    own = {p for group in groups if group["lr"] == 0.5 for p in group["params"]}
    assert own == {layer.router.weight for layer in moe_layers(task)}


@pytest.mark.full
def test_checkpointed_activations_give_the_same_gradients():
    gradients = []
    for flag in (False, True):
        torch.manual_seed(0)
        task = task_of({**MIXTRAL, "vocab_size": 256}, activation_checkpointing=flag)
        ids_BS = torch.arange(32).view(2, 16)
        task.net(ids_BS)[0].square().mean().backward()
        gradients.append({name: p.grad for name, p in task.named_parameters()})
    assert_close(*gradients)


@pytest.mark.full
def test_a_checkpoint_is_a_task_again_and_goes_out_as_a_plain_model(tmp_path):
    task = task_of({**MIXTRAL, "vocab_size": 256})
    trainer = fitted(task)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = PretrainedLanguageModeling.load_from_checkpoint(tmp_path / "last.ckpt").eval()
    hf.to_transformers(again.net.model).save_pretrained(tmp_path / "plain")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(plain) is transformers.MixtralForCausalLM
    ids_BS = torch.arange(16).view(2, 8)
    with torch.no_grad():
        assert_close(plain(input_ids=ids_BS).logits, task.eval().net(ids_BS)[0], rtol=1e-5, atol=1e-5)


def run(command, folder, *options):
    cli.main([command, "--run_dir", str(folder), "--trainer.enable_progress_bar", "false", *options])


@pytest.mark.full
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_trains_resumes_and_reports(config, tmp_path):
    short = ["--trainer.val_check_interval", "2", "--trainer.limit_val_batches", "2"]
    named = ["--config", str(config), *short]
    named += ["--model.lr_scheduler", "null"]  # those of the tasks depend on where a run ends
    run("fit", tmp_path / "straight", *named, "--trainer.max_steps", "4")
    run("fit", tmp_path / "resumed", *named, "--trainer.max_steps", "2")
    run("fit", tmp_path / "resumed", "--ckpt_path", "last", "--trainer.max_steps", "4")
    straight, resumed = (
        json.loads((tmp_path / name / "results.json").read_text())["fit"] for name in ("straight", "resumed")
    )
    assert resumed["bpb"] == straight["bpb"]
    assert straight["training FLOPs"] > 0
    run("test", tmp_path / "straight", "--ckpt_path", "last", "--trainer.limit_test_batches", "1")
    run("predict", tmp_path / "straight", "--ckpt_path", "last", "--model.predict_tokens", "3")
    assert (tmp_path / "straight" / "predictions.jsonl").is_file()
    PretrainedLanguageModeling.load_from_checkpoint(tmp_path / "straight" / "checkpoints" / "last.ckpt")
