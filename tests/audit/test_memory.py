"""Upcycling, replacing routers, auditing and pruning hold no second copy of the experts."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from routerzoo import moe_layers
from routerzoo.audit import Losses, Subject, audit, compress

pytestmark = pytest.mark.full

EXPERTS, TOKENS = 8, 16


class Allocations(TorchDispatchMode):
    """Bytes of every storage that an operation makes."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs or {})) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self.made.append(0 if tensor.is_meta else tensor.untyped_storage().nbytes())
        return result


def bytes_of(modules):
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


@pytest.fixture
def mixtral():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 512, "num_hidden_layers": 2}
    config = transformers.MixtralConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=EXPERTS, dtype="bfloat16"
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_experts_are_upcycled_once():
    transformers = pytest.importorskip("transformers")
    from routerzoo import hf

    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 512, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, dtype="bfloat16")
    dense = transformers.AutoModelForCausalLM.from_config(config)
    with Allocations() as allocations:
        model = hf.upcycle(dense, num_experts=EXPERTS)
    experts = bytes_of(layer.experts for layer in moe_layers(model))
    assert {p.dtype for layer in moe_layers(model) for p in layer.experts.parameters()} == {torch.bfloat16}
    stacked = min(p.numel() * p.element_size() for layer in moe_layers(model) for p in layer.experts.parameters())
    assert sum(made for made in allocations.made if made >= stacked) == experts


def test_an_audit_copies_no_experts_and_pruning_those_that_are_left(mixtral):
    from routerzoo import hf

    bank = bytes_of([mixtral.model.layers[0].mlp.experts])
    places = {p.data_ptr() for name, p in mixtral.named_parameters() if "experts" in name}
    with Allocations() as allocations:
        model = hf.replace_routers(mixtral)
    assert {p.data_ptr() for layer in moe_layers(model) for p in layer.experts.parameters()} == places
    assert max(allocations.made) < bank / EXPERTS
    ids_BS = torch.randint(40, (2, TOKENS // 2))

    def losses(ids_BS):
        loss = model(input_ids=ids_BS, labels=ids_BS).loss
        return Losses(loss.expand(2), torch.ones(2))

    subject = Subject("mixtral", "ids", model, [ids_BS], losses)
    with Allocations() as allocations:
        measured = audit(subject, counterfactual_batches=1)
    # In float32, one expert's parameter at a time: norms are sums of many squares.
    assert max(allocations.made) <= 2 * bank / EXPERTS
    with Allocations() as allocations:
        compress(subject, measured, 4)
    large = [made for made in allocations.made if made > bank / EXPERTS]
    assert sum(large) == bytes_of(layer.experts for layer in moe_layers(model)) == 2 * bank / 2
