"""Small models of transformers, with weights under which every part counts."""

import torch
import transformers

from tests import conftest

TOKENS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {
    **TOKENS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
GQA = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
GPT2 = {**TOKENS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
IMAGES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 3,
}
DENSE = {
    "Llama": ("LlamaForCausalLM", GQA),
    "Mistral": ("MistralForCausalLM", GQA),
    "Qwen2": ("Qwen2ForCausalLM", {**TEXT, "num_key_value_heads": 2}),
    "Qwen3": ("Qwen3ForCausalLM", GQA),
    "Gemma": ("GemmaForCausalLM", GQA),
    "Gemma 2": ("Gemma2ForCausalLM", {**GQA, "query_pre_attn_scalar": 8}),
    "Gemma 3": ("Gemma3ForCausalLM", {**GQA, "query_pre_attn_scalar": 8}),
    "Phi": ("PhiForCausalLM", TEXT),
    "GPT-2": ("GPT2LMHeadModel", GPT2),
    "OPT": ("OPTForCausalLM", {**TEXT, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", TEXT),
    "OLMo 2": ("Olmo2ForCausalLM", GQA),
    "BERT": ("BertForMaskedLM", TEXT),
    "ViT": ("ViTForImageClassification", IMAGES),
}
"""Class and config of dense models, by name."""
DECODERS = [name for name in DENSE if name not in ("BERT", "ViT")]
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
DEEPSEEK = {
    **TEXT,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 0,
    "routed_scaling_factor": 2.5,
    "n_shared_experts": 1,
}
RELEASED = {
    "Mixtral": ("MixtralForCausalLM", {**GQA, **LOCAL}),
    "OLMoE": ("OlmoeForCausalLM", {**TEXT, **EXPERTS, "num_key_value_heads": 2}),
    "FlexOlmo": ("FlexOlmoForCausalLM", {**TEXT, **EXPERTS, "num_key_value_heads": 2}),
    "Qwen2-MoE": (
        "Qwen2MoeForCausalLM",
        {**TEXT, **EXPERTS, "num_key_value_heads": 2, "shared_expert_intermediate_size": 20},
    ),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", {**GQA, **EXPERTS, "norm_topk_prob": True}),
    "Qwen3-Next": (
        "Qwen3NextForCausalLM",
        {
            **GQA,
            **EXPERTS,
            "shared_expert_intermediate_size": 20,
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "gpt-oss": ("GptOssForCausalLM", {**GQA, **LOCAL, "layer_types": ["full_attention"] * 2}),
    "Granite-MoE": ("GraniteMoeForCausalLM", {**TEXT, **LOCAL, "num_key_value_heads": 2}),
    "Phi-3.5-MoE": ("PhimoeForCausalLM", {**TEXT, **LOCAL, "num_key_value_heads": 2, "router_jitter_noise": 0.3}),
    "DeepSeek-V3": (
        "DeepseekV3ForCausalLM",
        {
            **DEEPSEEK,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "GLM-4.5": ("Glm4MoeForCausalLM", {**DEEPSEEK, "head_dim": 8}),
    "dots.llm1": ("Dots1ForCausalLM", {**DEEPSEEK, "head_dim": 8}),
    "Jamba": (
        "JambaForCausalLM",
        {
            **TEXT,
            "num_key_value_heads": 2,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "expert_layer_period": 1,
            "expert_layer_offset": 0,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "Ernie 4.5": (
        "Ernie4_5_MoeForCausalLM",
        {
            **TEXT,
            "num_key_value_heads": 2,
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_intermediate_size": 12,
            "moe_layer_start_index": 0,
            "moe_num_shared_experts": 1,
            "use_bias": False,
        },
    ),
    "HunYuan-MoE": (
        "HunYuanMoEV1ForCausalLM",
        {**GQA, "num_experts": 8, "moe_topk": 2, "num_shared_expert": 1, "use_mixed_mlp_moe": True},
    ),
    "Llama 4": (
        "Llama4ForCausalLM",
        {**GQA, **LOCAL, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1},
    ),
    "Gemma 4": (
        "Gemma4ForCausalLM",
        {
            **GQA,
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 12,
            "enable_moe_block": True,
            "layer_types": ["sliding_attention", "full_attention"],
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 40,
        },
    ),
    "DeepSeek-V4": (
        "DeepseekV4ForCausalLM",
        {**TEXT, **LOCAL, "moe_intermediate_size": 12, "mlp_layer_types": ["hash_moe", "moe"], "head_dim": 8},
    ),
}
"""Class and config of released Mixtures of Experts, by name."""


def config_of(name):
    class_name, sizes = {**DENSE, **RELEASED}[name]
    model_class = getattr(transformers, class_name)
    return model_class, model_class.config_class(**sizes)


def build(name, seed=0):
    """Return a model in evaluation, whose weights differ from those of an initialized one."""
    model_class, config = config_of(name)
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("e_score_correction_bias"):
                parameter.copy_(0.1 * torch.randn_like(parameter))
                continue
            drawn = torch.randn_like(parameter)
            inner = parameter.shape[-1] if "down_proj" not in key else parameter.shape[-1] * 2
            parameter.copy_(1 + 0.3 * drawn if parameter.ndim == 1 else drawn * inner**-0.5)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn_like(buffer))
            if key.endswith("tid2eid"):
                buffer.copy_(torch.rand(len(buffer), 8).argsort(-1)[:, : buffer.shape[1]])
    return model


def inputs_of(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    return {"input_ids": torch.randint(3, 40, (2, 10), generator=generator)}


QUIET = {**conftest.QUIET, "enable_checkpointing": False}
"""Arguments of a Trainer that prints and writes nothing."""
