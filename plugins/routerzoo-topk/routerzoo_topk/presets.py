"""The gates of published models: a router, its arguments, and the coefficients of its losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from routerzoo import LossWeight, Router
from routerzoo_topk.gshard import GShardRouter
from routerzoo_topk.switch import SwitchRouter
from routerzoo_topk.topk import TopKRouter
from routerzoo_topk.v_moe import VMoERouter


@dataclass(frozen=True)
class Preset:
    """How a published model routes.

    Args:
        source: where it was published.
        router: the router's class.
        arguments: what the class is built with.
        num_experts: experts of a layer in the published model.
        loss_weights: coefficients of the auxiliary losses, reduced over layers as the source does; a task takes them
            as `loss_weights`, `routerzoo.auxiliary_loss` as `weights`.
    """

    source: str
    router: type[Router]
    arguments: Mapping[str, Any]
    num_experts: int
    loss_weights: Mapping[str, float | LossWeight] = field(default_factory=dict)

    def build(self) -> partial[Router]:
        """Return a function that builds the router from a `LayerSpec`, as `MoE` and models take it."""
        return partial(self.router, **self.arguments)


PRESETS: Mapping[str, Preset] = {
    "switch": Preset(
        "Fedus et al., JMLR 2022, arXiv:2101.03961",
        SwitchRouter,
        {"top_k": 1, "jitter": 0.01},
        num_experts=128,
        loss_weights=SwitchRouter.default_loss_weights,
    ),
    "gshard": Preset(
        "Lepikhin et al., ICLR 2021, arXiv:2006.16668",
        GShardRouter,
        {"top_k": 2},
        num_experts=2048,
        loss_weights=GShardRouter.default_loss_weights,
    ),
    "v-moe": Preset(
        "Riquelme et al., NeurIPS 2021, arXiv:2106.05974",
        VMoERouter,
        {"top_k": 2},
        num_experts=32,
        loss_weights=VMoERouter.default_loss_weights,
    ),
    # 0.001 in transformers, whose loss is k at balance where `balance` is 1, over the tokens of all layers.
    "mixtral": Preset(
        "Jiang et al. 2024, arXiv:2401.04088; coefficient from transformers",
        TopKRouter,
        {"top_k": 2, "renormalize": True},
        num_experts=8,
        loss_weights={"balance": LossWeight(0.002, "pooled")},
    ),
    # MegaBlocks averages its balance loss over layers, OLMo-core its z-loss too.
    "olmoe": Preset(
        "Muennighoff et al., ICLR 2025, arXiv:2409.02060",
        TopKRouter,
        {"top_k": 8, "renormalize": False},
        num_experts=64,
        loss_weights={"balance": LossWeight(0.01, "mean"), "z": LossWeight(0.001, "mean")},
    ),
    # The coefficient is transformers' 0.001, times k. The published model was balanced over the global batch.
    "qwen3": Preset(
        "Yang et al. 2025, arXiv:2505.09388; coefficient from transformers",
        TopKRouter,
        {"top_k": 8, "renormalize": True},
        num_experts=128,
        loss_weights={"balance": LossWeight(0.008, "pooled")},
    ),
    # How it was balanced in training is not published.
    "gpt-oss": Preset(
        "OpenAI 2025, arXiv:2508.10925",
        TopKRouter,
        {"top_k": 4, "renormalize": True, "bias": True},
        num_experts=128,
    ),
    "deepseek-v3": Preset(
        "DeepSeek-AI 2024, arXiv:2412.19437",
        TopKRouter,
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
