from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import routerzoo
from routerzoo import (
    Experts,
    LayerSpec,
    MLPExperts,
    MoE,
    Router,
    Routing,
    RoutingContext,
    SwiGLUExperts,
    auxiliary_loss,
)
from routerzoo.moe.dispatch import dense_forward
from routerzoo.moe.grouped_linear import grouped_linear
from routerzoo.moe.layer import NonCausalRouterError
from routerzoo.router import UnmetRequirementError
from tests.conftest import SPEC, build_router, router_factory


class Fixed(Router):
    """Answers what it is given."""

    def __init__(self, spec, routing):
        super().__init__(spec, top_k=1)
        self.routing = routing

    def route(self, x_TD, context):
        return self.routing


def layer_with(routing, experts=MLPExperts, **options):
    return MoE(SPEC, lambda spec: Fixed(spec, routing), experts, **options)


def by_hand(layer, x_TD, pairs):
    """Sum over (token, expert, weight), one token at a time."""
    y_TD = torch.zeros_like(x_TD)
    for token, expert, weight in pairs:
        rows = (torch.arange(SPEC.num_experts) >= expert).to(torch.int32)
        y_TD[token] += weight * layer.experts(x_TD[token : token + 1], rows)[0]
    return y_TD


@pytest.mark.parametrize("experts", [MLPExperts, SwiGLUExperts])
def test_sparse_routing_is_the_weighted_sum_of_its_experts(experts):
    experts_TK = torch.tensor([[0, 5], [5, 5], [7, -1], [-1, -1]])
    weights_TK = torch.tensor([[0.3, 0.7], [0.5, 0.5], [2.0, 0.0], [0.0, 0.0]])
    layer, x_TD = layer_with(Routing(experts_TK, weights_TK), experts), torch.randn(4, 16)
    pairs = [(0, 0, 0.3), (0, 5, 0.7), (1, 5, 0.5), (1, 5, 0.5), (2, 7, 2.0)]
    assert_close(layer(x_TD), by_hand(layer, x_TD, pairs))


def test_flat_routing_is_the_weighted_sum_of_its_assignments():
    routing = Routing(
        token_N=torch.tensor([2, 0, 2]), expert_N=torch.tensor([1, 1, 6]), weight_N=torch.tensor([0.2, 1.0, 0.8])
    )
    layer, x_TD = layer_with(routing), torch.randn(3, 16)
    assert_close(layer(x_TD), by_hand(layer, x_TD, [(2, 1, 0.2), (0, 1, 1.0), (2, 6, 0.8)]))


def test_dense_routing_mixes_tokens_into_slots_and_back():
    dispatch_GSEP = torch.rand(2, 3, SPEC.num_experts, 2)
    combine_GSEP = torch.rand(2, 3, SPEC.num_experts, 2)
    layer = layer_with(Routing(dispatch_GSEP=dispatch_GSEP, combine_GSEP=combine_GSEP))
    x_TD = torch.randn(6, 16)
    y_TD = torch.zeros(6, 16)
    for group in range(2):
        for expert in range(SPEC.num_experts):
            for slot in range(2):
                mixed = sum(dispatch_GSEP[group, s, expert, slot] * x_TD[3 * group + s] for s in range(3))
                out = by_hand(layer, mixed[None], [(0, expert, 1.0)])[0]
                for s in range(3):
                    y_TD[3 * group + s] += combine_GSEP[group, s, expert, slot] * out
    assert_close(layer(x_TD), y_TD)


def test_shared_experts_see_every_token():
    routing = Routing(torch.full((3, 1), -1), torch.zeros(3, 1))
    layer, x_TD = layer_with(routing, num_shared_experts=2), torch.randn(3, 16)
    shared = layer.shared_experts
    alone = [shared(x_TD, torch.tensor(rows, dtype=torch.int32)) for rows in ([3, 3], [0, 3])]
    assert_close(layer(x_TD), alone[0] + alone[1])


@pytest.mark.parametrize("backend", ["grouped", "loop", "reference"])
def test_layers_agree_whatever_the_backend(router_name, backend, make_context):
    layer = MoE(SPEC, router_factory(router_name, top_k=2), SwiGLUExperts)
    x, context = torch.randn(24, 16, requires_grad=True), make_context(24)

    def run(backend):
        layer.experts.backend = backend
        layer.zero_grad()
        x.grad = None
        y = layer(x, context)
        y.square().sum().backward()
        return [y.detach(), x.grad, layer.experts.gate_up.grad.clone()]

    for got, expected in zip(run(backend), run("reference"), strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_layer_takes_no_token_and_one(router_name, tokens, make_context):
    layer = MoE(SPEC, router_factory(router_name, top_k=2))
    y = layer(torch.randn(tokens, 16), make_context(tokens))
    assert y.shape == (tokens, 16)
    y.sum().backward()


def test_every_expert_may_be_chosen_and_one_may_be_all(router_name):
    spec = LayerSpec(16, 3, layer=0, vocab_size=40)
    context = RoutingContext(token_ids=torch.randint(40, (5,)))
    assert MoE(spec, router_factory(router_name, top_k=3))(torch.randn(5, 16), context).isfinite().all()
    spec = LayerSpec(16, 1, layer=0, vocab_size=40)
    assert MoE(spec, router_factory(router_name, top_k=1))(torch.randn(5, 16), context).isfinite().all()


def test_padding_goes_to_no_expert(router_name, make_context):
    layer = MoE(SPEC, router_factory(router_name, top_k=2))
    context = make_context(16)
    mask = torch.arange(16) % 3 == 0
    padded = RoutingContext(token_ids=context.token_ids, padding_mask=mask)
    x = torch.randn(16, 16)
    y = layer(x, padded)
    assert y[mask].abs().sum() == 0
    assert_close(y[~mask], layer(x, context)[~mask])
    assert (padded.routings[0].routing.experts_TK[mask] == -1).all()


def test_padding_is_left_out_without_looking_at_the_data():
    # What a GPU does, where filtering would wait for the device.
    experts_TK = torch.tensor([[0, 5], [5, -1], [-1, -1], [7, 2]])
    layer, x = layer_with(Routing(experts_TK, torch.rand(4, 2))), torch.randn(4, 16, requires_grad=True)
    expected = layer(x)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)(x)
    (grad,) = torch.autograd.grad(compiled.square().sum(), x)
    assert_close(compiled, expected)
    assert_close(grad, expected_grad)


@pytest.mark.parametrize("experts", [MLPExperts, SwiGLUExperts])
def test_merged_routing_is_one_expert_of_mean_parameters(experts):
    merge_GE = torch.rand(2, SPEC.num_experts)
    layer = layer_with(Routing(merge_GE=merge_GE, group_T=torch.tensor([1, -1, 0, 1])), partial(experts, bias=True))
    x_TD = torch.randn(4, 16)
    y_TD = layer(x_TD)
    single = experts(LayerSpec(16, 1), bias=True)
    for token, group in ((0, 1), (2, 0), (3, 1)):
        mixed = {n: torch.tensordot(merge_GE[group], p, 1)[None] for n, p in layer.experts.named_parameters()}
        single.load_state_dict(mixed)
        assert_close(y_TD[token], dense_forward(single, x_TD[token : token + 1], 1)[0])
    assert not y_TD[1].any()


def test_merged_routing_takes_padding_out_of_its_groups():
    context = RoutingContext(padding_mask=torch.tensor([False, True]))
    layer = layer_with(Routing(merge_GE=torch.ones(1, SPEC.num_experts), group_T=torch.tensor([0, 0])))
    layer(torch.randn(2, 16), context)
    (routing,) = context.routings_of(layer)
    assert routing.group_T.tolist() == [0, -1]
    assert routing.expert_load(SPEC.num_experts).tolist() == [1.0] * SPEC.num_experts


def test_experts_that_are_not_stacked_cannot_be_merged():
    class Shared(Experts):
        def __init__(self, spec):
            super().__init__(spec)
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x_ND, ends_E):
            return x_ND * self.weight.sum()

    layer = layer_with(Routing(merge_GE=torch.ones(1, 8), group_T=torch.tensor([0])), Shared)
    with pytest.raises(ValueError, match="first dimension of their parameters; that of weight is 3, not 8"):
        layer(torch.randn(1, 16))


def test_nothing_is_read_back_from_a_gpu(router_name, make_context):
    # Tensors that have a device and a shape but no values: whoever asks for a value fails.
    from torch._subclasses.fake_tensor import FakeTensorMode

    context = make_context(64)
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_device("cuda")
        try:
            layer = MoE(SPEC, router_factory(router_name, top_k=2), SwiGLUExperts, num_shared_experts=1)
            x_TD = torch.randn(64, 16, dtype=torch.bfloat16)
        finally:
            torch.set_default_device(None)
        for bank in (layer.experts, layer.shared_experts):
            for parameter in bank.parameters():
                parameter.data = parameter.data.bfloat16()
        for name, table in layer.router.named_buffers():
            if table.device.type == "cpu":  # some are drawn there by design
                setattr(layer.router, name, table.to("cuda"))
        padding_mask = torch.zeros(64, dtype=torch.bool, device="cuda")
        context = context.to("cuda").new_pass(padding_mask=padding_mask)
        assert layer(x_TD, context).device.type == "cuda"
        assert context.routings_of(layer)[0].expert_load(SPEC.num_experts).device.type == "cuda"


def test_a_layer_without_context_computes_nothing_for_losses():
    layer, seen = MoE(SPEC, "XMoERouter"), []
    layer.register_routing_hook(lambda published, context: seen.append(published.routing.balance_probs_TE))
    layer(torch.randn(4, 16))
    layer(torch.randn(4, 16), RoutingContext())
    assert seen[0] is None
    assert seen[1].shape == (4, SPEC.num_experts)


def test_leading_dimensions_are_kept():
    assert MoE(d_model=16, num_experts=4)(torch.randn(2, 3, 5, 16)).shape == (2, 3, 5, 16)


def test_an_idle_expert_gets_a_zero_gradient():
    layer = layer_with(Routing(torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1)))
    layer(torch.randn(4, 16)).sum().backward()
    assert layer.experts.up.grad[1:].abs().sum() == 0
    assert layer.experts.up.grad[0].abs().sum() > 0


def test_a_layer_keeps_the_dtype_under_half_precision(router_name, make_context):
    layer = MoE(SPEC, router_factory(router_name, top_k=2)).bfloat16()
    assert all(p.dtype == torch.float32 for p in layer.router.parameters())
    assert layer(torch.randn(8, 16, dtype=torch.bfloat16), make_context(8)).dtype == torch.bfloat16


def test_a_missing_requirement_is_refused_when_the_layer_is_built():
    spec = LayerSpec(16, 4, vocab_size=10, provides=frozenset({"positions"}))
    with pytest.raises(UnmetRequirementError, match="HashRouter requires token_ids, which this model does not provide"):
        MoE(spec, "HashRouter")


def test_a_decoder_refuses_a_router_that_is_not_causal():
    class Peeking(Router):
        causal = False

        def route(self, x_TD, context):
            raise NotImplementedError

    spec = LayerSpec(16, 4, decoder=True)
    with pytest.raises(NonCausalRouterError, match="Peeking is not causal"):
        MoE(spec, Peeking)
    MoE(spec, Peeking, allow_non_causal=True)


def test_experts_of_ones_own():
    class Linear(Experts):
        def __init__(self, spec):
            super().__init__(spec)
            self.weight = nn.Parameter(torch.randn(spec.num_experts, spec.d_model, spec.d_model))

        def forward(self, x_ND, ends_E):
            return grouped_linear(x_ND, self.weight, ends_E, backend=self.backend)

    layer = MoE(SPEC, "LinearRouter", Linear, num_shared_experts=1)
    assert layer(torch.randn(5, 16)).shape == (5, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "LinearRooter"}, "did you mean 'LinearRouter'"),
        ({"router": partial(routerzoo.LinearRouter, top_k=1.5)}, "top_k must be a whole number, got 1.5"),
        ({"router": partial(routerzoo.LinearRouter, top_k=9)}, "top_k must be between 1 and num_experts = 4, got 9"),
        ({"num_shared_experts": -1}, "num_shared_experts must be at least 0"),
        ({"backend": "best"}, "backend must be one of"),
        ({"experts": partial(MLPExperts, hidden_dim=0)}, "hidden_dim must be at least 1, got 0"),
        ({"experts": partial(MLPExperts, activation="swish")}, "activation must be one of"),
        ({"experts": partial(MLPExperts, dropout=1.0)}, "dropout must be at least 0 and below 1"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(options, message):
    with pytest.raises((ValueError, KeyError), match=message):
        MoE(**{"d_model": 16, "num_experts": 4, **options})


def test_hidden_states_of_another_width_are_refused(router_name):
    router = build_router(router_name)
    with pytest.raises(ValueError, match=r"takes hidden states \[tokens, 16\], got \[3, 7\]"):
        router(torch.randn(3, 7))


def test_a_context_field_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"token_ids has shape \[4\]"):
        build_router("HashRouter")(torch.randn(3, 16), RoutingContext(token_ids=torch.zeros(4, dtype=torch.int64)))


def test_activation_checkpointing_changes_nothing(router_name, make_context):
    layer = MoE(SPEC, router_factory(router_name, top_k=2))

    def gradients(checkpointed):
        layer.zero_grad()
        context = make_context(16)
        x = torch.linspace(-1, 1, 256).view(16, 16).requires_grad_()
        if checkpointed:
            y = torch.utils.checkpoint.checkpoint(layer, x, context, use_reentrant=False)
        else:
            y = layer(x, context)
        (y.square().sum() + auxiliary_loss(layer, context)).backward()
        return [x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]

    torch.manual_seed(0)
    expected = [g.clone() for g in gradients(checkpointed=False)]
    torch.manual_seed(0)
    for got, value in zip(gradients(checkpointed=True), expected, strict=True):
        assert torch.equal(got, value)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MoE(64, num_experts=8), r"the first argument of MoE is a LayerSpec, got 64: MoE\(d_model=..., num_ex"),
        (lambda: MoE(SPEC, num_experts=8), "takes a spec, or d_model and num_experts, not both"),
        (lambda: MoE(SPEC, router=3), "router is the name of one, or a function that builds one, got 3"),
        (
            lambda: MoE(d_model=4, num_experts=2, router="HashRouter"),
            r"vocab_size, .*: give LayerSpec\(vocab_size=",
        ),
    ],
)
def test_wrong_arguments_are_refused_in_a_sentence(build, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build()


def test_a_loss_that_lacks_sequences_is_named():
    layer, context = MoE(SPEC), RoutingContext()
    layer(torch.randn(4, 16), context)
    message = "the loss 'sequence_balance' of LinearRouter cannot be computed: a loss in the scope of a sequence needs"
    with pytest.raises(ValueError, match=message):
        auxiliary_loss(layer, context, {"sequence_balance": 1.0})


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # jacfwd compiles its rules so
@pytest.mark.parametrize("experts", ["MLPExperts", "SwiGLUExperts"])
def test_functions_of_a_layer_are_transformed(experts):
    layer = MoE(d_model=4, num_experts=3, num_shared_experts=1, experts=experts)
    x_BTD, parameters = torch.randn(2, 3, 4), dict(layer.named_parameters())

    def loss(parameters, x_TD):
        return torch.func.functional_call(layer, parameters, (x_TD,)).square().sum()

    expected = [torch.autograd.grad(loss(parameters, x_TD), list(parameters.values())) for x_TD in x_BTD]
    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x_BTD)
    for value, *right in zip(found.values(), *expected, strict=True):
        assert_close(value, torch.stack(right))
    by_rows = torch.autograd.functional.jacobian(layer, x_BTD[0])
    assert_close(torch.func.jacrev(layer)(x_BTD[0]), by_rows)
    assert_close(torch.func.jacfwd(layer)(x_BTD[0]), by_rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low_memory", [False, True])
def test_a_layer_takes_no_tokens(dtype, low_memory):
    layer = MoE(d_model=8, num_experts=3, num_shared_experts=1, low_memory=low_memory).to(dtype)
    x = torch.randn(0, 5, 8, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())
