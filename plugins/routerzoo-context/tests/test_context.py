"""Routers that look beyond a token's hidden state: conformance, numbers by hand, and several layers together."""

import copy
from functools import partial

import pytest
import torch
from routerzoo_context import (
    AttentionRouter,
    OmniRouter,
    RMoERouter,
    SimilarityRouter,
    TaskRouter,
    ThorRouter,
    VQMoERouter,
    YuanRouter,
)
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from routerzoo import LanguageModeling, LayerSpec, MLPExperts, MoE, RoutingContext, auxiliary_loss
from routerzoo.functional.losses import balance_loss
from routerzoo.models.decoder import Decoder
from routerzoo.models.vit import ViTMoE
from routerzoo.moe.auxiliary_loss import loss_of
from routerzoo.moe.layer import NonCausalRouterError, moe_layers
from routerzoo.router import UnmetRequirementError
from routerzoo.routers.logit_scale import initial_logit_stds, match_logit_std
from routerzoo.testing import check_router

VARIANTS = {
    "Omni": OmniRouter,
    "RMoE": partial(RMoERouter, recurrent_dim=8),
    "Yuan": YuanRouter,
    "similarity": SimilarityRouter,
    "similarity, both ways": partial(SimilarityRouter, causal=False),
    "attention": AttentionRouter,
    "attention, both ways": partial(AttentionRouter, causal=False),
    "task": partial(TaskRouter, task_dim=8),
    "task, Gumbel noise": partial(TaskRouter, task_dim=8, selection="gumbel"),
    "task, straight through": partial(TaskRouter, task_dim=8, selection="straight-through"),
    "VQMoE": VQMoERouter,
    "VQMoE, more codes": partial(VQMoERouter, codes_per_expert=3),
    "THOR": ThorRouter,
    "THOR, ensemble": partial(ThorRouter, evaluate="ensemble"),
}


# The first variant of each router; the full tier has all.
FIRST = {getattr(router, "func", router): name for name, router in reversed(VARIANTS.items())}.values()


@pytest.mark.parametrize("variant", FIRST)
def test_each_router(variant):
    check_router(VARIANTS[variant])


@pytest.mark.full
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(variant):
    check_router(VARIANTS[variant], examples=8)


def layers(router, **arguments):
    return [router(LayerSpec(8, 4, layer=layer, num_layers=3), **arguments) for layer in range(3)]


def decoder(router, **options):
    sizes = {"num_experts": 4, "d_model": 16, "num_blocks": 3, "num_heads": 2, "max_length": 16}
    return Decoder(40, router, **sizes, **options)


def test_omni_has_one_gate_for_all_layers():
    torch.manual_seed(0)
    routers, context = layers(OmniRouter, top_k=2), RoutingContext()
    assert [len(list(router.parameters())) for router in routers] == [1, 0, 0]
    inputs = [torch.randn(5, 8) for _ in range(3)]
    routings = [router(x, context) for router, x in zip(routers, inputs, strict=True)]
    for x, routing in zip(inputs, routings, strict=True):
        assert_close(routing.logits_TE, x @ routers[0].weight.T)
        assert_close(
            loss_of("balance", routing, context), balance_loss(routing.logits_TE.softmax(-1), routing.experts_TK)
        )
    sum(routing.weights_TK.sum() for routing in routings).backward()
    assert routers[0].weight.grad.abs().sum() > 0


def test_omni_says_what_is_missing():
    first, second, _ = layers(OmniRouter)
    with pytest.raises(ValueError, match="MoE layer 1 uses the gate of layer 0: run that one before"):
        second(torch.randn(2, 8))
    context = RoutingContext()
    first(torch.randn(2, 8), context)
    wider = OmniRouter(LayerSpec(8, 6, layer=1, num_layers=3))
    with pytest.raises(ValueError, match="layer 0's gate is for 4 experts and d_model 8, layer 1 has 6 and 8"):
        wider(torch.randn(2, 8), context)


def test_rmoe_carries_the_state_through_one_cell():
    torch.manual_seed(0)
    routers, context = layers(RMoERouter, recurrent_dim=6), RoutingContext()
    cell = torch.nn.GRUCell(6, 6)
    weights = {
        "weight_ih": routers[0].input_cell.weight,
        "bias_ih": routers[0].input_cell.bias,
        "weight_hh": routers[1].state_cell.weight,
        "bias_hh": routers[0].state_bias,
    }
    cell.load_state_dict(weights)
    assert len(list(routers[2].parameters())) == 2  # its own maps alone
    inputs, state = [torch.randn(5, 8) for _ in range(3)], torch.zeros(5, 6)
    for router, x in zip(routers, inputs, strict=True):
        state = cell(x @ router.down.T, state)
        assert_close(router(x, context).logits_TE, state @ router.up.T)
    with pytest.raises(ValueError, match="MoE layer 2 continues from layer 1: run that one before"):
        routers[2](inputs[2])


@pytest.mark.parametrize("router", [OmniRouter, partial(RMoERouter, recurrent_dim=8)])
def test_layers_that_share_state_start_from_the_same_scale(router):
    torch.manual_seed(0)
    routers = [router(LayerSpec(8, 4, layer=layer, num_layers=3)) for layer in range(3)]
    match_logit_std(routers, 0.5)
    assert initial_logit_stds(routers) == pytest.approx([0.5] * 3, rel=0.05)
    sizes = {"d_model": 16, "num_blocks": 3, "num_heads": 2, "num_experts": 4, "max_length": 8}
    task = LanguageModeling(**sizes, router=router, initial_logit_std=0.5)
    assert initial_logit_stds(layer.router for layer in moe_layers(task)) == pytest.approx([0.5] * 3, rel=0.05)


def moe(router, layer, **arguments):
    spec = LayerSpec(8, 4, layer=layer, num_layers=3)
    return MoE(spec, partial(router, **arguments), partial(MLPExperts, hidden_dim=4))


def test_omni_is_right_on_a_shared_layer():
    torch.manual_seed(0)
    shared, context, x = moe(OmniRouter, 0), RoutingContext(), torch.randn(5, 8)
    shared(shared(x, context), context)
    first, second = context.routings_of(shared)
    assert_close(first.logits_TE, x @ shared.router.weight.T)
    assert not torch.equal(first.logits_TE, second.logits_TE)


def test_omni_refuses_two_gates():
    first = moe(OmniRouter, 0)
    context, second = RoutingContext(), copy.deepcopy(first)
    first(torch.randn(5, 8), context)
    with pytest.raises(ValueError, match="two OmniRouters of one forward pass say that they are in MoE layer 0"):
        second(torch.randn(5, 8), context)
    second(torch.randn(5, 8), context.new_pass())


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("layer", [0, 1])
def test_rmoe_refuses_a_second_state_of_one_layer(copied, layer):
    torch.manual_seed(0)
    layers = [moe(RMoERouter, index, recurrent_dim=6) for index in range(layer + 1)]
    context, x = RoutingContext(), torch.randn(5, 8)
    for each in layers:
        each(x, context)
    again = copy.deepcopy(layers[-1]) if copied else layers[-1]
    state = context.carry[RMoERouter, layer].state_TR
    with pytest.raises(ValueError, match=f"RMoERouter of MoE layer {layer} has routed before in this forward pass"):
        again(x, context)
    assert context.carry[RMoERouter, layer].state_TR is state


@pytest.mark.parametrize("router", [OmniRouter, RMoERouter])
def test_layers_without_numbers_are_refused(router):
    with pytest.raises(UnmetRequirementError, match=f"{router.__name__} requires layer"):
        MoE(d_model=8, num_experts=4, router=router)


def test_rmoe_balances_as_its_release_does():
    torch.manual_seed(0)
    model = nn.ModuleList(moe(RMoERouter, layer, recurrent_dim=6, top_k=3) for layer in range(3))
    context = RoutingContext()
    for layer in model:
        nn.init.normal_(layer.router.up)
        layer(torch.randn(7, 8), context)
    # transformers' load_balancing_loss_func: the tokens of all layers together, each with k assignments.
    logits = torch.cat([published.routing.logits_TE for published in context.routings])
    experts = torch.cat([published.routing.experts_TK for published in context.routings])
    assignments = nn.functional.one_hot(experts, 4).float().mean(0).sum(0)
    expected = 1e-3 * 4 * (assignments * logits.softmax(-1).mean(0)).sum()
    assert_close(auxiliary_loss(model, context), expected)


def gradients_of(layers, x, segments):
    """Gradients where each segment of layers is recomputed, or none is."""
    context = RoutingContext()

    def run(x, *chosen):
        for layer in chosen:
            x = x + layer(x, context)
        return x

    for segment in segments or [layers]:
        x = checkpoint(run, x, *segment, use_reentrant=False) if segments else run(x, *segment)
    loss = x.square().mean() + sum(p.routing.logits_TE.square().mean() for p in context.routings)
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    return torch.autograd.grad(loss, parameters, retain_graph=True), torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("router", [OmniRouter, partial(RMoERouter, recurrent_dim=8)])
def test_recomputed_segments_find_their_states(router):
    torch.manual_seed(0)
    layers, x = [moe(router, layer) for layer in range(3)], torch.randn(5, 8)
    expected, _ = gradients_of(layers, x, [])
    for segments in ([[layer] for layer in layers], [layers[:2], layers[2:]], [layers[:1], layers[1:]], [layers]):
        for gradients in gradients_of(layers, x, segments):
            for found, plain in zip(gradients, expected, strict=True):
                assert_close(found, plain)


@pytest.mark.parametrize("router", [OmniRouter, partial(RMoERouter, recurrent_dim=8)])
def test_activation_checkpointing_gives_the_same_gradients(router):
    torch.manual_seed(0)
    model = decoder(router).train()
    ids = torch.randint(40, (2, 8))

    def gradients(checkpointing):
        model.activation_checkpointing = checkpointing
        model.zero_grad()
        logits, context = model(ids)
        (logits.square().mean() + auxiliary_loss(model, context, {"balance": 1.0})).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain, again = gradients(False), gradients(True)
    for name, gradient in plain.items():
        assert_close(again[name], gradient, msg=name)


def test_yuan_by_hand():
    router = YuanRouter(LayerSpec(1, 2), top_k=1)
    router.weight.data = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]])
    # q = 1, 2; k = 3, 4; v = 5, 6: rows of q k^T are 3, 4 and 6, 8.
    expected = torch.stack([torch.tensor([3.0, 4.0]).softmax(0), torch.tensor([6.0, 8.0]).softmax(0)]) @ torch.tensor(
        [5.0, 6.0]
    )
    routing = router(torch.ones(1, 1))
    assert_close(routing.logits_TE[0], expected)
    assert routing.experts_TK.tolist() == [[1]]


def test_similarity_averages_what_came_before():
    torch.manual_seed(0)
    router = SimilarityRouter(LayerSpec(4, 3), temperature=0.5)
    x_TD = torch.randn(5, 4)
    context = RoutingContext(sequence_ids=torch.tensor([0, 0, 0, 1, 1]))
    logits_TE = router(x_TD, context).logits_TE
    for sequence in (slice(0, 3), slice(3, 5)):
        x = x_TD[sequence]
        likeness = (x @ x.T / (0.5 * 4**0.5)).masked_fill(~torch.ones(len(x), len(x)).tril().bool(), -torch.inf)
        assert_close(logits_TE[sequence], likeness.softmax(-1) @ (x @ router.weight.T))
    with pytest.raises(NonCausalRouterError, match="SimilarityRouter with causal=True"):
        MoE(LayerSpec(4, 3, decoder=True), partial(SimilarityRouter, causal=False))


@pytest.mark.parametrize(
    "router",
    [OmniRouter, partial(RMoERouter, recurrent_dim=8), YuanRouter, SimilarityRouter, AttentionRouter, VQMoERouter],
)
def test_generation_routes_as_the_whole_sequence_does(router):
    torch.manual_seed(0)
    model = decoder(router).eval()
    for layer in moe_layers(model):
        layer.router.scale_initial_logits(30.0)
    ids = torch.randint(40, (2, 4))
    stream = model.stream(ids, temperature=0.0)
    for _ in range(8):
        expected = model(ids)[0][:, -1].argmax(-1)
        token = next(stream)
        assert torch.equal(token, expected)
        ids = torch.cat([ids, token.unsqueeze(1)], 1)


def test_attention_averages_what_a_token_attends_to():
    torch.manual_seed(0)
    router, x_TD = AttentionRouter(LayerSpec(4, 3)), torch.randn(5, 4)
    attention = torch.rand(5, 2, 3).softmax(-1)
    context = RoutingContext(
        attention=attention, positions=torch.tensor([0, 1, 2, 0, 1]), sequence_ids=torch.tensor([0, 0, 0, 1, 1])
    )
    logits_TE, own_TE = router(x_TD, context).logits_TE, x_TD @ router.weight.T
    assert_close(logits_TE[0], own_TE[0])  # there is nothing earlier
    mixing = attention[2].mean(0)
    assert_close(logits_TE[2], mixing @ own_TE[:3])
    mixing = attention[4].mean(0)[:2]
    assert_close(logits_TE[4], mixing @ own_TE[3:] / mixing.sum())
    with pytest.raises(NonCausalRouterError, match="AttentionRouter with causal=True"):
        MoE(LayerSpec(4, 3, decoder=True), partial(AttentionRouter, causal=False))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_decoder_shows_its_attention(checkpointing):
    torch.manual_seed(0)
    model = decoder(AttentionRouter, activation_checkpointing=checkpointing).train()
    seen = {}

    def see(router, inputs, routing):
        seen.setdefault(router.spec.layer, inputs[1].attention)

    for layer in moe_layers(model):
        layer.router.register_forward_hook(see)
    model(torch.randint(40, (2, 8)))[0].sum().backward()
    for attention in seen.values():
        assert attention.shape == (16, 2, 8)
        assert_close(attention.sum(-1), torch.ones(16, 2))
        assert (attention.view(2, 8, 2, 8).transpose(1, 2).triu(1) == 0).all()
    assert not torch.equal(seen[0], seen[1])  # each layer has that of its own block
    without = decoder(YuanRouter)
    assert without(torch.randint(40, (2, 8)))[1].attention is None


def test_timm_shows_its_attention():
    torch.manual_seed(0)
    sizes = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    options = {"num_experts": 4, "moe_blocks": "all", "image_size": 16, "backbone_arguments": sizes}
    net = ViTMoE("vit_tiny_patch16_224", 3, partial(AttentionRouter, causal=False), **options).eval()
    images, seen = torch.randn(2, 3, 16, 16), []
    hooks = [
        layer.router.register_forward_hook(lambda router, inputs, routing: seen.append(inputs[1].attention))
        for layer in moe_layers(net)
    ]
    logits, _ = net(images)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 2
    assert all(attention.shape == (2 * 5, 2, 5) for attention in seen)
    assert_close(seen[0].sum(-1), torch.ones(10, 2))
    twin = copy.deepcopy(net)
    for parameter in net.parameters():
        parameter.data.zero_()
    assert torch.equal(twin(images)[0], logits)  # a copy looks at its own attention
    other = ViTMoE("vit_tiny_patch16_224", 3, YuanRouter, **options)
    assert not isinstance(other.vit.blocks[0].attn.attn_drop, type(net.vit.blocks[0].attn.attn_drop))


def test_a_task_has_its_experts():
    torch.manual_seed(0)
    router = TaskRouter(LayerSpec(4, 6, num_tasks=2), top_k=2)
    tasks = torch.tensor([0, 1, 0])
    routing = router(torch.randn(3, 4), RoutingContext(task_ids=tasks))
    network = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 6))
    own = (router.hidden, router.hidden_bias, router.up, router.up_bias)
    network.load_state_dict(dict(zip(network.state_dict(), own, strict=True)))
    expected = network(router.task_embedding) / 5.0
    assert_close(routing.logits_TE, expected[tasks])
    assert torch.equal(routing.experts_TK[0], routing.experts_TK[2])
    with pytest.raises(UnmetRequirementError, match="num_tasks"):
        TaskRouter(LayerSpec(4, 6))
    with pytest.raises(UnmetRequirementError, match="task_ids"):
        decoder(TaskRouter)


def test_a_tasks_softmax_is_the_releases_where_all_experts_are_selected():
    torch.manual_seed(0)
    router = TaskRouter(LayerSpec(4, 6, num_tasks=2), top_k=6, init_std=1.0)
    routing = router(torch.randn(2, 4), RoutingContext(task_ids=torch.arange(2)))
    weights_TE = torch.zeros(2, 6).scatter(1, routing.experts_TK, routing.weights_TK)
    assert_close(weights_TE, routing.logits_TE.softmax(-1))


@pytest.mark.parametrize(("selection", "hard"), [("gumbel", False), ("straight-through", True)])
def test_a_tasks_noisy_selections_are_torchs(selection, hard):
    torch.manual_seed(0)
    router = TaskRouter(LayerSpec(4, 6, num_tasks=2), top_k=6, selection=selection, temperature=2.0, init_std=1.0)
    context, probe = RoutingContext(task_ids=torch.arange(2)), torch.randn(2, 6)
    with torch.no_grad():
        logits_QE = router.eval()(torch.randn(2, 4), context).logits_TE * 2.0
    logits_QE.requires_grad_()
    torch.manual_seed(1)
    expected = nn.functional.gumbel_softmax(logits_QE, tau=2.0, hard=hard)
    (expected_gradient,) = torch.autograd.grad((expected * probe).sum(), logits_QE)
    torch.manual_seed(1)
    routing = router.train()(torch.zeros(2, 4), context)
    weights_TE = torch.zeros(2, 6).scatter(1, routing.experts_TK, routing.weights_TK)
    assert_close(weights_TE, expected.detach())
    (gradient,) = torch.autograd.grad((weights_TE * probe).sum(), router.up_bias)
    assert_close(gradient, expected_gradient.sum(0))


def test_a_decoder_is_told_the_task():
    torch.manual_seed(0)
    model = decoder(TaskRouter, num_tasks=2).eval()
    ids = torch.randint(40, (1, 8)).expand(2, -1)
    context = model(ids, task_ids_B=torch.tensor([0, 1]))[1]
    first, second = context.routings[0].routing.logits_TE.split(8)
    assert not torch.equal(first, second)
    assert torch.equal(model(ids)[1].routings[0].routing.logits_TE, torch.cat([first, first]))  # the first by default


def test_vqmoe_by_hand():
    torch.manual_seed(0)
    router = VQMoERouter(LayerSpec(4, 3), top_k=1, codes_per_expert=2)
    nn.init.normal_(router.codebook)
    nn.init.normal_(router.branch_bias)
    x_TD = torch.randn(7, 4)
    routing = router(x_TD)
    code = torch.cdist(x_TD, router.codebook).argmin(-1)
    gate = (x_TD @ router.weight.T).argmax(-1)
    branch = (x_TD @ router.branches.T + router.branch_bias).softmax(-1)
    for token in range(7):
        expected = torch.zeros(3)
        expected[gate[token]] += branch[token, 0]
        expected[code[token] % 3] += branch[token, 1]
        got = torch.zeros(4).index_add(0, routing.experts_TK[token] % 4, routing.weights_TK[token])
        assert_close(got[:3], expected.detach(), check_device=False)
    distance = (router.codebook[code] - x_TD).square().mean()
    assert_close(routing.losses["codebook"], distance)
    assert_close(routing.losses["commitment"], distance)
    (gradient,) = torch.autograd.grad(routing.losses["codebook"], router.codebook)
    assert_close(
        gradient[code[0]], 2 * (router.codebook[code[0]] * (code == code[0]).sum() - x_TD[code == code[0]].sum(0)) / 28
    )


@pytest.mark.parametrize("num_experts", [16, 64])
def test_vqmoes_codes_start_with_even_loads(num_experts):
    torch.manual_seed(0)
    codebook_CD, x_TD = VQMoERouter(LayerSpec(256, num_experts)).codebook.detach(), torch.randn(20000, 256)
    load_C = torch.bincount(torch.cdist(x_TD, codebook_CD).argmin(-1), minlength=num_experts)
    assert load_C.max() < 1.5 * load_C.float().mean()  # with codes N(0, 1): 6 and 8 times


def test_vqmoe_balances_its_gate():
    torch.manual_seed(0)
    router, context = VQMoERouter(LayerSpec(4, 3), top_k=2), RoutingContext()
    routing = router(torch.randn(7, 4), context)
    gate = routing.logits_TE.topk(2).indices
    assert_close(loss_of("balance", routing, context), balance_loss(routing.logits_TE.softmax(-1), gate))


@pytest.mark.parametrize("router", [OmniRouter, RMoERouter, YuanRouter, SimilarityRouter, VQMoERouter])
def test_bfloat16_hidden_states_are_routed_as_their_values_in_float32(router):
    torch.manual_seed(0)
    router, x = router(LayerSpec(16, 8, layer=0)), torch.randn(9, 16).bfloat16()
    ids = torch.zeros(9, dtype=torch.int64)
    narrow, wide = (router(values, RoutingContext(sequence_ids=ids)) for values in (x, x.float()))
    assert narrow.weights_TK.dtype == torch.bfloat16
    assert torch.equal(narrow.logits_TE, wide.logits_TE)
    assert torch.equal(narrow.experts_TK, wide.experts_TK)


def test_thor_draws_one_expert_a_pass():
    router = ThorRouter(LayerSpec(4, 5)).train()
    context = RoutingContext(positions=torch.arange(6))
    drawn = [router(torch.randn(6, 4), context).experts_TK for _ in range(200)]
    assert all(len(set(experts.flatten().tolist())) == 1 for experts in drawn)
    counts = torch.bincount(torch.tensor([int(experts[0]) for experts in drawn]), minlength=5)
    assert (counts > 20).all()
    mean = ThorRouter(LayerSpec(4, 5), evaluate="ensemble").eval()(torch.randn(6, 4), context)
    assert_close(mean.weights_TK, torch.full((6, 5), 0.2))


@pytest.mark.parametrize(
    ("router", "arguments", "message"),
    [
        (RMoERouter, {"recurrent_dim": 0}, "recurrent_dim must be at least 1, got 0"),
        (SimilarityRouter, {"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        (TaskRouter, {"task_dim": 0}, "task_dim must be at least 1, got 0"),
        (TaskRouter, {"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        (TaskRouter, {"selection": "top-k"}, "selection must be one of softmax, gumbel, straight-through, got 'top-k'"),
        (VQMoERouter, {"codes_per_expert": 0}, "codes_per_expert must be at least 1, got 0"),
        (ThorRouter, {"evaluate": "none"}, "evaluate must be sampled or ensemble, got 'none'"),
    ],
)
def test_bad_arguments(router, arguments, message):
    with pytest.raises(ValueError, match=message):
        router(LayerSpec(8, 8), **arguments)
