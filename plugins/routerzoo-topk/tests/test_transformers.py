"""Presets beside whole models of transformers, where it is installed: gates, and auxiliary losses at any depth."""

from functools import partial

import pytest
import torch
from routerzoo_topk import PRESETS

from routerzoo import LayerSpec, LossWeight, MLPExperts, MoE, RoutingContext, auxiliary_loss

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
MODELS = {
    "mixtral": partial(transformers.MixtralConfig, intermediate_size=8, num_local_experts=8),
    "qwen3": partial(transformers.Qwen3MoeConfig, moe_intermediate_size=8, num_experts=16, norm_topk_prob=True),
    "olmoe": partial(transformers.OlmoeConfig, intermediate_size=8, num_experts=16),
}


@pytest.mark.parametrize("depth", [1, 4, 16])
@pytest.mark.parametrize("name", MODELS)
def test_gates_and_losses_are_those_of_transformers(name, depth):
    torch.manual_seed(0)
    preset = PRESETS[name]
    config = MODELS[name](**SIZES, num_hidden_layers=depth, output_router_logits=True)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    gates = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
    assert len(gates) == depth
    seen = []
    for gate in gates:
        torch.nn.init.normal_(gate.weight)
        gate.register_forward_hook(lambda gate, inputs, outputs: seen.append((gate, inputs[0].detach(), outputs)))
    output = model(torch.randint(40, (2, 9)))
    layers, context = [], RoutingContext()
    for gate, hidden, (_, weights, experts) in seen:
        num_experts = len(gate.weight)
        layer = MoE(LayerSpec(16, num_experts), preset.build(), partial(MLPExperts, hidden_dim=1))
        layer.router.weight.data = gate.weight.detach().clone()
        layer(hidden.flatten(0, -2), context)
        routing = context.routings_of(layer)[0]
        ours, theirs = (
            torch.zeros(len(chosen), num_experts).scatter(1, chosen, values.detach())
            for chosen, values in ((routing.experts_TK, routing.weights_TK), (experts, weights))
        )
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
        layers.append(layer)

    expected = config.router_aux_loss_coef * output.aux_loss.detach()
    if name == "olmoe":
        # transformers pools here too, a loss that is k at balance; MegaBlocks, which trained it, averages one of 1.
        assert preset.loss_weights["balance"] == LossWeight(0.01, "mean")
        weights = {"balance": LossWeight(config.router_aux_loss_coef * layers[0].router.top_k, "pooled")}
    else:
        weights = preset.loss_weights
    torch.testing.assert_close(auxiliary_loss(layers, context, weights).detach(), expected, atol=0, rtol=1e-5)
