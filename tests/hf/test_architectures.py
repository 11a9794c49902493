"""Every architecture in, generated from, saved, adapted and out: the columns of the table in docs/hf.md."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from routerzoo import HyperRouter, auxiliary_loss, moe_layers
from tests.hf.models import DENSE, RELEASED, build, config_of, inputs_of

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
hf = pytest.importorskip("routerzoo.hf")

QUICK = ("Llama", "Mixtral")
"""A dense model and a released one; the full tier has all."""
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.full) for name in (*DENSE, *RELEASED)]
NO_TEXT = ("BERT", "ViT")
AUTO = {"BERT": "AutoModelForMaskedLM", "ViT": "AutoModelForImageClassification"}
COUNTERPARTS = {
    "Llama": "MixtralForCausalLM",
    "Mistral": "MixtralForCausalLM",
    "Qwen3": "Qwen3MoeForCausalLM",
    "OLMo 2": "FlexOlmoForCausalLM",
}


def changed(name):
    """Return a model with routers of ours that computes what it did before."""
    return hf.replace_routers(build(name)) if name in RELEASED else hf.upcycle(build(name), num_experts=4)


def loaded(path, name):
    return getattr(transformers, AUTO.get(name, "AutoModelForCausalLM")).from_pretrained(path).eval()


def assert_same_weights(model, expected):
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    assert not [key for key in wanted if not torch.equal(state[key], wanted[key])]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_output_stays_and_routers_decide_it(name):
    model = build(name)
    inputs = inputs_of(model)
    expected = model(**inputs).logits
    model = hf.replace_routers(model) if name in RELEASED else hf.upcycle(model, num_experts=4)
    assert len(list(moe_layers(model))) == 2
    assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-5 * expected.std().item())
    assert len(model.routing.context.routings) == 2
    if name in RELEASED:  # experts differ there
        hf.replace_routers(model, "RandomFrozenRouter")
        assert (model(**inputs).logits - expected).abs().max() > 0.01 * expected.std()


@pytest.mark.parametrize("name", [n for n in NAMES if n.values[0] not in NO_TEXT])
def test_generation_with_a_cache_and_left_padding_is_that_without(name):
    model = changed(name)
    ids, mask = torch.randint(3, 40, (2, 6)), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    ids[1, :2] = 0

    def generate(ids, mask, **options):
        # The end's probability is 0, so that all are of one length.
        return model.generate(ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, **options)

    together = generate(ids, mask)
    assert torch.equal(generate(ids, mask, use_cache=False), together)
    assert torch.equal(generate(ids[1:, 2:], mask[1:, 2:])[0], together[1, 2:])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_saved_model_is_loaded_by_the_auto_classes(name, tmp_path):
    model = changed(name)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = loaded(tmp_path, name)
    assert type(again) is type(model)
    assert_same_weights(again, model)
    inputs = inputs_of(model)
    # Memory that is mapped from a file is aligned otherwise, which changes the order in which products are summed.
    assert_close(again(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**inputs).logits, model(**inputs).logits)


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_sixteen_bits_leave_routers_in_float32(name, tmp_path):
    changed(name).save_pretrained(tmp_path)
    auto = getattr(transformers, AUTO.get(name, "AutoModelForCausalLM"))
    model = auto.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu").eval()
    for layer in moe_layers(model):
        for _, tensor in (*layer.router.named_parameters(), *layer.router.named_buffers()):
            assert tensor.dtype in (torch.float32, torch.int64)
        assert {parameter.dtype for parameter in layer.experts.parameters()} == {torch.bfloat16}
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs_of(model).items()}
    assert model(**inputs).logits.isfinite().all()
    model.save_pretrained(tmp_path / "again")
    assert_same_weights(auto.from_pretrained(tmp_path / "again", dtype=torch.bfloat16), model)


@pytest.mark.full
@pytest.mark.parametrize("name", RELEASED)
def test_gates_go_out_in_the_precision_of_the_model(name, tmp_path):
    build(name).save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    exported = hf.to_transformers(hf.replace_routers(tmp_path, dtype=torch.bfloat16))
    assert_same_weights(exported, plain)
    assert {k: v.dtype for k, v in exported.state_dict().items()} == {k: v.dtype for k, v in plain.state_dict().items()}


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model = changed(name).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.use_cache = False
    inputs, gradients = inputs_of(model), []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        model.zero_grad()
        (model(**inputs)[0].square().mean() + auxiliary_loss(model, model.routing.context)).backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert all(f"{key}" in gradients[0] for key, _ in model.named_parameters() if ".moe." in key)
    assert gradients[0].keys() == gradients[1].keys()
    for key, value in gradients[0].items():
        assert_close(gradients[1][key], value)


def adapted(name, model):
    """Yield configs of PEFT: LoRA on experts, on the gate, and copies of routers."""
    layer = next(moe_layers(model))
    banks = [f"experts.{key}" for key, parameter in layer.experts.named_parameters() if parameter.ndim == 3]
    yield "experts", peft.LoraConfig(r=2, target_parameters=banks)
    if name != "DeepSeek-V4":  # PEFT adapts what a module's `forward` uses, and the hash layers' gate is inside another
        yield "gate", peft.LoraConfig(r=2, target_parameters=["router.weight"])
    owner = "moe.router" if name in RELEASED else "router"
    yield "router", peft.LoraConfig(r=2, target_parameters=banks, modules_to_save=[owner])


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
@pytest.mark.parametrize("name", NAMES)
def test_adapters_train_merge_and_load(name, tmp_path):
    for what, config in adapted(name, changed(name)):
        model = peft.get_peft_model(changed(name), config)
        inputs = inputs_of(model.base_model.model)
        trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
        optimizer = torch.optim.SGD(trained.values(), lr=0.1)
        model.train()
        for _ in range(2):  # LoRA's second factor is 0 at first
            optimizer.zero_grad()
            model(**inputs)[0].square().mean().backward()
            optimizer.step()
        assert trained
        assert not [key for key, p in trained.items() if p.grad is None or not p.grad.any()], what
        with torch.no_grad():
            expected = model.eval()(**inputs)[0]
            model.save_pretrained(tmp_path / what)
            again = peft.PeftModel.from_pretrained(changed(name), tmp_path / what).eval()
            assert_close(again(**inputs)[0], expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(model.merge_and_unload()(**inputs)[0], expected), what


@pytest.mark.parametrize("name", [n for n in NAMES if n.values[0] in (*RELEASED, *COUNTERPARTS)])
@torch.no_grad()
def test_a_model_goes_out_as_a_plain_one(name, tmp_path):
    plain, model = build(name), changed(name)
    inputs = inputs_of(plain)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path / "ours")
    exported = hf.to_transformers(loaded(tmp_path / "ours", name))
    if name in RELEASED:
        assert type(exported) is type(plain)
        assert_same_weights(exported, plain)
    else:
        assert type(exported).__name__ == COUNTERPARTS[name]
    exported.save_pretrained(tmp_path / "plain")
    again = loaded(tmp_path / "plain", name)
    assert type(again).__module__.startswith("transformers.")
    assert_same_weights(again, exported)
    assert_close(again(**inputs).logits, expected, rtol=0, atol=1e-5 * expected.std().item())


@pytest.mark.parametrize("name", [n for n in NAMES if n.values[0] in RELEASED])
@torch.no_grad()
def test_router_logits_are_those_of_the_model(name):
    model = build(name)
    inputs = inputs_of(model)
    options = {**inputs, "labels": inputs["input_ids"], "output_router_logits": True}
    expected, output = model(**options), hf.replace_routers(model)(**options)
    assert len(output.router_logits) == len(expected.router_logits)
    for ours, theirs in zip(output.router_logits, expected.router_logits, strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert_close(getattr(output, "aux_loss", None), getattr(expected, "aux_loss", None))


@pytest.mark.full
@pytest.mark.parametrize("name", RELEASED)
def test_a_router_of_ours_is_trained_alone(name):
    model = hf.replace_routers(build(name), partial(HyperRouter, hidden_dim=8)).train()
    assert [layer.router.top_k for layer in moe_layers(model)] == [config_top_k(name)] * 2
    hf.train_routers_only(model)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = inputs_of(model)["input_ids"]
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved
    assert all(".moe.router." in key for key in moved)


def config_top_k(name):
    sizes = config_of(name)[1]
    return next(getattr(sizes, n) for n in ("top_k_experts", "moe_topk", "num_experts_per_tok") if hasattr(sizes, n))
