"""The gates of published models as arguments of `TopKRouter`, with the coefficients of their losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from routerzoo_topk.gate import TopKRouter


@dataclass(frozen=True)
class Preset:
    """How a published model routes.

    Args:
        source: where it was published.
        router: arguments of `TopKRouter`.
        loss_weights: coefficients of the auxiliary losses; a task takes them as `loss_weights`.
        num_experts: experts of a layer in the published model.
    """

    source: str
    router: Mapping[str, Any]
    num_experts: int
    loss_weights: Mapping[str, float] = field(default_factory=dict)

    def build(self) -> partial[TopKRouter]:
        """Return a function that builds the router from a `LayerSpec`, as `MoE` and models take it."""
        return partial(TopKRouter, **self.router)


PRESETS: Mapping[str, Preset] = {
    "switch": Preset(
        "Fedus et al., JMLR 2022, arXiv:2101.03961",
        {"top_k": 1, "renormalize": False, "input_jitter": 0.01},
        num_experts=128,
        loss_weights={"balance": 0.01},
    ),
    # The published layer also has a capacity, and balances first choices alone.
    "gshard": Preset(
        "Lepikhin et al., ICLR 2021, arXiv:2006.16668",
        {"top_k": 2, "renormalize": True, "sample_choices": True},
        num_experts=2048,
        loss_weights={"balance": 0.01},
    ),
    "v-moe": Preset(
        "Riquelme et al., NeurIPS 2021, arXiv:2106.05974",
        {"top_k": 2, "renormalize": False, "noise": True},
        num_experts=32,
        loss_weights={"importance": 0.005, "load": 0.005},
    ),
    # transformers' loss is k at balance, ours 1: its coefficient of 1e-3 is 2e-3 here.
    "mixtral": Preset(
        "Jiang et al. 2024, arXiv:2401.04088; coefficient from transformers",
        {"top_k": 2, "renormalize": True},
        num_experts=8,
        loss_weights={"balance": 0.002},
    ),
    "olmoe": Preset(
        "Muennighoff et al., ICLR 2025, arXiv:2409.02060",
        {"top_k": 8, "renormalize": False},
        num_experts=64,
        loss_weights={"balance": 0.01, "z": 0.001},
    ),
    # Balanced over the global batch; the coefficient is transformers' (1e-3 of a loss that is k at balance).
    "qwen3": Preset(
        "Yang et al. 2025, arXiv:2505.09388; coefficient from transformers",
        {"top_k": 8, "renormalize": True},
        num_experts=128,
        loss_weights={"balance": 0.008},
    ),
    # How it was balanced in training is not published.
    "gpt-oss": Preset(
        "OpenAI 2025, arXiv:2508.10925",
        {"top_k": 4, "renormalize": True, "bias": True},
        num_experts=128,
    ),
    "deepseek-v3": Preset(
        "DeepSeek-AI 2024, arXiv:2412.19437",
        {
            "top_k": 8,
            "score": "sigmoid",
            "bias_speed": 0.001,
            "num_groups": 8,
            "top_groups": 4,
            "renormalize": True,
            "scale": 2.5,
        },
        num_experts=256,
        loss_weights={"sequence_balance": 0.0001},
    ),
}
"""By name. `configs/` has each as an overlay for the command line, with fewer experts where the model has many."""
