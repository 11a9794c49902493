"""The experts as one operator: the same sums by every means, and what it keeps for the backward pass."""
# Triton's interpreter runs the kernels here, on a CPU: see tests/conftest.py.

import itertools
import os
from functools import partial

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from routerzoo import (
    Experts,
    LayerSpec,
    LinearRouter,
    MLPExperts,
    MoE,
    Routing,
    RoutingContext,
    SwiGLUExperts,
    auxiliary_loss,
)
from routerzoo.models.decoder import Decoder
from routerzoo.moe import low_memory, softmax_losses
from routerzoo.moe.activations import ACTIVATIONS
from routerzoo.moe.dispatch import apply_experts
from routerzoo.moe.low_memory import HAS_TRITON, Assigned
from routerzoo.moe.rows import place_rows, sort_assignments
from tests.moe.launches import counted

INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs triton's interpreter")
MEANS = ["torch", "hybrid", "triton"] if INTERPRETED else ["torch"]  # on a GPU tests/test_gpu.py has the others
BANKS = {
    "mlp": MLPExperts,
    "plain": partial(MLPExperts, bias=False),
    "swiglu": SwiGLUExperts,
    "gated with biases": partial(SwiGLUExperts, bias=True),
}


def bank_of(kind, d_model, num_experts, dtype=torch.float32, **options):
    bank = BANKS[kind](LayerSpec(d_model, num_experts), **options)
    for parameter in bank.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter)
    return bank.to(dtype)


def routing_of(num_tokens, num_experts, top_k, dtype=torch.float32, *, drop=0.0, skew=0.0, flat=False):
    """Return a function of the weights that gives the routing, and the weights."""
    logits_TE = torch.randn(num_tokens, num_experts)
    logits_TE[:, 0] += skew
    weights_TK, experts_TK = logits_TE.topk(top_k)
    weights_TK = weights_TK.softmax(-1)
    experts_TK = experts_TK.masked_fill(torch.rand(experts_TK.shape) < drop, -1)
    weights_TK = weights_TK.masked_fill(experts_TK < 0, 0.0).to(dtype)
    if not flat:
        return partial(Routing, experts_TK, may_drop=drop > 0), weights_TK
    some_N = torch.randperm(experts_TK.numel())[: -num_tokens // 4]  # in any order, some tokens with fewer experts
    token_N, expert_N = some_N // top_k, experts_TK.flatten()[some_N]
    weight_N = weights_TK.flatten()[some_N]
    return (lambda weight_N: Routing(token_N=token_N, expert_N=expert_N, weight_N=weight_N)), weight_N


def gradients(compute, bank, x_TD, weights, grad_TD):
    x_TD, weights = x_TD.clone().requires_grad_(), weights.clone().requires_grad_()
    y_TD = compute(x_TD, weights)
    return [y_TD.detach(), *torch.autograd.grad(y_TD, [x_TD, weights, *bank.parameters()], grad_TD)]


def compare(means, bank, make, weights, num_experts, x_TD, tolerance):
    """Compare outputs and all gradients with the reference backend's, relative to the largest value."""
    grad_TD = torch.randn_like(x_TD)

    def low(x_TD, weights):
        return bank(x_TD, Assigned(*sort_assignments(make(weights), len(x_TD), num_experts), means))

    def reference(x_TD, weights):
        bank.backend = "reference"
        try:
            return apply_experts(x_TD, make(weights), bank, num_experts)
        finally:
            bank.backend = "auto"

    found = gradients(low, bank, x_TD, weights, grad_TD)
    expected = gradients(reference, bank, x_TD, weights, grad_TD)
    for value, right in zip(found, expected, strict=True):
        assert value.dtype == right.dtype
        assert value.isfinite().all()
        scale = max(float(right.abs().max()), 1e-30)
        assert float((value.double() - right.double()).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("means", MEANS)
@pytest.mark.parametrize(
    ("kind", "options", "routing"),
    [
        ("mlp", {"activation": "gelu"}, {"drop": 0.3}),
        ("swiglu", {}, {"skew": 20.0}),
        ("gated with biases", {"activation": "gelu_tanh"}, {"flat": True, "drop": 0.2}),
    ],
)
def test_the_sums_and_gradients_are_those_of_the_reference(means, kind, options, routing):
    bank = bank_of(kind, 24, 5, hidden_dim=20, **options)
    make, weights = routing_of(14, 5, 3, **routing)
    compare(means, bank, make, weights, 5, torch.randn(14, 24), 1e-6)


@pytest.mark.full
@pytest.mark.parametrize("means", MEANS)
@pytest.mark.parametrize(
    ("kind", "dtype", "routing"),
    [
        (kind, dtype, routing)
        for kind, dtype in itertools.product(BANKS, ["float32", "bfloat16", "float16"])
        for routing in ({}, {"drop": 0.3}, {"skew": 20.0}, {"flat": True, "drop": 0.2})
    ],
)
def test_every_bank_dtype_and_routing(means, kind, dtype, routing):
    dtype = getattr(torch, dtype)
    # The interpreter cuts bfloat16 off where a GPU rounds.
    tolerance = {torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 6e-2}[dtype]
    bank = bank_of(kind, 24, 5, dtype, hidden_dim=16)
    make, weights = routing_of(14, 5, 3, dtype, **routing)
    compare(means, bank, make, weights, 5, torch.randn(14, 24).to(dtype), tolerance)


@pytest.mark.full
@pytest.mark.parametrize("means", MEANS)
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"),
    [(1, 8, 1), (1, 8, 8), (3, 4, 4), (33, 1, 1), (2, 1100, 3), (17, 2, 1)],
)
def test_few_tokens_one_expert_all_experts_and_many(means, num_tokens, num_experts, top_k):
    bank = bank_of("mlp", 16, num_experts, hidden_dim=8)
    make, weights = routing_of(num_tokens, num_experts, top_k)
    compare(means, bank, make, weights, num_experts, torch.randn(num_tokens, 16), 1e-6)


@pytest.mark.full
@pytest.mark.parametrize("means", MEANS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["mlp", "gated with biases"])
def test_every_activation(means, activation, kind):
    bank = bank_of(kind, 16, 3, hidden_dim=8, activation=activation)
    make, weights = routing_of(9, 3, 2)
    compare(means, bank, make, weights, 3, torch.randn(9, 16), 2e-6)


@pytest.mark.parametrize("means", MEANS)
def test_without_tokens_or_choices(means):
    bank = bank_of("mlp", 16, 4, hidden_dim=8)
    for num_tokens, top_k in ((0, 2), (3, 0)):
        x_TD = torch.randn(num_tokens, 16, requires_grad=True)
        routing = Routing(torch.zeros(num_tokens, top_k, dtype=torch.int64), torch.zeros(num_tokens, top_k))
        y_TD = bank(x_TD, Assigned(*sort_assignments(routing, num_tokens, 4), means))
        y_TD.sum().backward()
        assert_close(y_TD, torch.zeros(num_tokens, 16))


@pytest.mark.parametrize("means", MEANS)
def test_memory_that_no_expert_writes_is_not_read(means, monkeypatch):
    """Of assignments that name no expert nothing is computed; what their memory holds reaches nobody."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN
    try:
        bank = bank_of("mlp", 16, 4, hidden_dim=8)
        make, weights = routing_of(12, 4, 2, drop=0.5)
        compare(means, bank, make, weights, 4, torch.randn(12, 16), 1e-6)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.parametrize("means", MEANS)
def test_two_runs_give_equal_bits(means):
    bank = bank_of("gated with biases", 16, 4, torch.bfloat16, hidden_dim=24)
    make, weights = routing_of(20, 4, 2, torch.bfloat16)
    x_TD = torch.randn(20, 16).bfloat16()
    order, _ = sort_assignments(make(weights), 20, 4)

    def low(x_TD, weights):
        return bank(x_TD, Assigned(order, weights.flatten(), means))

    first, second = (gradients(low, bank, x_TD, weights, x_TD) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("means", MEANS)
def test_dropout_is_the_same_in_both_passes(means):
    bank = bank_of("plain", 16, 2, hidden_dim=24, activation="relu", dropout=0.5)
    make, weights = routing_of(6, 2, 1)
    assigned = sort_assignments(make(weights), 6, 2)
    x_TD = torch.randn(6, 16, requires_grad=True)

    def output():
        torch.manual_seed(4)
        return bank(x_TD, Assigned(*assigned, means))

    y_TD = output()
    assert torch.equal(y_TD, output())
    assert not torch.equal(y_TD, bank(x_TD, Assigned(*assigned, means)))
    # The output is piecewise linear in the hidden states, so that their gradient gives it back, but for no bias.
    grad_TD = torch.randn(6, 16)
    (dx_TD,) = torch.autograd.grad(output(), x_TD, grad_TD)
    assert_close((dx_TD * x_TD).sum(), (y_TD * grad_TD).sum(), rtol=1e-4, atol=1e-4)


def test_the_mean_over_dropout_is_the_output_without():
    bank = bank_of("plain", 16, 2, hidden_dim=256, dropout=0.5)
    make, weights = routing_of(6, 2, 1)
    assigned = sort_assignments(make(weights), 6, 2)
    x_TD = torch.randn(6, 16)
    drawn = torch.stack([bank(x_TD, Assigned(*assigned, "torch")) for _ in range(400)]).mean(0)
    drawn, whole = drawn.detach(), bank.eval()(x_TD, Assigned(*assigned, "torch")).detach()
    assert float((drawn - whole).norm() / whole.norm()) < 0.2


def saved_bytes(compute, parameters):
    """Return the bytes that a computation keeps for its backward pass, beside the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    saved, alive = {}, []

    def pack(tensor):
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    return sum(saved.values())


@pytest.mark.parametrize("with_losses", [False, pytest.param(True, marks=needs_interpreter)])
@pytest.mark.parametrize(("kind", "halves"), [("swiglu", 2), ("plain", 1), ("mlp", 1)])
def test_what_is_kept_does_not_grow_with_granularity(kind, halves, with_losses, monkeypatch):
    """The whole layer: within 5 % from 8 experts and k = 2 to 64 and 16, within 10 % with a GPU's losses."""
    monkeypatch.setattr(softmax_losses, "_on_gpu", lambda logits_TE: True)
    num_tokens, d_model, found = 256, 256, []
    for num_experts, top_k, hidden_dim in ((8, 2, 512), (64, 16, 64)):
        router, experts = partial(LinearRouter, top_k=top_k), partial(BANKS[kind], hidden_dim=hidden_dim)
        layer = MoE(d_model=d_model, num_experts=num_experts, router=router, experts=experts, low_memory=True)
        x_TD = torch.randn(num_tokens, d_model, requires_grad=True)
        kept = saved_bytes(partial(layer_and_losses, layer, x_TD, with_losses), list(layer.parameters()))
        rows = num_tokens * top_k
        elements = num_tokens * d_model + halves * rows * hidden_dim
        if with_losses:
            elements += num_tokens * num_experts  # the logits
        # An int64, an int32, an int16 and a weight for each assignment.
        assert kept <= 4 * elements + 18 * rows + 4096
        found.append(kept)
    assert found[1] <= (1.1 if with_losses else 1.05) * found[0]


def layer_and_losses(layer, x_TD, with_losses):
    context = RoutingContext()
    y_TD = layer(x_TD, context)
    return (y_TD, auxiliary_loss(layer, context, {"balance": 0.1, "z": 0.1})) if with_losses else y_TD


def test_weights_in_float32_are_kept_alone_under_autocast():
    layer = MoE(d_model=64, num_experts=4, experts="SwiGLUExperts", low_memory=True)
    x_TD = torch.randn(8, 64, requires_grad=True)

    def compute():
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x_TD).dtype == torch.bfloat16

    copies = 2 * sum(parameter.numel() for parameter in layer.experts.parameters())
    assert saved_bytes(compute, list(layer.parameters())) < copies / 4


def test_the_layer_computes_the_same_with_little_memory():
    outputs = []
    for low in (False, True):
        torch.manual_seed(0)
        router = partial(LinearRouter, top_k=2)
        layer = MoE(d_model=16, num_experts=4, num_shared_experts=1, router=router, low_memory=low)
        context = RoutingContext(padding_mask=torch.arange(10) > 7)
        x_TD = torch.randn(10, 16, requires_grad=True)
        y_TD = layer(x_TD, context)
        loss = y_TD.square().sum() + auxiliary_loss(layer, context, {"balance": 0.1, "z": 0.1})
        outputs.append([y_TD, *torch.autograd.grad(loss, [x_TD, *layer.parameters()])])
    for value, right in zip(*outputs, strict=True):
        assert_close(value, right, rtol=1e-5, atol=1e-6)


def test_what_cannot_have_little_memory_is_refused():
    class Own(Experts):
        def forward(self, x_ND, ends_E):
            return x_ND

    for options in ({"experts": Own}, {"backend": "loop"}):
        with pytest.raises(ValueError, match="low_memory=True takes MLPExperts or SwiGLUExperts"):
            MoE(d_model=8, num_experts=2, low_memory=True, **options)


def test_gradients_of_gradients_are_right():
    bank = bank_of("mlp", 4, 2, torch.float64, hidden_dim=3)
    make, weights = routing_of(3, 2, 2, torch.float64)

    def compute(x_TD, weights, up):
        assigned = sort_assignments(make(weights), 3, 2)
        return torch.func.functional_call(bank, {"up": up}, (x_TD, Assigned(*assigned, "torch")))

    inputs = torch.randn(3, 4).double().requires_grad_(), weights.requires_grad_(), bank.up
    assert torch.autograd.gradcheck(compute, inputs)
    assert torch.autograd.gradgradcheck(compute, inputs)


def test_gradients_of_gradients_of_a_layer():
    """The weights depend on the hidden states too, which must count once."""
    found = []
    for low in (False, True):
        torch.manual_seed(0)
        layer = MoE(d_model=6, num_experts=3, low_memory=low).double()
        x_TD = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        inputs = [x_TD, *layer.parameters()]
        first = torch.autograd.grad(layer(x_TD).square().sum(), inputs, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(grad.square().sum() for grad in first), inputs)])
    assert_close(found[1], found[0])


def test_gradients_of_gradients_under_autocast():
    layer = MoE(d_model=16, num_experts=2, low_memory=True)
    x_TD = torch.randn(3, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y_TD = layer(x_TD)
    (grad,) = torch.autograd.grad(y_TD.float().square().sum(), x_TD, create_graph=True)
    grad.square().sum().backward()
    assert x_TD.grad.isfinite().all()


@pytest.mark.parametrize("num_experts", [2**15 - 2, 2**15 - 1, 2**15])
def test_as_many_experts_as_16_bits_hold(num_experts):
    experts_TK = torch.tensor([[num_experts - 1, -1], [0, num_experts - 1]])
    rows = place_rows(sort_assignments(Routing(experts_TK, torch.ones(2, 2)), 2, num_experts)[0], 2, num_experts)
    assert rows.expert_N.tolist() == [0, num_experts - 1, num_experts - 1, num_experts]
    assert rows.ends_E[-1] == 3
    assert rows.source_N.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("kind", BANKS)
def test_flops_are_those_of_the_separate_products(kind):
    bank, (make, weights) = bank_of(kind, 8, 4), routing_of(12, 4, 2, drop=0.3)
    routing = make(weights.requires_grad_())
    flops = []
    for as_one in (False, True):
        x_TD = torch.randn(12, 8, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            y_TD = apply_experts(x_TD, routing, bank, 4, low_memory=as_one)
            flops.append(counter.get_total_flops())
            y_TD.square().sum().backward()
        flops.append(counter.get_total_flops() - flops[-1])
    rows, products = int((routing.experts_TK >= 0).sum()), 3 if "gate" in kind or kind == "swiglu" else 2
    forward = 2 * rows * 8 * bank.hidden_dim * products
    # The gradient of a weight takes the bias from every token at once.
    by_token = 0 if kind in ("plain", "swiglu") else 2 * 12 * 8 * 4
    assert flops == [forward, 2 * forward, forward, 2 * forward + by_token]


def test_it_compiles_as_one_operator():
    layer = MoE(d_model=16, num_experts=4, router=partial(LinearRouter, top_k=2), low_memory=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x_TD = torch.randn(6, 16, requires_grad=True)
    expected = layer(x_TD)
    grads = torch.autograd.grad(expected.sum(), [x_TD, *layer.parameters()])
    found = compiled(x_TD)
    assert_close(found, expected)
    for value, right in zip(torch.autograd.grad(found.sum(), [x_TD, *layer.parameters()]), grads, strict=True):
        assert_close(value, right)
    torch.library.opcheck(low_memory._experts, _arguments(layer, x_TD), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("means", MEANS)
def test_a_compiler_knows_the_gradients_of_either_bias(means):
    """In mixed precision, where what is not asked for has the dtype of the gradient, not of the weights."""
    layer = MoE(d_model=16, num_experts=4, router=partial(LinearRouter, top_k=2))
    arguments = _arguments(layer, torch.randn(6, 16), torch.bfloat16, means)
    out_TD, z_NZ, order_N = low_memory._experts(*(a.detach() if torch.is_tensor(a) else a for a in arguments))
    tensors = (*arguments[:7], order_N, *arguments[8:10], z_NZ, *arguments[10:13], means)
    for first, second in ((True, True), (True, False), (False, True)):
        needs = [False, False, False, first, False, second]
        given = (torch.randn_like(out_TD), *tensors, needs)
        torch.library.opcheck(low_memory._experts_backward, given, test_utils=("test_schema", "test_faketensor"))


def _arguments(layer, x_TD, dtype=torch.float32, means="torch"):
    (expert_N, order_N, begin_T, top_k), weight_N = sort_assignments(layer.router(x_TD), len(x_TD), 4)
    network = layer.experts.network()
    tensors = (x_TD, weight_N.detach(), network.up, network.up_bias, network.down, network.down_bias)
    options = (top_k, network.activation, 0.0, dtype, means, True)
    return (*tensors, expert_N, order_N, begin_T, None, *options)


@needs_interpreter
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "options"),
    [
        (14, 5, 3, {}),
        (14, 5, 3, {"drop": 0.5, "flat": True}),
        (1, 1, 1, {}),
        (1, 40, 2, {}),
        (40, 2, 1, {"drop": 1.0}),
        (0, 5, 2, {}),
    ],
)
def test_a_kernel_places_rows_as_torch_does(num_tokens, num_experts, top_k, options):
    from routerzoo.moe import kernel_calls

    make, weights = routing_of(num_tokens, num_experts, top_k, **options)
    order, _ = sort_assignments(make(weights), num_tokens, num_experts)
    expected = place_rows(order, num_tokens, num_experts)
    for given in (order, order._replace(order_N=order.order_N.int())):  # of the forward pass, and of the backward pass
        found = kernel_calls.place_rows(given, num_tokens, num_experts)
        assert_close(list(found[:5]), list(expected[:5]), rtol=0, atol=0)


@needs_interpreter
@pytest.mark.parametrize("loads", [[0, 150, 0], [31, 33, 86], [0, 0, 0], [64, 32, 1]])
def test_sums_over_experts_with_few_rows_and_with_all(loads):
    """Each is the sum of its chunks, of 32 rows here; rows from 150 on belong to no expert."""
    from routerzoo.moe import kernel_calls

    experts_N = torch.arange(3).repeat_interleave(torch.tensor(loads))
    experts_N = torch.cat([experts_N, experts_N.new_full((160 - len(experts_N),), -1)])[torch.randperm(160)]
    routing = Routing(experts_N.view(80, 2), torch.randn(80, 2), may_drop=True)
    order, weight_N = sort_assignments(routing, 80, 3)
    rows = kernel_calls.place_rows(order, 80, 3)
    dz_NZ, grad_TD = torch.randn(160, 20), torch.randn(80, 37)
    up_bias_EZ, down_bias_ED = torch.empty(3, 20), torch.empty(3, 37)
    expected_up = torch.stack([segment.sum(0) for segment in dz_NZ[: sum(loads)].split(loads)])
    weights_TE = torch.zeros(80, 4).scatter_add(1, routing.experts_TK.remainder(4), routing.weights_TK)
    expected_down = weights_TE[:, :3].T @ grad_TD
    for biases in ((up_bias_EZ, down_bias_ED), (up_bias_EZ, None), (None, down_bias_ED)):
        found = kernel_calls.bias_grads(dz_NZ, grad_TD, weight_N, *biases, rows)
        for sums, bias, expected in zip(found, biases, (expected_up, expected_down), strict=True):
            assert_close(sums, expected if bias is not None else sums.new_empty(0))


@needs_interpreter
@pytest.mark.parametrize(
    ("means", "kind", "num_padded", "most"),
    [("hybrid", "mlp", 0, 45), ("hybrid", "swiglu", 4, 46), ("triton", "swiglu", 0, 39), ("triton", "mlp", 4, 46)],
)
def test_launches_of_a_layer_with_losses(means, kind, num_padded, most, monkeypatch):
    """What a GPU is asked for in a training step; torch's own composition of the same needs 137."""
    layer = MoE(d_model=32, num_experts=4, experts=partial(BANKS[kind], hidden_dim=32)).bfloat16()
    x_TD = torch.randn(16, 32, dtype=torch.bfloat16, requires_grad=True)
    context = RoutingContext(padding_mask=torch.arange(16) < num_padded if num_padded else None)
    grad_TD = torch.zeros_like(x_TD)
    with counted(monkeypatch, means) as launches:
        y_TD = layer(x_TD, context)
        loss = auxiliary_loss(layer, context, {"balance": 0.01, "z": 0.001})
        torch.autograd.backward([y_TD, loss], [grad_TD, None])
    assert launches.total <= most, launches.counts


@needs_interpreter
def test_launches_of_a_model_beside_a_dense_one(monkeypatch):
    """A language model of four layers with losses, in mixed precision: at most 1.4 times what a dense one launches."""
    totals = []
    for blocks in ("none", "all"):
        model = Decoder(
            97,
            LinearRouter,
            partial(MLPExperts, hidden_dim=32),
            num_experts=8,
            d_model=32,
            num_blocks=4,
            num_heads=2,
            moe_blocks=blocks,
            max_length=8,
        )
        ids_BS = torch.randint(97, (2, 8))
        with monkeypatch.context() as patches, counted(patches, "hybrid") as launches:
            with torch.autocast("cpu", torch.bfloat16):
                logits_BSV, context = model(ids_BS)
                loss = logits_BSV.logsumexp(-1).mean()
                if blocks == "all":
                    loss = loss + auxiliary_loss(model, context, {"balance": 0.01, "z": 0.001})
            loss.backward()
        totals.append(launches.total)
    assert totals[1] <= 1.4 * totals[0], totals
