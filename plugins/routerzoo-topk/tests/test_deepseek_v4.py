"""HashFirstRouter against the DeepSeek-V4 routers of transformers 5.24: recorded, and live where it is installed.

`python plugins/routerzoo-topk/tests/test_deepseek_v4.py` records the file again.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from routerzoo_topk import HashFirstRouter

from routerzoo import LayerSpec, RoutingContext

FILE = Path(__file__).parent / "golden" / "deepseek_v4_E16_k4.npz"
TOLERANCE = 5e-6
SIZES = {"hidden_size": 12, "n_routed_experts": 16, "num_experts_per_tok": 4, "vocab_size": 50}


def recorded(seed):
    """Run both routers of transformers on random weights and inputs; return all that goes in and comes out."""
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as theirs

    torch.manual_seed(seed)
    config = theirs.DeepseekV4Config(**SIZES, num_hidden_layers=1, num_attention_heads=1)
    values = {"scale": torch.tensor(config.routed_scaling_factor)}
    for kind, router in (
        ("hash", theirs.DeepseekV4HashRouter(config)),
        ("topk", theirs.DeepseekV4TopKRouter(config)),
    ):
        torch.nn.init.normal_(router.weight)
        hidden = torch.randn(3, 7, config.hidden_size, requires_grad=True)
        ids = torch.randint(config.vocab_size, (3, 7))
        if kind == "hash":
            order = torch.rand(config.vocab_size, config.n_routed_experts).argsort(-1)
            router.tid2eid.copy_(order[:, : config.num_experts_per_tok])
            values |= {"hash_ids": ids.flatten(), "hash_table": router.tid2eid.clone()}
        else:
            router.e_score_correction_bias.normal_()
            values["topk_bias"] = router.e_score_correction_bias.clone()
        logits, weights, experts = router(hidden, ids) if kind == "hash" else router(hidden)
        probe = torch.randn_like(weights)
        gradients = torch.autograd.grad((weights * probe).sum(), (hidden, router.weight))
        names = ("weight", "hidden", "logits", "experts", "weights", "probe", "grad_hidden", "grad_weight")
        tensors = (router.weight, hidden, logits, experts, weights, probe, *gradients)
        values |= {f"{kind}_{n}": t.detach().clone() for n, t in zip(names, tensors, strict=True)}
    return values


def close(ours, theirs):
    """Compare relative to the largest value of the tensor."""
    assert ours.shape == theirs.shape
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"largest error {error:.1e} of the largest value, shape {list(theirs.shape)}")
    assert error < TOLERANCE


def by_expert(experts_TK, values_TK, num_experts):
    return torch.zeros(len(experts_TK), num_experts).scatter(1, experts_TK, values_TK)


def check(golden):
    for kind, layer in (("hash", 2), ("topk", 3)):
        own = {name.removeprefix(f"{kind}_"): value for name, value in golden.items() if name.startswith(f"{kind}_")}
        num_experts, d_model = own["weight"].shape
        vocab_size, top_k = golden["hash_table"].shape
        spec = LayerSpec(d_model, num_experts, layer=layer, num_layers=4, vocab_size=vocab_size)
        router = HashFirstRouter(spec, top_k=top_k)
        assert router.router.scale == golden["scale"]
        router.router.weight.data = own["weight"]
        if kind == "hash":
            router.table[:, :top_k] = own["table"]
        else:
            router.router.selection_bias.copy_(own["bias"])
        hidden = own["hidden"].flatten(0, 1).requires_grad_()
        routing = router(hidden, RoutingContext(token_ids=own.get("ids")))
        close(routing.logits_TE, own["logits"])
        assert torch.equal(routing.experts_TK.sort(-1).values, own["experts"].sort(-1).values)
        weights = by_expert(routing.experts_TK, routing.weights_TK, num_experts)
        close(weights, by_expert(own["experts"], own["weights"], num_experts))
        (weights * by_expert(own["experts"], own["probe"], num_experts)).sum().backward()
        close(hidden.grad, own["grad_hidden"].flatten(0, 1))
        close(router.router.weight.grad, own["grad_weight"])


def test_recorded_routers():
    print(f"golden {FILE.stem}")
    with np.load(FILE) as file:
        check({key: torch.from_numpy(value) for key, value in file.items()})


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_other_seeds(seed):
    pytest.importorskip("transformers.models.deepseek_v4", reason="needs transformers 5.24")
    check(recorded(seed))


if __name__ == "__main__":
    np.savez(FILE, **{name: value.numpy() for name, value in recorded(0).items()})
