"""What holds for every registered router."""

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

from routerzoo import RoutingContext
from routerzoo.registry import router_class
from tests.conftest import build_router


def same(a, b):
    assert torch.equal(a.experts_TK, b.experts_TK)
    assert torch.equal(a.weights_TK, b.weights_TK)


def test_shapes_and_dtypes(router_name, make_context):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        router = build_router(router_name, top_k=3)
        router = router.double() if dtype == torch.float64 else router
        routing = router(torch.randn(24, 16, dtype=dtype), make_context(24))
        assert routing.experts_TK.shape == routing.weights_TK.shape == (24, 3)
        assert routing.experts_TK.dtype == torch.int64
        assert routing.weights_TK.dtype == dtype
        assert ((routing.experts_TK >= 0) & (routing.experts_TK < 8)).all()
        assert (routing.weights_TK >= 0).all()


def test_choices_of_a_token_differ(router_name, make_context):
    experts_TK = build_router(router_name, top_k=4)(torch.randn(24, 16), make_context(24)).experts_TK
    assert all(len(set(row)) == 4 for row in experts_TK.tolist())


def test_weights_sum_to_one_where_declared(router_name, make_context):
    router = build_router(router_name, top_k=3)
    if router.normalized:
        weights_TK = router(torch.randn(24, 16), make_context(24)).weights_TK
        assert_close(weights_TK.sum(-1), torch.ones(24))


def test_scores_are_float32_under_autocast_and_choices_do_not_move(router_name, make_context):
    router, x_TD, context = build_router(router_name, top_k=2).eval(), torch.randn(24, 16), make_context(24)
    plain = router(x_TD, context)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x_TD, context)
    same(routing, plain)
    assert routing.logits_TE is None or routing.logits_TE.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_causal_and_batch_independent_as_declared(router_name, training, make_context):
    router = build_router(router_name, top_k=2).train(training)
    assert router.causal
    assert router.batch_independent
    x_TD, context = torch.randn(24, 16), make_context(24)
    before = router(x_TD, context)
    changed, ids = x_TD.clone(), context.token_ids.clone()
    changed[12:], ids[12:] = torch.randn(12, 16), torch.randint(40, (12,))
    after = router(changed, RoutingContext(token_ids=ids))
    assert torch.equal(after.experts_TK[:12], before.experts_TK[:12])
    assert torch.equal(after.weights_TK[:12], before.weights_TK[:12])


def test_order_of_tokens_permutes_the_answer(router_name, make_context):
    router, x_TD, context, order = build_router(router_name), torch.randn(24, 16), make_context(24), torch.randperm(24)
    routing = router(x_TD, context)
    permuted = router(x_TD[order], RoutingContext(token_ids=context.token_ids[order]))
    assert torch.equal(permuted.experts_TK, routing.experts_TK[order])


def test_state_dict_carries_all_that_decides(router_name, make_context):
    router = build_router(router_name, top_k=3).eval()
    torch.manual_seed(99)
    other = build_router(router_name).eval()
    x_TD, context = torch.randn(24, 16), make_context(24)
    other.load_state_dict(router.state_dict())
    assert other.top_k == 3
    same(other(x_TD, context), router(x_TD, context))


def test_copies_and_pickles_answer_alike(router_name, make_context):
    router, x_TD, context = build_router(router_name).eval(), torch.randn(24, 16), make_context(24)
    with torch.no_grad():
        expected = router(x_TD, context)
        same(copy.deepcopy(router)(x_TD, context), expected)
        same(pickle.loads(pickle.dumps(router))(x_TD, context), expected)


def test_frozen_tensors_stay_and_trainable_ones_learn(router_name, make_context):
    router = build_router(router_name, top_k=2)
    buffers = {name: value.clone() for name, value in router.named_buffers()}
    parameters = {name: value.detach().clone() for name, value in router.named_parameters()}
    assert router.trainable == bool(parameters)
    if not parameters:
        return
    optimizer = torch.optim.SGD(router.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        routing = router(torch.randn(24, 16), make_context(24))
        (routing.weights_TK[:, 0].sum() + sum(routing.losses.values())).backward()
        optimizer.step()
    assert all(torch.equal(value, buffers[name]) for name, value in router.named_buffers())
    assert all(not torch.equal(value, parameters[name]) for name, value in router.named_parameters())


def test_gradient_of_the_task_at_top_1_as_declared(router_name, make_context):
    router = build_router(router_name, top_k=1)
    if not router.trainable:
        return
    router(torch.randn(24, 16), make_context(24)).weights_TK.sum().backward()
    grads = [p.grad for p in router.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert bool(grads) == router.trains_at_top_1


def test_huge_tiny_and_tied_hidden_states_give_no_nan(router_name, make_context):
    router, context = build_router(router_name, top_k=2), make_context(24)
    for x_TD in (torch.randn(24, 16) * 1e15, torch.randn(24, 16) * 1e-30, torch.zeros(24, 16), torch.ones(24, 16)):
        routing = router(x_TD, context)
        assert routing.weights_TK.isfinite().all()


def test_evaluation_is_deterministic(router_name, make_context):
    router, x_TD, context = build_router(router_name).eval(), torch.randn(24, 16), make_context(24)
    same(router(x_TD, context), router(x_TD, context))


def test_the_router_compiles_whole(router_name, make_context):
    router, x_TD, context = build_router(router_name, top_k=2).eval(), torch.randn(24, 16), make_context(24)
    compiled = torch.compile(router, backend="eager", fullgraph=True)
    same(compiled(x_TD, context), router(x_TD, context))


def test_bad_top_k_is_refused_now_and_later(router_name):
    with pytest.raises(ValueError, match="top_k must be between 1 and num_experts = 8, got 9"):
        build_router(router_name, top_k=9)
    router = build_router(router_name)
    with pytest.raises(ValueError, match="got 0"):
        router.top_k = 0


def test_a_required_field_that_is_missing_is_named(router_name):
    router = build_router(router_name)
    for name in router.requires:
        with pytest.raises(ValueError, match=f"requires {name}; pass RoutingContext"):
            router(torch.randn(3, 16))


def test_every_router_says_where_it_comes_from(router_name):
    assert "arXiv" in router_class(router_name).paper
