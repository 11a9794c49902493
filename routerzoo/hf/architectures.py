"""The released Mixture-of-Experts models of transformers, as data: what their gates are in terms of our routers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple


class Of(NamedTuple):
    """An argument that is read from the gate, or from the model's config where the gate has none."""

    name: str


@dataclass(frozen=True)
class Architecture:
    """How one released model routes.

    A block of it calls `_, weights, indices = gate(hidden)` and then `experts(hidden, indices, weights)`, unless
    something else is said here.

    Args:
        models: whose gate it is.
        router: our router that computes the same.
        arguments: what that is built with.
        tensors: where the router's tensors are in the gate.
        renamed: our names of what the model calls otherwise, such as a score function.
        weights_on_input: experts get their input times the weight.
        transposed: experts' weights are stored `[num_experts, in, out]`, where the experts do not say so themselves.
        takes_scores: the block calls `scores, _ = gate(hidden)` and multiplies a copy of the hidden states for each
            expert with them.
        jitter: the gate's attribute that says by how much it scales hidden states at random in training, in place, so
            that the experts see them so too.
        reports: what `output_router_logits` collects of the gate.
    """

    models: str
    router: str = "TopKRouter"
    arguments: Mapping[str, Any] = field(default_factory=lambda: {"top_k": Of("top_k")})
    tensors: Mapping[str, str] = field(default_factory=lambda: {"weight": "weight"})
    renamed: Mapping[str, str] = field(default_factory=dict)
    weights_on_input: bool = False
    transposed: bool = False
    takes_scores: bool = False
    jitter: str = ""
    reports: Literal["logits", "probabilities", "nothing"] = "logits"


_BY_CONFIG = {"top_k": Of("top_k"), "renormalize": Of("norm_topk_prob")}
_BIASED = {"weight": "weight", "selection_bias": "e_score_correction_bias"}
_GROUPED = {
    **_BY_CONFIG,
    "score": "sigmoid",
    "scale": Of("routed_scaling_factor"),
    "num_groups": Of("num_group"),
    "top_groups": Of("topk_group"),
}
_V4 = {"top_k": Of("top_k"), "score": Of("scoring_func"), "scale": Of("routed_scaling_factor")}
_V4_SCORES = {"sqrtsoftplus": "sqrt_softplus"}

ARCHITECTURES: dict[str, Architecture] = {
    "MixtralTopKRouter": Architecture("Mixtral"),
    "OlmoeTopKRouter": Architecture("OLMoE", arguments=_BY_CONFIG),
    "FlexOlmoTopKRouter": Architecture("FlexOlmo", arguments=_BY_CONFIG),
    "Qwen2MoeTopKRouter": Architecture("Qwen2-MoE", arguments=_BY_CONFIG),
    "Qwen3MoeTopKRouter": Architecture("Qwen3-MoE", arguments=_BY_CONFIG),
    "Qwen3NextTopKRouter": Architecture("Qwen3-Next", arguments=_BY_CONFIG),
    "GraniteMoeTopKRouter": Architecture("Granite-MoE"),
    "JambaTopKRouter": Architecture("Jamba", arguments={"top_k": Of("top_k"), "renormalize": False}),
    "Ernie4_5_MoeTopKRouter": Architecture(
        "Ernie 4.5",
        tensors={"weight": "weight", "selection_bias": "moe_statics.e_score_correction_bias"},
    ),
    "HunYuanMoEV1Gate": Architecture("HunYuan-MoE", tensors={"weight": "wg.weight"}),
    "GptOssTopKRouter": Architecture(
        "gpt-oss",
        arguments={"top_k": Of("top_k"), "bias": True},
        tensors={"weight": "weight", "bias": "bias"},
    ),
    "DeepseekV3TopkRouter": Architecture("DeepSeek-V3", arguments=_GROUPED, tensors=_BIASED),
    "Glm4MoeTopkRouter": Architecture("GLM-4.5", arguments=_GROUPED, tensors=_BIASED),
    "Dots1TopkRouter": Architecture("dots.llm1", arguments=_GROUPED, tensors=_BIASED),
    "DeepseekV4TopKRouter": Architecture("DeepSeek-V4", arguments=_V4, tensors=_BIASED, renamed=_V4_SCORES),
    "DeepseekV4HashRouter": Architecture(
        "DeepSeek-V4, hash layers",
        router="HashFirstRouter",
        # Hash layers come first, and each layer is read alone: every one that has this gate is among them.
        arguments={**_V4, "hash_layers": Of("num_hidden_layers")},
        tensors={"router.weight": "weight", "table": "tid2eid"},
        renamed=_V4_SCORES,
        reports="nothing",
    ),
    # Selects by logits, as LinearRouter does: sigmoids that saturate would tie.
    "Llama4Router": Architecture(
        "Llama 4",
        router="LinearRouter",
        arguments={"top_k": Of("top_k"), "score": "sigmoid", "renormalize": False},
        weights_on_input=True,
        transposed=True,
        takes_scores=True,
    ),
    "Gemma4TextRouter": Architecture(
        "Gemma 4",
        router="Gemma4Router",
        arguments={"top_k": Of("top_k_experts"), "eps": Of("eps")},
        tensors={"weight": "proj.weight", "input_scale": "scale", "expert_scale": "per_expert_scale"},
        reports="probabilities",
    ),
    "PhimoeTopKRouter": Architecture(
        "Phi-3.5-MoE",
        router="SparseMixerRouter",
        arguments={"top_k": Of("top_k"), "threshold": Of("router_jitter_noise")},
        jitter="input_jitter_noise",
    ),
}
"""By the name of the gate's class."""
