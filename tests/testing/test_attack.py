"""One sequence of a batch cannot change another's output, for every router that says so; the others are caught."""

from functools import partial

import pytest
import torch

import routerzoo
from routerzoo import LayerSpec, LinearRouter, MoE, Router, Routing, RoutingContext
from routerzoo.moe.layer import BatchDependenceWarning
from routerzoo.registry import router_class
from routerzoo.testing.attack import cross_batch_attack

SPEC = LayerSpec(8, 8, layer=0, num_layers=2, vocab_size=13, num_positions=8, hidden_dim=32, num_tasks=3)
# By the default arguments of these, a step rarely looks at the batch, or the capacity is too large to bind.
HARSHER = {"SelectiveSinkhornRouter": {"probability": 1.0}, "CapacityRouter": {"capacity_factor": 0.5}}


@pytest.mark.parametrize("training", [False, True], ids=["serving", "training"])
@pytest.mark.parametrize("name", routerzoo.list_routers())
def test_every_router_keeps_its_word(name, training):
    factory = partial(router_class(name), **HARSHER.get(name, {}))
    attack = cross_batch_attack(factory, training=training)
    router = factory(SPEC).train(training)
    assert (attack.hidden_TD is None) == router.properties.batch_independent, str(attack)


class FirstComeFirstServed(Router):
    """Each expert takes the first two tokens of the batch that want it: the buffer that can be overflowed."""

    paper = "test"
    batch_independent = causal = tokenwise = False

    def __init__(self, spec, *, top_k=1):
        super().__init__(spec, top_k=top_k)
        self.gate = torch.nn.Parameter(torch.randn(spec.num_experts, spec.d_model))

    def route(self, x_TD, context):
        logits_TE = x_TD @ self.gate.T
        experts_T = logits_TE.argmax(-1)
        place_TE = torch.nn.functional.one_hot(experts_T, self.spec.num_experts).cumsum(0)
        full_T = place_TE.gather(1, experts_T.unsqueeze(1)).squeeze(1) > 2
        weights_T = torch.where(full_T, 0.0, logits_TE.softmax(-1).amax(-1))
        return Routing(experts_T.masked_fill(full_T, -1).unsqueeze(1), weights_T.unsqueeze(1), logits_TE)


def test_a_buffer_is_overflowed():
    attack = cross_batch_attack(FirstComeFirstServed)
    assert attack.change > 0.5
    assert "changed the victim's output by" in str(attack)


def test_serving_with_a_shared_buffer_warns_once_and_says_why():
    layer = MoE(LayerSpec(8, 4), FirstComeFirstServed)
    with pytest.warns(BatchDependenceWarning, match="one user's input can change another's output"):
        layer.eval()
    layer.train()
    layer.eval()  # a second warning would be an error here
    assert layer(torch.randn(3, 8), RoutingContext()).shape == (3, 8)


def test_safe_routers_serve_in_silence():
    MoE(LayerSpec(8, 4), LinearRouter).eval()
