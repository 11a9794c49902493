"""Dense checkpoints of transformers loaded into models with MoE layers."""

import copy
import pickle

import pytest
import torch

from routerzoo import moe_layers, sparsify

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 32}


class SparseLlama(transformers.LlamaForCausalLM):
    """At the top level, so that it can be pickled."""

    def __init__(self, config):
        super().__init__(config)
        sparsify(self, num_experts=4, router="XMoERouter", blocks="all")


def config_of(architecture):
    build = getattr(transformers, f"{architecture}Config")
    return build(**SIZES, **TOKENS, num_key_value_heads=2, head_dim=8)


def logits(model):
    return model.eval()(torch.arange(10).unsqueeze(0)).logits


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Olmo2"])
def test_what_a_dense_checkpoint_lacks_is_initialized(architecture, tmp_path):
    dense_class = getattr(transformers, f"{architecture}ForCausalLM")

    class Sparse(dense_class):
        def __init__(self, config):
            super().__init__(config)
            sparsify(self, num_experts=4, router="HyperRouter", blocks="all", num_shared_experts=1)

    dense = dense_class(config_of(architecture))
    dense.save_pretrained(tmp_path)
    model = Sparse.from_pretrained(tmp_path)
    assert logits(model).isfinite().all()
    assert torch.equal(model.model.layers[1].self_attn.q_proj.weight, dense.model.layers[1].self_attn.q_proj.weight)
    for layer in moe_layers(model):
        for experts in (layer.experts, layer.shared_experts):
            bound = 16**-0.5  # of a torch.nn.Linear with 16 inputs
            assert 0.9 * bound < experts.gate_up.detach().abs().max() <= bound
        assert layer.router.top_k == int(layer.router.k) == 2


def test_loaded_weights_are_not_drawn_again(tmp_path):
    model = SparseLlama(config_of("Llama"))
    for layer in moe_layers(model):
        layer.router.top_k = 3
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="built with top_k = 1 and routes with the checkpoint's, 3"):
        again = SparseLlama.from_pretrained(tmp_path)
    assert [layer.router.top_k for layer in moe_layers(again)] == [3, 3]
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_sparsified_model_can_be_copied(copied):
    model = SparseLlama(config_of("Llama"))
    twin = copied(model)
    assert torch.equal(logits(twin), logits(model))
    assert twin._init_weights.model is twin
