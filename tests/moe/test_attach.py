"""Routers that training moves outside the optimizer, in loops of one's own."""

import copy
import warnings

import pytest
import torch
from torch import nn

from routerzoo import HashRouter, LayerSpec, LogitRouter, MoE, RoutingContext, StableMoERouter, attach
from routerzoo.functional import gate_linear
from routerzoo.moe.layer import inner_router, moe_layers


class BiasRouter(LogitRouter):
    """Loss-free balancing (Wang et al. 2024) in its shortest form; counts the updates too."""

    paper = "for this test"
    needs_updates = True
    trained_buffers = frozenset({"selection_bias", "updates"})

    def __init__(self, spec, *, top_k=1):
        super().__init__(spec, top_k=top_k)
        self.weight = nn.Parameter(torch.eye(spec.num_experts, spec.d_model))
        self.register_buffer("selection_bias", torch.zeros(spec.num_experts))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.begun, self.seen = [], []

    def logits(self, x_TD, context):
        return gate_linear(x_TD, self.weight)

    def select_experts(self, logits_TE):
        return super().select_experts(logits_TE.detach() + self.selection_bias)

    def begin_step(self, step, total_steps):
        self.begun.append((step, total_steps))

    def statistics(self, routing, context):
        return {"load": routing.expert_load(self.spec.num_experts)}

    def update(self, statistics):
        self.seen.append(statistics["load"].tolist())
        self.selection_bias += 0.1 * torch.sign(statistics["load"].mean() - statistics["load"])
        self.updates += 1


def make(**optimizer):
    layer = MoE(d_model=4, num_experts=4, router=BiasRouter)
    return layer, torch.optim.AdamW(layer.parameters(), **optimizer)


def tokens(*experts):
    """Return hidden states that go to these experts."""
    return 5 * torch.eye(4)[list(experts)]


def step(layer, optimizer, *batches):
    for batch in batches:
        layer(batch).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_plain_loop():
    layer, optimizer = make()
    updates = attach(layer, optimizer, total_steps=9)
    step(layer, optimizer, tokens(0, 0, 0, 1))
    assert layer.router.seen == [[3, 1, 0, 0]]
    # mean load 1: the first expert has too much, the last two too little
    assert torch.allclose(layer.router.selection_bias, torch.tensor([-0.1, 0.0, 0.1, 0.1]))
    step(layer, optimizer, tokens(2))
    assert layer.router.begun == [(0, 9), (1, 9), (2, 9)]
    assert updates.step == 2


def test_gradient_accumulation_is_one_update():
    layer, optimizer = make()
    attach(layer, optimizer)
    step(layer, optimizer, tokens(0, 1), tokens(0, 2), tokens(0))
    assert layer.router.seen == [[3, 1, 1, 0]]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.LBFGS])
def test_a_closure(kind):
    layer, _ = make()
    options = {"max_iter": 3} if kind is torch.optim.LBFGS else {}
    optimizer = kind(layer.parameters(), lr=1e-3, **options)
    attach(layer, optimizer)

    def closure():
        optimizer.zero_grad()
        loss = layer(tokens(0, 3)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert layer.router.seen == [[1, 0, 0, 1]]  # of the last evaluation alone


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_gradient_scaler_skips_moves_nothing(fused):
    layer, optimizer = make(fused=fused)
    updates = attach(layer, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def scaled(batch, factor):
        scaler.scale(layer(batch).square().sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    scaled(tokens(0, 0), 1.0)
    bias = layer.router.selection_bias.clone()
    scaled(tokens(1, 1, 1), float("inf"))
    assert torch.equal(layer.router.selection_bias, bias)
    assert updates.step == 1
    scaled(tokens(2), 1.0)
    assert layer.router.seen == [[2, 0, 0, 0], [0, 0, 1, 0]]  # nothing of the skipped step


def test_a_step_that_the_loop_skips_moves_nothing():
    layer, optimizer = make()
    updates = attach(layer, optimizer)
    layer(tokens(1, 1)).square().sum().backward()  # a gradient too large, say
    optimizer.zero_grad()
    step(layer, optimizer, tokens(0))
    optimizer.step()  # without gradients
    assert layer.router.seen == [[1, 0, 0, 0]]
    assert updates.step == 1


@pytest.mark.parametrize("experts_train", [True, False])
def test_a_router_without_trained_parameters(experts_train):
    layer, optimizer = make()
    layer.router.weight.requires_grad_(False)
    layer.experts.requires_grad_(experts_train)
    before = nn.Linear(4, 4)
    nn.init.eye_(before.weight)
    optimizer = torch.optim.SGD([*before.parameters(), *layer.parameters()], lr=1e-9)
    model = nn.Sequential(before, layer)
    attach(model, optimizer)
    if experts_train:
        model(tokens(1, 1)).square().sum().backward()  # a step that the loop skips
        optimizer.zero_grad()
    step(model, optimizer, tokens(0), tokens(0, 3))
    assert layer.router.seen == [[2, 0, 0, 1]]


def test_passes_whose_gradient_is_not_used_do_not_count():
    layer, optimizer = make()
    attach(layer, optimizer)
    layer(tokens(3, 3))
    with torch.no_grad():
        layer(tokens(2, 2))
    layer.eval()
    layer(tokens(1)).square().sum().backward()
    optimizer.zero_grad()
    layer.train()
    step(layer, optimizer, tokens(0))
    assert layer.router.seen == [[1, 0, 0, 0]]


def test_a_gradient_that_is_not_finite_does_not_count():
    layer, optimizer = make(lr=0.0, weight_decay=0.0)
    attach(layer, optimizer)
    (layer(tokens(1, 1)).sum() * float("nan")).backward()
    layer(tokens(0)).sum().backward()
    optimizer.step()
    assert layer.router.seen == [[1, 0, 0, 0]]


def test_recomputation_and_padding_do_not_count():
    layer, optimizer = make()
    attach(layer, optimizer)
    x = tokens(0, 1, 1).requires_grad_()
    context = RoutingContext(padding_mask=torch.tensor([False, False, True]))
    torch.utils.checkpoint.checkpoint(layer, x, context, use_reentrant=False).square().sum().backward()
    optimizer.step()
    assert layer.router.seen == [[1, 1, 0, 0]]


def test_a_shared_layer_counts_all_its_calls():
    layer, optimizer = make()
    attach(layer, optimizer)
    (layer(tokens(0)).sum() + layer(tokens(1, 2)).sum()).backward()
    optimizer.step()
    assert layer.router.seen == [[1, 1, 1, 0]]


def test_a_frozen_router_is_not_moved():
    layer, optimizer = make()
    attach(layer, optimizer)
    layer.router.freeze()
    step(layer, optimizer, tokens(0))
    assert layer.router.seen == []


def test_removing_the_handle_ends_the_updates():
    layer, optimizer = make()
    attach(layer, optimizer).remove()
    with pytest.warns(UserWarning, match="BiasRouter must be updated once per optimizer step"):
        step(layer, optimizer, tokens(0))
    assert layer.router.seen == []


def test_several_optimizers_each_with_its_layers():
    first, second = make()[0], make()[0]
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (first, second)]
    for layer, optimizer in zip((first, second), optimizers, strict=True):
        attach(layer, optimizer)
    step(first, optimizers[0], tokens(0))
    assert (len(first.router.seen), len(second.router.seen)) == (1, 0)


def test_stages_resume_at_their_step():
    def build():
        torch.manual_seed(0)
        layer = MoE(LayerSpec(4, 4, vocab_size=6), lambda spec: StableMoERouter(spec, stage1_steps=3))
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1)

    def steps(layer, optimizer, numbers):
        for number in numbers:
            x = torch.randn(6, 4, generator=torch.Generator().manual_seed(number))
            context = RoutingContext(torch.arange(6))
            y = layer(x, context).square().sum() + sum(context.routings[0].routing.losses.values())
            y.backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, optimizer = build()
    attach(whole, optimizer, total_steps=6)
    steps(whole, optimizer, range(2))
    saved = {k: v.clone() for k, v in whole.state_dict().items()}, optimizer.state_dict()
    assert whole.router.stage == 1
    resumed, other = build()
    resumed.load_state_dict(saved[0])
    other.load_state_dict(copy.deepcopy(saved[1]))
    steps(whole, optimizer, range(2, 6))
    attach(resumed, other, total_steps=6, step=2)
    steps(resumed, other, range(2, 6))
    assert whole.router.stage == resumed.router.stage == 2
    for (name, one), two in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


def test_what_a_later_stage_freezes_stays_bit_for_bit():
    layer = MoE(LayerSpec(4, 4, vocab_size=6), lambda spec: StableMoERouter(spec, stage1_steps=1))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.5, weight_decay=0.5)
    attach(layer, optimizer)
    frozen = []
    for _ in range(4):
        context = RoutingContext(torch.arange(6))
        y = layer(torch.randn(6, 4), context).square().sum() + sum(context.routings[0].routing.losses.values())
        y.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        frozen.append(layer.router.routing_embedding.detach().clone())
    assert all(torch.equal(frozen[0], later) for later in frozen[1:])


def test_token_counts():
    def build():
        layer = MoE(LayerSpec(4, 4, layer=0, vocab_size=4), lambda spec: HashRouter(spec, table="balanced"))
        return layer, torch.optim.SGD(layer.parameters(), lr=0.1)

    layer, optimizer = build()
    attach(layer, optimizer, token_counts=torch.tensor([5, 5, 5, 5]))
    assert sorted(layer.router.table[:, 0].tolist()) == [0, 1, 2, 3]
    layer, optimizer = build()
    with pytest.warns(UserWarning, match="HashRouter fits the frequencies of token ids, which are not known"):
        attach(layer, optimizer).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(layer, optimizer, step=7)  # the table is the checkpoint's


def test_a_bias_that_was_loaded_in_16_bits_still_takes_small_steps():
    layer, _ = make()
    narrow = {n: v.bfloat16() if v.is_floating_point() else v for n, v in layer.state_dict().items()}
    narrow["router.selection_bias"].fill_(64.0)  # whose neighbors in bfloat16 are 0.25 away and more
    layer.load_state_dict(narrow, assign=True)
    attach(layer, torch.optim.SGD(layer.parameters(), lr=0.0))
    assert layer.router.selection_bias.dtype == torch.float32


def test_two_backward_passes_through_one_forward_pass_count_it_once():
    layer, optimizer = make()
    attach(layer, optimizer)
    y = layer(tokens(0, 1))
    y.sum().backward(retain_graph=True)
    y.square().sum().backward()
    optimizer.step()
    assert layer.router.seen == [[1, 1, 0, 0]]


def test_a_gradient_penalty_counts_its_pass_once():
    layer, optimizer = make()
    attach(layer, optimizer)
    x = tokens(0, 2).requires_grad_()
    (penalty,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    penalty.square().sum().backward()
    optimizer.step()
    assert layer.router.seen == [[1, 0, 1, 0]]


def test_a_layer_is_driven_once():
    layer, optimizer = make()
    updates = attach(layer, optimizer)
    with pytest.raises(ValueError, match="BiasRouter is updated already, by RouterHooks or an earlier attach"):
        attach(layer, optimizer)
    updates.remove()
    attach(layer, optimizer)


def test_a_copy_of_a_driven_layer_is_not_driven():
    layer, optimizer = make()
    attach(layer, optimizer)
    twin = copy.deepcopy(layer)
    with pytest.warns(UserWarning, match="BiasRouter must be updated once per optimizer step"):
        step(twin, torch.optim.SGD(twin.parameters(), lr=0.1), tokens(0))


def test_reentrant_checkpointing_is_announced():
    layer, _ = make()
    with pytest.warns(UserWarning, match="reentrant activation checkpointing auxiliary losses have no gradient"):
        torch.utils.checkpoint.checkpoint(layer, tokens(0).requires_grad_(), use_reentrant=True)


class ModulesToSave(nn.Module):
    """As PEFT's ModulesToSaveWrapper: a copy for each adapter beside the original."""

    def __init__(self, original, names):
        super().__init__()
        self.original_module = original
        self.modules_to_save = nn.ModuleDict({name: copy.deepcopy(original) for name in names})
        self.active_adapters, self.disable_adapters = [names[0]], False

    def forward(self, *args):
        copies, names = self.modules_to_save, self.active_adapters
        return (self.original_module if self.disable_adapters else copies[names[0]])(*args)


def test_the_active_copy_of_a_router_is_updated():
    layer, _ = make()
    layer.router = wrapper = ModulesToSave(layer.router, ["one", "two"])
    optimizer = torch.optim.AdamW(layer.parameters())
    attach(layer, optimizer)
    step(layer, optimizer, tokens(0, 0))
    assert [inner.seen for inner in wrapper.modules_to_save.values()] == [[[2, 0, 0, 0]], []]
    assert wrapper.original_module.seen == []
    wrapper.active_adapters = ["two"]
    assert inner_router(layer) is wrapper.modules_to_save["two"]
    wrapper.disable_adapters = True
    assert inner_router(layer) is wrapper.original_module
    wrapper.active_adapters, wrapper.disable_adapters = ["three"], False
    with pytest.raises(ValueError, match="the active adapter 'three' has no copy in modules_to_save, only one, two"):
        inner_router(layer)


def test_the_active_copy_of_a_layer_is_the_models():
    layer, _ = make()
    model = nn.Sequential(nn.Linear(4, 4), ModulesToSave(layer, ["one"]))
    assert list(moe_layers(model)) == [model[1].modules_to_save["one"]]


def test_a_model_without_moe_layers_is_a_warning():
    model = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="attach found no MoE layer in Linear: no router will be updated"):
        attach(model, torch.optim.SGD(model.parameters()))


def test_a_flattened_table_of_ids_is_refused():
    router = MoE(LayerSpec(8, 4, vocab_size=10), StableMoERouter).router
    router.routing_embedding = nn.Parameter(torch.zeros(0))
    with pytest.raises(ValueError, match=r"enters stage 2 with a routing_embedding of shape \[0\], of 10 token ids"):
        router.freeze_choices()
