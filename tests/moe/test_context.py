"""Contexts of models whose blocks hand on nothing but hidden states."""

import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from routerzoo import ContextHook, HashRouter, LayerSpec, MoE, RoutingContext, auxiliary_loss, provide_context
from routerzoo.models.vit import ViTMoE
from routerzoo.router import UnmetRequirementError


class Model(nn.Module):
    """Embeds token ids; its blocks take hidden states alone."""

    def __init__(self, router=HashRouter, checkpointed=False):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(
            MoE(LayerSpec(8, 4, layer=i, num_layers=2, vocab_size=20), router) for i in range(2)
        )
        self.checkpointed = checkpointed

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x))
        return x


def build(ids):
    return RoutingContext(token_ids=ids)


def test_a_with_block_hands_a_context_to_all_layers_and_takes_it_back():
    model, ids = Model(), torch.randint(20, (2, 5))
    with provide_context(model, build(ids)) as context:
        model(ids)
    assert [entry.layer for entry in context.routings] == list(model.blocks)
    with pytest.raises(ValueError, match="HashRouter requires token_ids"):
        model(ids)


def test_the_next_batch_never_finds_a_stale_context():
    model, one, other = Model(), torch.randint(20, (2, 5)), torch.randint(20, (2, 5))
    hook = ContextHook(model, build)
    first, second = model(one), model(other)
    hook.remove()
    with provide_context(model, build(other)):
        assert torch.equal(model(other), second)
    assert not torch.equal(first, second)
    hook = ContextHook(model, build)
    model(one)
    with pytest.raises(ValueError, match="HashRouter requires token_ids"):  # the pass of `one` is over
        model.blocks[0](torch.randn(2, 5, 8))


@pytest.mark.parametrize("router", [HashRouter, "LinearRouter"])
def test_recomputation_finds_the_context_of_its_pass(router):
    torch.manual_seed(0)
    plain = Model(router)
    model = Model(router, checkpointed=True)
    model.load_state_dict(plain.state_dict())
    hooks = [ContextHook(m, build) for m in (plain, model)]
    for seed in range(2):
        ids = torch.randint(20, (2, 5), generator=torch.Generator().manual_seed(seed))
        for m, hook in zip((plain, model), hooks, strict=True):
            m.zero_grad()
            loss = m(ids).square().sum() + auxiliary_loss(m, hook.context)
            loss.backward()
            assert len(hook.context.routings) == 2
        for (name, one), other in zip(plain.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad), name


def test_a_with_block_over_forward_and_backward_serves_recomputation():
    model, ids = Model(checkpointed=True), torch.randint(20, (2, 5))
    with provide_context(model, build(ids)) as context:
        model(ids).sum().backward()
    assert len(context.routings) == 2
    with provide_context(model, build(ids)):
        y = model(ids)
    with pytest.raises(ValueError, match="computes a MoE layer again whose context is gone: run the backward pass"):
        y.sum().backward()


def test_a_pass_that_needs_no_context_is_not_computed_again_without_it():
    model, ids = Model("LinearRouter", checkpointed=True), torch.randint(20, (2, 5))
    with provide_context(model, RoutingContext(padding_mask=ids > 9)):
        y = model(ids)
    with pytest.raises(ValueError, match="whose context is gone"):
        y.sum().backward()
    model(ids).sum().backward()  # has had none


def masked(ids):
    return RoutingContext(ids, padding_mask=ids > 12)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("router", [HashRouter, "LinearRouter"])
def test_each_of_two_passes_is_computed_again_with_its_own_context(router, together):
    batches, gradients = [torch.randint(20, (2, 5)) for _ in range(2)], []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = Model(router, checkpointed)
        hook = ContextHook(model, masked)
        losses = [model(ids).square().sum() for ids in batches]
        for loss in [sum(losses)] if together else losses:
            loss.backward()
        hook.remove()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 1
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_auxiliary_losses_of_two_passes_find_the_contexts_that_somebody_keeps():
    batches, gradients = [torch.randint(20, (2, 5)) for _ in range(2)], []
    for keep in (True, False):
        torch.manual_seed(0)
        model = Model("LinearRouter", checkpointed=True)
        hook, kept, losses = ContextHook(model, masked), [], []
        for ids in batches:
            model(ids)
            losses.append(auxiliary_loss(model, hook.context, {"balance": 1.0}))
            if keep:
                kept.append(hook.context)
        if keep:
            sum(losses).backward()
            hook.remove()
            gradients = [p.grad for p in model.blocks[0].router.parameters()]
        else:
            with pytest.raises(ValueError, match="whose context is gone"):
                sum(losses).backward()
    torch.manual_seed(0)
    model = Model("LinearRouter")
    hook, expected = ContextHook(model, masked), 0.0
    for ids in batches:
        model(ids)
        expected = expected + auxiliary_loss(model, hook.context, {"balance": 1.0})
    expected.backward()
    for one, other in zip(gradients, model.blocks[0].router.parameters(), strict=True):
        assert torch.equal(one, other.grad)


def test_a_pass_that_was_forgotten_is_freed():
    model, ids = Model("LinearRouter"), torch.randint(20, (2, 5))
    hook, contexts = ContextHook(model, build), []
    gc.disable()  # nothing waits for the collector of cycles
    try:
        for _ in range(3):
            model(ids)
            contexts.append(weakref.ref(hook.context))
    finally:
        gc.enable()
    assert [context() is None for context in contexts] == [True, True, False]


def test_two_passes_of_a_checkpointed_vision_transformer_before_one_backward():
    arguments = {"patch_size": 7, "embed_dim": 24, "depth": 2, "num_heads": 2}
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = ViTMoE(
            "vit_tiny_patch16_224",
            10,
            partial(HashRouter, table="random"),
            num_experts=4,
            moe_blocks="all",
            image_size=14,
            in_channels=1,
            backbone_arguments=arguments,
            patch_ids="lsh",
            activation_checkpointing=checkpointed,
        )
        images = torch.randn(2, 3, 1, 14, 14, generator=torch.Generator().manual_seed(1))
        losses = [model(batch)[0].square().sum() for batch in images]
        sum(losses).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_a_model_that_provides_nothing_refuses_a_router_that_requires_something():
    with pytest.raises(UnmetRequirementError, match="requires token_ids"):
        MoE(LayerSpec(8, 4, layer=0, vocab_size=4, provides=frozenset()), "HashRouter")
