"""What holds for any model of transformers: other routers, contexts, configs, refusals."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from routerzoo import HashRouter, HyperRouter, LayerSpec, LinearRouter, MLPExperts, MoE, SwiGLUExperts, moe_layers
from routerzoo.moe.dispatch import apply_experts
from routerzoo.moe.quantization import modules_to_skip, quantize_experts
from routerzoo.optim import parameter_groups
from tests.hf.models import build, config_of, inputs_of

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("routerzoo.hf")


def loaded(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path).eval()


def windowed(name):
    model_class, config = config_of(name)
    config.layer_types = ["full_attention", "sliding_attention"]
    config.sliding_window = 4
    return model_class(config)


def in_eight_bits(model):
    quantize_experts(model)
    return model


def in_chunks(model):
    model.config.chunk_size_feed_forward = 1
    return model(**inputs_of(model))


def quantized(model):
    model.config.quantization_config = {"quant_method": "fp8"}
    return model


@pytest.mark.full
def test_importing_routerzoo_imports_no_transformers():
    code = "import routerzoo, sys; routerzoo.list_routers(); sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_layer_weights_inputs_and_gates_shared_experts():
    layer = MoE(
        LayerSpec(4, 3),
        partial(LinearRouter, top_k=2, score="sigmoid", renormalize=False),
        partial(SwiGLUExperts, hidden_dim=5),
        num_shared_experts=1,
        gate_shared_experts=True,
        weights_on_input=True,
    )
    x_TD, router_TD = torch.randn(6, 4), torch.randn(6, 4)
    logits_TE = router_TD @ layer.router.weight.T
    expected_TD = torch.sigmoid(x_TD @ layer.shared_gate.weight.T) * layer.shared_experts.one(0, x_TD)
    for token in range(6):
        for expert in logits_TE[token].topk(2).indices:
            weighted = x_TD[token] * logits_TE[token, expert].sigmoid()
            expected_TD[token] += layer.experts.one(int(expert), weighted.unsqueeze(0))[0]
    assert_close(layer(x_TD, router_input=router_TD), expected_TD)
    with pytest.raises(ValueError, match="gate_shared_experts needs num_shared_experts"):
        MoE(LayerSpec(4, 3), gate_shared_experts=True)
    with pytest.raises(ValueError, match="weights outputs, not inputs"):
        MoE(LayerSpec(4, 3), low_memory=True, weights_on_input=True)


def test_inputs_are_weighted_where_choices_are_dropped():
    layer = MoE(LayerSpec(4, 3), experts=partial(MLPExperts, hidden_dim=5, bias=False, activation="relu"))
    x_TD = torch.randn(5, 4)
    routing = layer.router(x_TD)
    experts_TK = routing.experts_TK.clone()
    experts_TK[::2, 1] = -1
    routing = replace(routing, experts_TK=experts_TK, may_drop=True)
    weighted = apply_experts(x_TD, routing, layer.experts, 3, weights_on_input=True)
    # Without biases, relu networks are homogeneous: a weight on the input is one on the output.
    assert_close(weighted, apply_experts(x_TD, routing, layer.experts, 3))


@pytest.mark.full
def test_inputs_are_jittered_in_training_as_the_gate_does():
    model_class, config = config_of("Phi-3.5-MoE")
    # One layer and one expert that is near enough, so that nothing else is drawn.
    config.num_hidden_layers, config.router_jitter_noise, config.input_jitter_noise = 1, 0.0, 0.2
    model = model_class(config).train()
    inputs, outputs = inputs_of(model), []
    for change in (lambda model: model, hf.replace_routers):
        model = change(model)
        torch.manual_seed(0)
        outputs.append(model(**inputs).logits)
    assert_close(outputs[1], outputs[0])
    assert not torch.allclose(outputs[1], model.eval()(**inputs).logits)


def test_a_hash_router_gets_the_token_ids_of_a_generation():
    model = hf.replace_routers(build("Mixtral"), partial(HashRouter, top_k=1, seed=0))
    ids = torch.randint(3, 40, (2, 5))
    seen = []
    for layer in moe_layers(model):
        layer.register_routing_hook(lambda published, context: seen.append((context.token_ids, published)))
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert [len(ids_T) for ids_T, _ in seen] == [10, 10, 2, 2, 2, 2]
    assert torch.equal(seen[2][0], out[:, 5])
    for ids_T, published in seen:
        table = published.layer.router.table
        assert torch.equal(published.routing.experts_TK[:, 0], table[ids_T, 0])


def test_padding_is_sent_to_no_expert_and_positions_begin_behind_it():
    model = hf.replace_routers(build("Mixtral"))
    ids, mask = torch.randint(3, 40, (2, 4)), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    model(input_ids=ids, attention_mask=mask)
    context = model.routing.context
    assert context.positions.tolist() == [0, 1, 2, 3, 0, 0, 0, 1]
    assert context.sequence_ids.tolist() == [0] * 4 + [1] * 4
    assert all(published.routing.expert_load(8).sum() == 6 * 2 for published in context.routings)


def test_a_router_that_looks_back_refuses_a_cache():
    pytest.importorskip("routerzoo_context")
    model = hf.replace_routers(build("Mixtral"), "SimilarityRouter")
    ids = torch.randint(3, 40, (1, 4))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 2, "do_sample": False}
    with pytest.raises(ValueError, match=r"SimilarityRouter looks at other tokens .* use_cache=False"):
        model.generate(ids, **options)
    assert model.generate(ids, use_cache=False, **options).shape == (1, 6)


def test_the_config_names_router_and_arguments(tmp_path):
    capacity = pytest.importorskip("routerzoo_policies").CapacityRouter
    model = hf.upcycle(
        build("Llama").config,
        num_experts=4,
        router=partial(capacity, router=partial(HyperRouter, top_k=1, hidden_dim=8)),
        blocks="every-other",
        num_shared_experts=1,
        copy_weights=False,
    )
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "routerzoo"
    assert config["routing"]["model_type"] == "llama"
    (change,) = config["routing"]["changes"]
    inner = {"name": "HyperRouter", "arguments": {"top_k": 1, "hidden_dim": 8}}
    assert change["router"] == {"name": "CapacityRouter", "arguments": {"router": inner}}
    (layer,) = moe_layers(loaded(tmp_path))
    assert (layer.router.router.top_k, layer.num_shared_experts) == (1, 1)


def test_the_config_that_was_given_stays_as_it_was():
    model = build("Llama")
    config = model.config
    twin, before = type(model)(config), config.to_dict()
    for source, num_experts in ((config, 4), (config, 8), (model, 2)):
        built = hf.upcycle(source, num_experts=num_experts)
        assert built.config.model_type == "routerzoo"
        assert all(module.config is built.config for module in built.modules() if hasattr(module, "config"))
    assert type(twin.config) is transformers.LlamaConfig
    assert config.to_dict() == before


def test_routers_are_replaced_again_and_saved(tmp_path):
    model = hf.upcycle(build("Llama"), num_experts=4, router=partial(LinearRouter, top_k=3))
    hf.replace_routers(model, "XMoERouter")
    assert {layer.router.top_k for layer in moe_layers(model)} == {3}
    hf.replace_routers(model, partial(HyperRouter, top_k=2))
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert {type(layer.router) for layer in moe_layers(again)} == {HyperRouter}
    assert_close(again(**inputs_of(model)).logits, model(**inputs_of(model)).logits, rtol=1e-5, atol=1e-5)


def test_a_released_model_keeps_its_experts_and_its_number_of_choices():
    model = build("Mixtral")
    bank = model.model.layers[0].mlp.experts
    weights = bank.gate_up_proj
    hf.replace_routers(model, "HyperRouter")
    layer = next(moe_layers(model))
    assert layer.experts.gate_up is weights
    assert layer.router.top_k == 2


@pytest.mark.full
def test_models_come_by_path_and_in_any_precision(tmp_path):
    for name in ("Llama", "Mixtral"):
        build(name).save_pretrained(tmp_path / name)
    options = {"dtype": torch.bfloat16, "device_map": "cpu"}
    dense = hf.upcycle(tmp_path / "Llama", num_experts=4, **options)
    released = hf.replace_routers(str(tmp_path / "Mixtral"), **options)
    for model in (dense, released):
        layer = next(moe_layers(model))
        assert layer.router.weight.dtype == torch.float32
        assert layer.experts.down.dtype == torch.bfloat16
        assert model(**inputs_of(model)).logits.isfinite().all()
    with pytest.raises(TypeError, match="dtype are for from_pretrained"):
        hf.replace_routers(build("Mixtral"), dtype=torch.bfloat16)


@pytest.mark.full
@pytest.mark.parametrize("name", ["Llama", "Mixtral"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"do_sample": True, "top_k": 5},
        {"cache_implementation": "static", "do_sample": False},
        {"prompt_lookup_num_tokens": 2, "do_sample": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_way_of_decoding_gives_the_tokens_of_the_plain_model(name, options):
    ids = torch.randint(3, 40, (1, 6))
    tokens = []
    for model in (build(name), hf.replace_routers(build(name)) if name == "Mixtral" else None):
        model = model if model is not None else hf.upcycle(build(name), num_experts=4)
        torch.manual_seed(0)
        tokens.append(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, **options))
    assert torch.equal(*tokens)


@pytest.mark.full
@pytest.mark.parametrize("activation", ["relu", "gelu_tanh"])
@torch.no_grad()
def test_experts_go_out_with_their_activation(activation, tmp_path):
    experts = partial(SwiGLUExperts, activation=activation, hidden_dim=20)
    model = hf.upcycle(build("Llama"), num_experts=4, experts=experts, copy_weights=False)
    expected = model(**inputs_of(model)).logits
    hf.to_transformers(model).save_pretrained(tmp_path)
    assert_close(loaded(tmp_path)(**inputs_of(model)).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")  # Trainer's
def test_transformers_trainer_saves_and_resumes(tmp_path):
    ids = torch.randint(3, 40, (24, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]

    def trainer(folder, steps):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=steps,
            per_device_train_batch_size=4,
            save_steps=2,
            use_cpu=True,
            report_to=[],
            lr_scheduler_type="constant",
            learning_rate=1e-2,
            disable_tqdm=True,
        )
        return transformers.Trainer(hf.replace_routers(build("Mixtral")), arguments, train_dataset=data)

    straight = trainer("straight", 4)
    straight.train()
    resumed = trainer("resumed", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    wanted, state = straight.model.state_dict(), resumed.model.state_dict()
    for key, value in state.items():
        assert_close(value, wanted[key], rtol=1e-5, atol=1e-6)
    assert not torch.equal(wanted["model.norm.weight"], build("Mixtral").model.norm.weight)
    again = loaded(tmp_path / "straight" / "checkpoint-4")
    assert type(again) is type(straight.model)


@pytest.mark.full
@pytest.mark.parametrize("shared", [0, 1])
@torch.no_grad()
def test_layers_that_lie_on_disk_are_fetched(shared, tmp_path):
    model = hf.upcycle(build("Llama"), num_experts=4, num_shared_experts=shared, copy_weights=False)
    model.save_pretrained(tmp_path)
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"]
    places = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}
    offloaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=places, offload_folder=tmp_path / "disk"
    ).eval()
    assert list(moe_layers(offloaded))[1].experts.down.is_meta
    with pytest.raises(ValueError, match=r"model.layers.1.* is offloaded, and cannot be changed"):
        hf.replace_routers(offloaded, "HyperRouter")
    inputs = inputs_of(model)
    assert_close(offloaded(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.full
def test_heads_on_a_changed_model_are_built_once(tmp_path):
    hf.upcycle(build("Llama"), num_experts=4).save_pretrained(tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    assert len(list(moe_layers(model))) == 2
    model(**inputs_of(model))
    assert len(model.routing.context.routings) == 2


@pytest.mark.full
def test_a_checkpoint_of_another_model_class_is_read(tmp_path):
    hf.replace_routers(build("Mixtral")).save_pretrained(tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(base).__name__ == "RoutedMixtralModel"
    wanted = loaded(tmp_path).model.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in base.state_dict().items())


def test_routers_have_options_of_their_own():
    model = hf.replace_routers(build("Mixtral"))
    routers = {layer.router.weight for layer in moe_layers(model)}
    groups = parameter_groups(model, routers={"lr": 1e-4})
    own = [group for group in groups if group.get("lr") == 1e-4]
    assert {p for group in own for p in group["params"]} == routers
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    hf.train_routers_only(model)
    assert {p for p in model.parameters() if p.requires_grad} == routers
    with pytest.warns(UserWarning, match="HyperRouter gives its one choice a weight that does not depend on it"):
        hf.train_routers_only(hf.replace_routers(model, partial(HyperRouter, top_k=1)))
    with pytest.raises(ValueError, match="has HashRouter, without parameters to train: replace_routers"):
        hf.train_routers_only(hf.replace_routers(model, "HashRouter"))
    model.requires_grad_(True)
    hf.freeze_experts(model)
    assert sum(not p.requires_grad for p in model.parameters()) == 4


@pytest.mark.parametrize(
    ("build_it", "message"),
    [
        (lambda: hf.replace_routers(build("Llama")), r"no gate of LlamaForCausalLM is known.*upcycle"),
        (lambda: hf.upcycle(build("Llama"), num_experts=4, router=lambda spec: LinearRouter(spec)), "no registered"),
        (lambda: hf.upcycle(build("Llama"), num_experts=4, router="Linear"), "unknown router"),
        (lambda: hf.upcycle("/no/model", num_experts=4), "there is no folder /no/model"),
        (lambda: hf.upcycle(torch.nn.Linear(2, 2), num_experts=4), "the source is Linear, not a model"),
        (lambda: hf.upcycle(build("ViT").config, num_experts=4), "builds nothing of a ViTConfig: pass another auto_cl"),
        (
            lambda: hf.upcycle(build("Mixtral"), num_experts=4),
            r"a Mixture of Experts, with .*\.experts: replace_routers",
        ),
        (
            lambda: hf.upcycle(build("ViT"), num_experts=4, router="HashRouter"),
            "HashRouter requires token_ids.*: context fields of a ViTForImageClassification are none",
        ),
        (
            lambda: hf.replace_routers(quantized(build("Mixtral"))),
            "MixtralForCausalLM is quantized, and cannot be chan",
        ),
        (
            lambda: hf.replace_routers(build("Mixtral"), "HashRouter").resize_token_embeddings(44),
            "HashRouter looks up 40 token ids, not 44: resize the embeddings before",
        ),
        (lambda: hf.to_transformers(torch.nn.Linear(2, 2)), "takes what upcycle or replace_routers returned, got Lin"),
        (lambda: hf.replace_routers(build("Mixtral"), partial(LinearRouter, top_k=9)), "between 1 and num_experts = 8"),
        (lambda: hf.replace_routers(build("Mixtral"), partial(LinearRouter, k=2)), "no argument 'k'"),
        (lambda: hf.replace_routers(hf.replace_routers(build("Mixtral"))), "has our routers already"),
        (lambda: hf.to_transformers(build("Mixtral")), "a plain model of transformers"),
        (lambda: hf.to_transformers(hf.replace_routers(build("Mixtral"), "HyperRouter")), "no class for that"),
        (lambda: hf.to_transformers(hf.replace_routers(build("Mixtral"), "TopKRouter")), None),
        (lambda: in_eight_bits(hf.upcycle(build("Llama"), num_experts=4)).save_pretrained("x"), "are computed from ot"),
        (lambda: hf.to_transformers(in_eight_bits(hf.replace_routers(build("Mixtral")))), "are computed from others"),
        (
            lambda: in_chunks(hf.upcycle(build("Llama"), num_experts=4)),
            "set chunk_size_feed_forward of the config to 0",
        ),
        (lambda: hf.to_transformers(hf.upcycle(build("Phi"), num_experts=4)), "no Mixture of Experts of transformers"),
        (
            lambda: hf.to_transformers(hf.upcycle(build("Llama"), num_experts=4, blocks=[0])),
            r"all layers of MixtralForCausalLM have experts, the model's \[1\] have none",
        ),
        (
            lambda: hf.to_transformers(hf.upcycle(build("Llama"), num_experts=4, router="HyperRouter")),
            "transformers knows the linear gate",
        ),
        (
            lambda: hf.to_transformers(
                hf.upcycle(build("Llama"), num_experts=4, experts=partial(SwiGLUExperts, bias=True), copy_weights=False)
            ),
            "others than SwiGLUExperts without bias",
        ),
        (
            lambda: hf.to_transformers(
                hf.upcycle(
                    build("Qwen3"),
                    num_experts=4,
                    experts=partial(SwiGLUExperts, activation="gelu"),
                    copy_weights=False,
                    blocks=[0],
                )
            ),
            "the activation gelu, its dense layers silu: Qwen3MoeForCausalLM has one for both",
        ),
        (lambda: hf.to_transformers(hf.upcycle(windowed("Qwen3"), num_experts=4)), "has one kind of attention, the mo"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(build_it, message):
    if message is None:
        build_it()
        return
    with pytest.raises((ValueError, KeyError, TypeError), match=message):
        build_it()


@pytest.mark.parametrize("name", ["Llama", "Mixtral"])
def test_parallel_plans_name_no_layer_of_ours(name):
    model = build(name)
    before = dict(model.tp_plan)
    model = hf.replace_routers(model) if name == "Mixtral" else hf.upcycle(model, num_experts=4)
    assert "model.layers.*.self_attn.q_proj" in model.tp_plan
    assert not [key for plan in (model.tp_plan, model.ep_plan) for key in plan if ".mlp" in key]
    if name == "Mixtral":
        assert hf.to_transformers(model).tp_plan == before


def test_a_gate_of_other_sizes_is_refused():
    model = build("Mixtral")
    model.model.layers[1].mlp.gate.num_experts = 7
    with pytest.raises(ValueError, match=r"the gate of model.layers.1.mlp names 7 experts, its bank has 8"):
        hf.replace_routers(model)
    assert not list(moe_layers(model))


CHANGE = {"change": "sparsify", "num_experts": 4, "router": {"name": "LinearRouter"}}


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        (None, "names no model type that transformers knows, but None"),
        ({"model_type": "llama"}, "has no list of changes, but None"),
        ({"model_type": "llama", "changes": [{**CHANGE, "change": "prune"}]}, "none of sparsify, replace_routers"),
        (
            {"model_type": "llama", "changes": [{**CHANGE, "color": "red"}]},
            "sparsify in .* has no 'color', but num_exp",
        ),
        ({"model_type": "llama", "changes": [{"change": "sparsify", "num_experts": 4}]}, "lacks router"),
        ({"model_type": "llama", "changes": [{**CHANGE, "router": "LinearRouter"}]}, "not a name and its arguments"),
    ],
)
def test_a_config_of_nothing_known_is_refused(routing, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "routerzoo", "routing": routing}))
    with pytest.raises(ValueError, match=message):
        transformers.AutoConfig.from_pretrained(tmp_path)


def test_a_truncated_shard_is_named(tmp_path):
    hf.upcycle(build("Llama"), num_experts=2).save_pretrained(tmp_path, max_shard_size="8KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    for read in (loaded, hf.replace_routers):
        with pytest.raises(ValueError, match=f"{shard.name} is damaged .*: copy or download it again"):
            read(tmp_path)


@torch.no_grad()
def test_a_quantizer_of_transformers_skips_routers_and_eight_bits_keep_their_choices():
    from transformers.quantizers.quantizers_utils import should_convert_module

    model = hf.upcycle(build("Llama"), num_experts=4, router=partial(HyperRouter, top_k=2)).eval()
    skipped = modules_to_skip(model)
    assert skipped == ["model.layers.0.mlp.router", "model.layers.1.mlp.router"]
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert not [name for name in names if ".router" in name and should_convert_module(name, skipped)]
    assert should_convert_module("model.layers.0.self_attn.q_proj", skipped)
    inputs = inputs_of(model)
    model(**inputs)
    before = [published.routing.experts_TK for published in model.routing.context.routings]
    quantize_experts(model)
    model(**inputs)
    after = [published.routing.experts_TK for published in model.routing.context.routings]
    assert all(map(torch.equal, before, after))


@torch.no_grad()
def test_a_window_that_no_layer_attends_to_is_left_behind():
    config = build("Qwen3").config
    config.layer_types, config.sliding_window, config.use_sliding_window = ["full_attention"] * 2, 4, True
    model = hf.upcycle(transformers.Qwen3ForCausalLM(config), num_experts=4).eval()
    ids_BS = torch.arange(3, 19)[None]
    expected_BSV = model(input_ids=ids_BS).logits
    plain = hf.to_transformers(model)
    assert plain.config.sliding_window is None
    assert_close(plain(input_ids=ids_BS).logits, expected_BSV, rtol=0, atol=1e-5)
