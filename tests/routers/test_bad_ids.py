"""Ids that no table has: one sentence on a CPU, no waiting for the device elsewhere; padding is never looked up."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from routerzoo import HashRouter, LayerSpec, MoE, RoutingContext, StableMoERouter, create_router

SPEC = LayerSpec(4, 6, layer=0, num_layers=2, vocab_size=5, num_tasks=5)
ROUTERS = {
    "HashRouter": "token_ids",
    "StableMoERouter": "token_ids",
    "HashFirstRouter": "token_ids",
    "TaskRouter": "task_ids",
}


def route(name, ids, padding=None, training=False):
    router = create_router(name, SPEC).train(training)
    return router(torch.ones(len(ids), 4), RoutingContext(**{ROUTERS[name]: ids}, padding_mask=padding))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("wrong", [-1, 5, -100])
@pytest.mark.parametrize("name", ROUTERS)
def test_an_id_out_of_range_is_named(name, wrong, training):
    field = ROUTERS[name]
    message = rf"{name} looks {field} up, and token 1 has {wrong}, not one of 0 to 4: mark padding in padding_mask"
    with pytest.raises(ValueError, match=message):
        route(name, torch.tensor([0, wrong, 4]), training=training)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
@pytest.mark.parametrize("name", ROUTERS)
def test_ids_are_integers(name, dtype):
    with pytest.raises(ValueError, match=f"{name} looks {ROUTERS[name]} up, and they are {dtype}: give integers"):
        route(name, torch.tensor([0, 1]).to(dtype))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
@pytest.mark.parametrize("name", ROUTERS)
def test_narrow_integers_are_ids(name, dtype):
    ids = torch.tensor([0, 4, 2])
    torch.manual_seed(0)
    expected = route(name, ids).experts_TK
    torch.manual_seed(0)
    assert torch.equal(route(name, ids.to(dtype)).experts_TK, expected)


@pytest.mark.parametrize("wrong", [-1, -100, 10**9])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_padding_is_never_looked_up(name, training, wrong):
    ids, padding = torch.tensor([0, wrong, 4]), torch.tensor([False, True, False])
    torch.manual_seed(0)
    expected = route(name, torch.tensor([0, 0, 4]), padding, training)
    torch.manual_seed(0)
    found = route(name, ids, padding, training)
    assert torch.equal(found.experts_TK, expected.experts_TK)
    assert found.losses == expected.losses


def test_no_tokens_have_no_wrong_ids():
    assert len(route("HashRouter", torch.zeros(0, dtype=torch.int64)).experts_TK) == 0


def test_a_layer_inside_a_wrapper_is_checked_too():
    layer = MoE(SPEC, partial(create_router, "SteeredRouter", router="HashRouter"))
    with pytest.raises(ValueError, match="SteeredRouter looks token_ids up, and token 0 has 9"):
        layer(torch.ones(1, 4), RoutingContext(token_ids=torch.tensor([9])))


class Layer(torch.nn.Module):
    def __init__(self, router):
        super().__init__()
        self.moe = MoE(SPEC, router)

    def forward(self, x, ids, padding):
        return self.moe(x, RoutingContext(token_ids=ids, padding_mask=padding))


@pytest.mark.parametrize("router", [HashRouter, pytest.param(StableMoERouter, marks=pytest.mark.full)])
def test_an_exported_layer_asserts_in_its_graph(router):
    layer, x, none = Layer(router).eval(), torch.ones(3, 4), torch.zeros(3, dtype=torch.bool)
    exported = torch.export.export(layer, (x, torch.tensor([0, 1, 4]), none)).module()
    assert torch.equal(exported(x, torch.tensor([4, 1, 0]), none), layer(x, torch.tensor([4, 1, 0]), none))
    padding = torch.tensor([True, False, False])
    assert torch.equal(exported(x, torch.tensor([-1, 1, 0]), padding), layer(x, torch.tensor([0, 1, 0]), padding))
    for wrong in (-1, 5):
        with pytest.raises(RuntimeError, match=f"{router.__name__} looks token_ids up, 0 to 4: mark padding"):
            exported(x, torch.tensor([0, wrong, 4]), none)


@pytest.mark.full
def test_a_compiled_layer_asserts_in_its_graph():
    layer, x, none = Layer(HashRouter).eval(), torch.ones(3, 4), torch.zeros(3, dtype=torch.bool)
    compiled = torch.compile(layer, fullgraph=True)
    assert_close(compiled(x, torch.tensor([4, 1, 0]), none), layer(x, torch.tensor([4, 1, 0]), none))
    with pytest.raises(RuntimeError, match="HashRouter looks token_ids up, 0 to 4: mark padding"):
        compiled(x, torch.tensor([0, -1, 4]), none)


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for():
    router = HashRouter(SPEC).cuda()
    x_TD, ids = torch.ones(3, 4, device="cuda"), torch.tensor([0, 1, 4], device="cuda")
    context = RoutingContext(token_ids=ids, padding_mask=torch.zeros_like(ids, dtype=torch.bool))
    torch.cuda.set_sync_debug_mode("error")
    try:
        router(x_TD, context)
    finally:
        torch.cuda.set_sync_debug_mode("default")


GPU_SCRIPT = """
import torch
from routerzoo import HashRouter, LayerSpec, RoutingContext
router = HashRouter(LayerSpec(4, 6, layer=0, vocab_size=5)).cuda()
router(torch.ones(1, 4, device="cuda"), RoutingContext(token_ids=torch.tensor([-1], device="cuda")))
torch.cuda.synchronize()
"""


@pytest.mark.gpu
def test_a_wrong_id_stops_a_gpu_with_the_same_sentence():
    stopped = subprocess.run([sys.executable, "-c", GPU_SCRIPT], capture_output=True, text=True, check=False)
    assert stopped.returncode != 0
    assert "HashRouter looks token_ids up, 0 to 4" in stopped.stderr + stopped.stdout
