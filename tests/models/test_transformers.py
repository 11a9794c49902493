"""Models of transformers with MoE layers: the substance of its common model tests."""

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

from routerzoo import MoE, auxiliary_loss, moe_layers, provide_context, sparsify

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.full

TOKENS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {
    **TOKENS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {**TOKENS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
OPT = {**TEXT, "ffn_dim": 24, "word_embed_proj_dim": 16}
PAIRED = {
    **TOKENS,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "decoder_start_token_id": 1,
}
T5 = {**TOKENS, "d_model": 16, "d_ff": 24, "num_layers": 2, "num_heads": 2, "d_kv": 8, "decoder_start_token_id": 0}
IMAGES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "mlp_ratio": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
# Class, config, the experts' activation, and where the MoE layer of the second block is.
ARCHITECTURES = {
    "Llama": ("LlamaForCausalLM", TEXT, "silu", "model.layers.1.mlp"),
    "Llama, relu": ("LlamaForCausalLM", {**TEXT, "hidden_act": "relu", "mlp_bias": True}, "relu", "model.layers.1.mlp"),
    "Qwen3": ("Qwen3ForCausalLM", {**TEXT, "head_dim": 8, "num_key_value_heads": 2}, "silu", "model.layers.1.mlp"),
    "Phi": ("PhiForCausalLM", TEXT, "gelu_tanh", "model.layers.1.mlp"),
    "Phi3": ("Phi3ForCausalLM", TEXT, "silu", "model.layers.1.mlp"),
    "GPTNeoX": ("GPTNeoXForCausalLM", TEXT, "gelu", "gpt_neox.layers.1.mlp"),
    "GPT2": ("GPT2LMHeadModel", GPT2, "gelu_tanh", "transformer.h.1.mlp.0"),
    "OPT": ("OPTForCausalLM", OPT, "relu", "model.decoder.layers.1.fc1"),
    "OPT-350m": (
        "OPTForCausalLM",
        {**OPT, "do_layer_norm_before": False, "activation_function": "gelu"},
        "gelu",
        "model.decoder.layers.1.fc1",
    ),
    "Bert": ("BertForMaskedLM", TEXT, "gelu", "bert.encoder.layer.1.intermediate.dense"),
    "Roberta": ("RobertaForMaskedLM", TEXT, "gelu", "roberta.encoder.layer.1.intermediate.dense"),
    "ModernBert": ("ModernBertForMaskedLM", TEXT, "gelu", "model.layers.1.mlp"),
    "Bart": ("BartModel", {**PAIRED, "activation_dropout": 0.1}, "gelu", "encoder.layers.1.fc1"),
    "T5": ("T5ForConditionalGeneration", T5, "relu", "encoder.block.1.layer.1.DenseReluDense"),
    "T5, gated": (
        "T5ForConditionalGeneration",
        {**T5, "feed_forward_proj": "gated-gelu"},
        "gelu_tanh",
        "encoder.block.1.layer.1.DenseReluDense",
    ),
    "CLIP": ("CLIPVisionModel", IMAGES, "quick_gelu", "encoder.layers.1.mlp"),
    "Siglip": ("SiglipVisionModel", IMAGES, "gelu_tanh", "encoder.layers.1.mlp"),
    "Dinov2": ("Dinov2Model", IMAGES, "gelu", "encoder.layer.1.mlp"),
    "Dinov2, gated": ("Dinov2Model", {**IMAGES, "use_swiglu_ffn": True}, "silu", "encoder.layer.1.mlp"),
    **{
        f"ViT, {act}": ("ViTModel", {**IMAGES, "hidden_act": act}, act, "layers.1.mlp")
        for act in ("gelu", "relu", "silu", "quick_gelu")
    },
}
COMMON = ["Llama", "Qwen3", "GPT2", "OPT", "Bert", "ViT, gelu"]
GENERATING = ["Llama", "Qwen3", "GPT2", "OPT"]


def class_and_config(name):
    class_name, sizes, _, _ = ARCHITECTURES[name]
    dense_class = getattr(transformers, class_name)
    known = dense_class.config_class().to_dict().keys() | {"max_position_embeddings"}
    return dense_class, dense_class.config_class(**{key: sizes[key] for key in sizes if key in known})


def build(name):
    dense_class, config = class_and_config(name)
    model = dense_class(config).eval()
    with torch.no_grad():  # so that what starts at zero, or at one, counts
        for parameter in model.parameters():
            drawn = torch.randn_like(parameter)
            parameter.copy_(1 + 0.3 * drawn if parameter.ndim == 1 else drawn * parameter.shape[-1] ** -0.5)
    return model


def inputs_of(model):
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 8, 8)}
    ids = torch.randint(3, 40, (2, 10))
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


def sparse_class(name):
    dense_class, config = class_and_config(name)

    class Sparse(dense_class):
        def __init__(self, config):
            super().__init__(config)
            sparsify(self, num_experts=4, blocks="all")

    return Sparse, config


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_upcycled_models_compute_what_they_did(name):
    model = build(name)
    inputs, activation, place = inputs_of(model), *ARCHITECTURES[name][2:]
    attention = {key for key in model.state_dict() if "att" in key}
    expected = model(**inputs)[0]
    sparsify(model, num_experts=4, blocks="all", upcycle=True)
    assert isinstance(model.get_submodule(place), MoE)
    assert {layer.experts.activation for layer in moe_layers(model)} == {activation}
    assert attention <= model.state_dict().keys()
    assert_close(model(**inputs)[0], expected, rtol=1e-5, atol=1e-5 * expected.std().item())


@pytest.mark.parametrize("name", COMMON)
def test_every_parameter_has_a_gradient(name):
    model = sparsify(build(name), num_experts=4, blocks="all", upcycle=True).train()
    with provide_context(model) as context:
        loss = model(**inputs_of(model))[0].square().mean() + auxiliary_loss(model, context)
        loss.backward()
    unused = {"pooler"} if "ViT" in name else set()
    lacking = [key for key, p in model.named_parameters() if p.grad is None and not unused & set(key.split("."))]
    assert not lacking


@pytest.mark.parametrize("name", COMMON)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model = sparsify(build(name), num_experts=4, blocks="all", upcycle=True).train()
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
        model(**inputs)[0].square().mean().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, value in gradients[0].items():
        assert_close(gradients[1][key], value)


@pytest.mark.parametrize("name", COMMON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_loaded_as_it_was(name, dtype, tmp_path):
    sparse, config = sparse_class(name)
    sparse(config).save_pretrained(tmp_path / "first")
    model = sparse.from_pretrained(tmp_path / "first", dtype=dtype).eval()
    model.save_pretrained(tmp_path)
    again, info = sparse.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    inputs = inputs_of(model)
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    assert torch.equal(again.eval()(**inputs)[0], model(**inputs)[0])


@pytest.mark.parametrize("name", COMMON)
def test_what_a_dense_checkpoint_lacks_is_initialized(name, tmp_path):
    build(name).save_pretrained(tmp_path)
    model = sparse_class(name)[0].from_pretrained(tmp_path).eval()
    assert model(**inputs_of(model))[0].isfinite().all()
    for layer in moe_layers(model):
        assert all(parameter.abs().max() < 10 for parameter in layer.parameters())


@pytest.mark.parametrize("name", GENERATING)
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "use_cache": False},
        {"do_sample": True, "top_k": 5},
        {"num_beams": 3},
        {"cache_implementation": "static", "do_sample": False},
    ],
    ids=lambda options: ", ".join(options),
)
def test_generation_gives_the_tokens_of_the_dense_model(name, options):
    model, ids = build(name), torch.randint(3, 40, (2, 6))

    def generate():
        torch.manual_seed(0)
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **options)

    expected = generate()
    sparsify(model, num_experts=4, blocks="all", upcycle=True)
    assert torch.equal(generate(), expected)


@pytest.mark.parametrize("name", GENERATING)
def test_a_padded_row_is_what_it_is_alone(name):
    model = sparsify(build(name), num_experts=4, blocks="all")
    ids = torch.randint(3, 40, (2, 6))
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    together = model(ids, attention_mask=mask, position_ids=positions).logits[1, 2:]
    alone = model(ids[1:, 2:], attention_mask=mask[1:, 2:]).logits[0]
    assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", COMMON)
def test_models_are_copied_resized_and_built_on_the_meta_device(name):
    dense_class, config = class_and_config(name)
    with torch.device("meta"):
        sparsify(dense_class(config), num_experts=4, blocks="all", upcycle=True)
    model = sparsify(build(name), num_experts=4, blocks="all")
    inputs = inputs_of(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**inputs)[0], model(**inputs)[0])
    if name in GENERATING:
        model.resize_token_embeddings(50)
        assert model(**inputs).logits.shape[-1] == 50
