"""The numbers that papers and their authors' code publish, each read from a router that was built.

A number without a source is this library's choice; it is here too, since results depend on it.
"""
# Shape suffixes: T tokens, D model width, E experts, R routing dimension.

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch

import routerzoo
from routerzoo import LayerSpec, LossWeight, create_router
from routerzoo.functional.schedules import k_at
from routerzoo.routers.xmoe import MIN_TEMPERATURE

SPEC = LayerSpec(1024, 64, layer=0, num_layers=2, vocab_size=2048, num_positions=64, hidden_dim=64, num_tasks=2)
WIDE = LayerSpec(16384, 2)
SWITCH, ST_MOE = "Fedus et al. 2022, arXiv:2101.03961", "Zoph et al. 2022, arXiv:2202.08906"
SHAZEER, FASTMOE = "Shazeer et al. 2017, arXiv:1701.06538", "FastMoE, noisy_gate.py"
HYPER, HYPER_CODE = "Do et al. 2023, arXiv:2312.07035", "HyperRouter's code at 13a7d3c"
XMOE, TUTEL = "Chi et al. 2022, arXiv:2204.09179", "Tutel, cosine_top.py at 82af7aa"
STABLEMOE, STABLEMOE_CODE = "Dai et al. 2022, arXiv:2204.08396", "StableMoE's code at 73ea6ef"
RMOE_CODE = "RMoE's code at 3c513e8, rnn.py: init_weights"
VMOE_CODE = "V-MoE's code, sparsity_constrained_ot (Liu et al. 2023, arXiv:2209.15466)"
V4 = "transformers 5.24, configuration_deepseek_v4.py"
DROPOUT_CODE = "SMoE-Dropout (Chen et al. 2023), the code that HyperRouter shares"
OURS = "no source: this library's choice"


class Number(NamedTuple):
    """What is read of a router, what it must be, and who says so; `rel` is for what is drawn at random."""

    router: str
    read: Any
    value: Any
    source: str
    arguments: Mapping[str, Any] = MappingProxyType({})
    spec: LayerSpec = SPEC
    rel: float = 1e-6


def attribute(path):
    def read(router):
        for name in path.split("."):
            router = getattr(router, name)
        return router

    return read


def coefficient(name):
    return lambda router: router.default_loss_weights[name]


def losses(router):
    return sorted(router.default_loss_weights)


def std(name):
    return lambda router: float(getattr(router, name).detach().double().std())


def largest(name):
    return lambda router: float(getattr(router, name).detach().abs().max())


def kurtosis(name):
    """3 for a normal distribution, 1.8 for a uniform one."""

    def read(router):
        values = getattr(router, name).detach().double()
        return float((values - values.mean()).pow(4).mean() / values.var().square())

    return read


def gram(name):
    """Return the diagonal of the rows' (or columns') products, and the largest of the others."""

    def read(router):
        matrix = getattr(router, name).detach().double()
        products = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
        others = products - products.diagonal().diag()
        return [float(products.diagonal().mean()), round(float(others.abs().max()), 5)]

    return read


def noise_without_weights(router):
    return router.noise_std(torch.randn(2, SPEC.d_model)).detach().mean().item()


def switches_at(router):
    """Return the step of 60,000 at which stage 2 begins."""
    for step in range(0, 60_000, 1000):
        router.begin_step(step, 60_000)
        if router.stage == 2:
            return step
    return None


def weights_of(router):
    context = routerzoo.RoutingContext(token_ids=torch.arange(4))
    return router(torch.randn(4, SPEC.d_model), context).weights_TK.unique().tolist()


def bias_of_two_experts(router):
    """Return the selection bias after a step whose quantiles were 2 and 1."""
    router = type(router)(LayerSpec(2, 2), top_k=1)
    router.update({"beta_E": torch.tensor([2.0, 1.0]), "batches": torch.tensor(1.0)})
    return router.selection_bias.tolist()


def hash_layers(router):
    built = [type(router)(replace(router.spec, layer=layer, num_layers=6)) for layer in range(6)]
    return sum(each.table is not None for each in built)


NORMAL, UNIFORM = 3.0, 1.8
NUMBERS = [
    Number("LinearRouter", losses, ["balance", "z"], f"{SWITCH}; {ST_MOE}"),
    Number("LinearRouter", coefficient("balance"), 0.01, f"{SWITCH}, section 2.2: alpha = 1e-2"),
    Number("LinearRouter", coefficient("z"), 0.001, f"{ST_MOE}: c_z = 1e-3"),
    Number("LinearRouter", std("weight"), 0.02, "transformers, MixtralConfig.initializer_range", rel=0.03),
    Number("LinearRouter", kurtosis("weight"), NORMAL, "transformers, MixtralPreTrainedModel", rel=0.05),
    Number("LinearRouter", largest("bias"), 0.0, OURS, {"bias": True}),
    Number("LinearRouter", attribute("top_k"), 2, "Lepikhin et al. 2021, arXiv:2006.16668; Mixtral"),
    Number("LinearRouter", attribute("renormalize"), True, f"{SHAZEER}, equation 3"),
    Number("LinearRouter", attribute("renormalize"), False, f"{SWITCH}, equation 2", {"top_k": 1}),
    Number("LinearRouter", largest("noise_weight"), 0.0, f"{SHAZEER}, appendix A", {"noisy": True}),
    Number(
        "LinearRouter",
        noise_without_weights,
        math.log(2) + 0.01,
        f"{FASTMOE}: noise_epsilon",
        {"noisy": True},
        rel=1e-5,
    ),
    Number("HyperRouter", losses, [], HYPER),
    Number("HyperRouter", attribute("top_k"), 2, HYPER),
    Number("HyperRouter", lambda r: r.hypernet_w1.shape[0], 256, f"{HYPER_CODE}: --hyper_size never arrives"),
    Number("HyperRouter", std("embedding"), 1.0, HYPER_CODE, spec=WIDE, rel=0.03),
    Number("HyperRouter", kurtosis("embedding"), NORMAL, HYPER_CODE, spec=WIDE, rel=0.1),
    Number("HyperRouter", std("hypernet_w1"), 0.02, HYPER_CODE, rel=0.03),
    Number("HyperRouter", kurtosis("hypernet_w1"), NORMAL, HYPER_CODE, rel=0.05),
    Number("HyperRouter", std("hypernet_w2"), 0.02, HYPER_CODE, rel=0.03),
    Number("HyperRouter", kurtosis("hypernet_w2"), NORMAL, HYPER_CODE, rel=0.05),
    Number("HyperRouter", largest("hypernet_b1"), 0.0, HYPER_CODE),
    Number("HyperRouter", largest("hypernet_b2"), 0.0, HYPER_CODE),
    Number("RandomFrozenRouter", losses, [], DROPOUT_CODE),
    Number("RandomFrozenRouter", attribute("top_k"), 2, DROPOUT_CODE),
    Number("RandomFrozenRouter", std("weight"), 0.02, DROPOUT_CODE, rel=0.03),
    Number("RandomFrozenRouter", kurtosis("weight"), NORMAL, DROPOUT_CODE, rel=0.05),
    Number("RandomFrozenRouter", largest("bias"), 0.0, DROPOUT_CODE),
    Number("HashRouter", losses, [], "Roller et al. 2021, arXiv:2106.04426"),
    Number("HashRouter", attribute("top_k"), 1, "Roller et al. 2021, arXiv:2106.04426"),
    Number("HashRouter", weights_of, [1.0], "Roller et al. 2021, arXiv:2106.04426"),
    Number("HashRouter", weights_of, [0.25], OURS, {"top_k": 4}),
    Number("XMoERouter", losses, ["balance"], XMOE),
    Number("XMoERouter", coefficient("balance"), 0.01, f"{XMOE}; the authors' README"),
    Number("XMoERouter", attribute("top_k"), 1, XMOE),
    Number("XMoERouter", attribute("renormalize"), False, XMOE),
    Number("XMoERouter", attribute("balance_temperature"), 0.3, XMOE, {"score": "softmax"}),
    Number("XMoERouter", attribute("balance_temperature"), 0.07, XMOE, {"score": "sigmoid"}),
    Number("XMoERouter", attribute("temperature"), 0.3, OURS, {"score": "softmax"}),
    Number("XMoERouter", attribute("temperature"), 0.07, OURS, {"score": "sigmoid"}),
    Number("XMoERouter", lambda r: MIN_TEMPERATURE, 0.01, f"{TUTEL}: clamp_max"),
    Number("XMoERouter", lambda r: r.projection.shape[0], 32, f"{XMOE}: half the experts"),
    Number("XMoERouter", gram("expert_embedding"), [1.0, 0.0], "torchscale: orthogonal; a gain would cancel"),
    Number("XMoERouter", std("projection"), 1024**-0.5 / 3**0.5, "torch.nn.Linear, as in Tutel", rel=0.03),
    Number("XMoERouter", kurtosis("projection"), UNIFORM, "torch.nn.Linear, as in Tutel", rel=0.05),
    Number("XMoERouter", largest("projection"), 1024**-0.5, "torch.nn.Linear, as in Tutel", rel=0.03),
    Number("StableMoERouter", losses, ["balance", "distillation"], STABLEMOE),
    Number("StableMoERouter", coefficient("balance"), 0.3, STABLEMOE_CODE),
    Number("StableMoERouter", coefficient("distillation"), 0.3, STABLEMOE_CODE),
    Number("StableMoERouter", attribute("top_k"), 1, STABLEMOE),
    Number("StableMoERouter", attribute("score_fn"), "sigmoid", STABLEMOE),
    Number("StableMoERouter", attribute("stage1_fraction"), 0.1, STABLEMOE),
    Number("StableMoERouter", switches_at, 6000, f"{STABLEMOE}: 6,000 of 60,000 steps"),
    Number("StableMoERouter", attribute("evaluate"), "distilled", STABLEMOE_CODE),
    Number("StableMoERouter", gram("expert_centroids"), [0.01, 0.0], f"{STABLEMOE_CODE}: orthogonal, of gain 0.1"),
    Number("StableMoERouter", lambda r: r.routing_embedding.shape[1], 50, STABLEMOE),
    Number("StableMoERouter", std("routing_embedding"), 50**-0.5, OURS, rel=0.03),
    Number("StableMoERouter", kurtosis("routing_embedding"), NORMAL, OURS, rel=0.05),
    Number("StableMoERouter", std("distilled_centroids"), 50**-0.5, OURS, rel=0.04),
    Number("StableMoERouter", kurtosis("distilled_centroids"), NORMAL, OURS, rel=0.1),
]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: f"{number.router}-{number.value}")
def test_published_number(number):
    router = create_router(number.router, number.spec, **number.arguments)
    found = number.read(router)
    found = found.item() if isinstance(found, torch.Tensor) else found
    if isinstance(number.value, float):
        assert found == pytest.approx(number.value, rel=number.rel, abs=1e-9), number.source
    elif isinstance(number.value, list) and isinstance(number.value[0] if number.value else None, float):
        assert found == pytest.approx(number.value, rel=1e-4, abs=1e-4), number.source
    else:
        assert found == number.value, number.source


def test_the_floor_of_the_temperature_is_kept():
    router = create_router("XMoERouter", SPEC, temperature=0.01)
    torch.nn.init.constant_(router.temperature, 1e-4)
    assert router(torch.randn(5, SPEC.d_model)).logits_TE.abs().max() <= 100.0
    with pytest.raises(ValueError, match=r"temperature must be at least 0\.01"):
        create_router("XMoERouter", SPEC, temperature=0.009)


mean, pooled = (partial(LossWeight, over_layers=form) for form in ("mean", "pooled"))
COEFFICIENTS = {
    "AttentionRouter": {},
    "BaseLayerRouter": {},
    "BlockFFNRouter": {"locality": mean(0.001), "chunk": mean(0.05)},  # modeling_dragonfly.py divides by layers
    "CapacityRouter": {"balance": 0.01, "z": 0.001},  # those of the router inside
    "DAMoERouter": {"balance": 0.01},
    "DynMoLERouter": {"weighted_balance": pooled(0.001), "entropy": pooled(0.01)},  # moe_peft/adapters/dynmole
    "ExpertChoiceRouter": {},
    "ExpertThresholdRouter": {},
    "GShardRouter": {"balance": 0.01},  # as Switch
    "Gemma4Router": {},
    "HashFirstRouter": {},
    "HashRouter": {},
    "HyperRouter": {},
    "LinearRouter": {"balance": 0.01, "z": 0.001},
    "OmniRouter": {"balance": 0.01},
    "QuantileBalancingRouter": {},
    "RLRouter": {"policy": 0.01, "value": 0.01, "entropy": 0.001, "balance": 0.01},
    "RMoERouter": {"balance": pooled(0.002)},  # transformers' 0.001, whose loss is k at balance
    "RandomFrozenRouter": {},
    "ReplayRouter": {"balance": 0.01, "z": 0.001},  # those of the router inside
    "SBaseRouter": {},
    "SMEARRouter": {},
    "SelectiveSinkhornRouter": {},
    "SimBalRouter": {"orthogonality": 0.1, "z": 1e-5},  # arXiv:2506.14038
    "SimilarityRouter": {},
    "SinkhornRouter": {},
    "SoftMoERouter": {},
    "StableMoERouter": {"balance": 0.3, "distillation": 0.3},
    "SteeredRouter": {"balance": 0.01, "z": 0.001},  # those of the router inside
    "SparseMixerRouter": {},
    "SwitchRouter": {"balance": 0.01},
    "TaskRouter": {},
    "TemplateRouter": {"balance": 0.01},
    "ThorRouter": {},
    "TopKRouter": {},
    "TopPRouter": {"balance": 0.01, "entropy": 1e-4},  # Huang et al. 2024
    "VMoERouter": {"importance": 0.005, "load": 0.005},  # V-MoE, appendix A
    "VQMoERouter": {"balance": 0.01, "codebook": 0.08, "commitment": 0.02},  # vqmoe.py: 0.08, and 0.25 * 0.08
    "XMoERouter": {"balance": 0.01},
    "YuanRouter": {},
}
"""The coefficients of every router, plugins included, reduced over layers as their sources do."""


def test_every_router_declares_the_coefficients_of_its_source():
    found = {name: dict(create_router(name, SPEC).default_loss_weights) for name in routerzoo.list_routers()}
    assert found == COEFFICIENTS


PLUGINS = [
    Number("SwitchRouter", attribute("jitter"), 0.01, f"{SWITCH}; Mesh TensorFlow"),
    Number("SwitchRouter", attribute("top_k"), 1, SWITCH),
    Number("GShardRouter", attribute("top_k"), 2, "Lepikhin et al. 2021, arXiv:2006.16668, algorithm 1"),
    Number("VMoERouter", lambda r: r.noise_std(torch.zeros(1, 1)), 1 / 64, "V-MoE, equation 1: sigma = 1 / E"),
    Number("TopPRouter", attribute("threshold"), 0.4, "Huang et al. 2024, arXiv:2403.07652"),
    Number("DynMoLERouter", attribute("threshold"), 0.75, "Li et al. 2025, arXiv:2504.00661"),
    Number("DynMoLERouter", attribute("entropy_threshold"), 0.9, "Li et al. 2025, arXiv:2504.00661"),
    Number("SimBalRouter", gram("weight"), [1.0, 0.0], "arXiv:2506.14038: orthogonal"),
    Number("BaseLayerRouter", gram("expert_embedding"), [0.01, 0.0], "fairseq, base_layer.py: gain 0.1"),
    Number("TopKRouter", attribute("balances_by_score"), True, "DeepSeek-V3, equation 18; Megatron-core"),
    Number("QuantileBalancingRouter", bias_of_two_experts, [-0.5, 0.5], "Megatron-core, _update_router_qb_beta"),
    Number("SinkhornRouter", lambda r: r.noise_std(torch.zeros(1, 1)), 1 / 64, f"{VMOE_CODE}: noise_std"),
    Number("SinkhornRouter", attribute("iterations"), 20, f"{VMOE_CODE}: maxiter"),
    Number("SinkhornRouter", attribute("epsilon"), 1.0, VMOE_CODE),
    Number("ExpertChoiceRouter", lambda r: r.noise_std(torch.zeros(1, 1)), None, "Zhou et al. 2022, arXiv:2202.09368"),
    Number("HashFirstRouter", attribute("router.scale"), 1.5, V4),
    Number("HashFirstRouter", hash_layers, 3, V4),
    Number("HashFirstRouter", attribute("router.score_fn"), "sqrt_softplus", V4),
    Number("HashFirstRouter", attribute("router.renormalize"), True, V4),
    Number("SMEARRouter", std("weight"), 0.01, "Muqeeth et al. 2023, r-three/smear: router weights", rel=0.03),
    Number("RMoERouter", lambda r: r.up.shape[1], 256, "Qiu et al. 2024, arXiv:2408.06793"),
    Number("RMoERouter", std("down"), 0.02, RMOE_CODE, rel=0.03),
    Number("RMoERouter", std("up"), 0.02, RMOE_CODE, rel=0.03),
    Number("RMoERouter", std("state_bias"), 0.02, RMOE_CODE, rel=0.1),
    Number("RMoERouter", lambda r: float(r.input_cell.weight.detach().std()), 0.02, RMOE_CODE, rel=0.03),
    Number("RMoERouter", lambda r: float(r.input_cell.bias.detach().std()), 0.02, RMOE_CODE, rel=0.1),
    Number("VQMoERouter", largest("codebook"), 1 / 64, "VQMoE's code, vqmoe.py: VectorQuantizer", rel=0.01),
    Number("VQMoERouter", kurtosis("codebook"), UNIFORM, "VQMoE's code, vqmoe.py: VectorQuantizer", rel=0.05),
    Number("VQMoERouter", largest("branch_bias"), 0.0, "VQMoE's code, train.py: weights_init"),
    Number("TaskRouter", attribute("temperature"), 5.0, "CrossTaskMoE, routing_bart_v2.py: Selection"),
    Number("TaskRouter", lambda r: len(r.hidden), 64, "CrossTaskMoE, routing_bart_config.py: router_hidden_dim"),
    Number("TaskRouter", std("hidden"), 0.02, "BartConfig.init_std", rel=0.05),
    Number("TaskRouter", std("up"), 0.02, "BartConfig.init_std", rel=0.05),
    Number("TaskRouter", largest("up_bias"), 0.0, "BartPreTrainedModel"),
]


@pytest.mark.parametrize("number", PLUGINS, ids=lambda number: f"{number.router}-{number.value}")
def test_published_number_of_a_plugin(number):
    test_published_number(number)


def test_growths_of_k():
    # SMoE-Dropout's code: 8 to 16 of 16, in 300 parts of which each brings k 1 % nearer to its end.
    assert [k_at(step, 3000, 8, 16, "exponential") for step in (0, 69, 70, 3000)] == [8, 8, 9, 16]
    assert [k_at(step, 3000, 8, 16, "linear") for step in (0, 187, 188, 1500, 3000)] == [8, 8, 9, 12, 16]
    assert [k_at(step, 3000, 8, 16, "cosine") for step in (0, 1000, 2000, 3000)] == [8, 9, 12, 16]
    assert [k_at(step, 100, 8, 16, "multi-step") for step in (0, 79, 80, 100)] == [
        8,
        8,
        16,
        16,
    ]  # [1, 2, 4, 8, 16], clipped
    assert [k_at(step, 100, 16, 8, "multi-step") for step in (0, 19, 20, 100)] == [16, 16, 8, 8]
    assert [k_at(step, 100, 1, 16, "multi-step") for step in (0, 19, 20, 40, 60, 80, 100)] == [1, 1, 2, 4, 8, 16, 16]
