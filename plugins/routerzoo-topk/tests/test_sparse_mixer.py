"""SparseMixerRouter by hand: the distributions that it samples from, the weights and their gradient."""

import torch
from routerzoo_topk import Gemma4Router, SparseMixerRouter
from torch.testing import assert_close

from routerzoo import LayerSpec

LOGITS = torch.tensor([1.0, 0.5, 0.2])


def router_and_inputs(num_tokens, threshold):
    router = SparseMixerRouter(LayerSpec(1, 3), top_k=2, threshold=threshold)
    router.weight.data = LOGITS.unsqueeze(1)
    return router, torch.ones(num_tokens, 1)


def test_evaluation_weights_each_choice_among_those_left():
    router, x_TD = router_and_inputs(1, threshold=0.3)
    routing = router.eval()(x_TD)
    # 0.2 is behind 1 by 0.8 of it, more than 0.6; 0.5 by 0.5. Then 0.2 is behind 0.5 by 0.6 of it.
    first, second = LOGITS[:2].softmax(-1)[0], LOGITS[1:].softmax(-1)[0]
    assert routing.experts_TK.tolist() == [[0, 1]]
    assert_close(routing.weights_TK, torch.stack([first, second]).unsqueeze(0))
    weights_TK = router.combine_weights(LOGITS.unsqueeze(0), torch.tensor([[-1, 1]]))
    assert_close(weights_TK, torch.tensor([[0.0, LOGITS[:2].softmax(-1)[1]]]))


def test_training_samples_and_passes_the_whole_gradient():
    num_tokens = 20_000
    router, x_TD = router_and_inputs(num_tokens, threshold=1.0)
    routing = router.train()(x_TD)
    first_T, weight_T = routing.experts_TK[:, 0], routing.weights_TK[:, 0]
    probs_E = LOGITS.softmax(-1)
    assert_close(first_T.bincount() / num_tokens, probs_E, rtol=0, atol=0.015)  # four standard errors
    assert (routing.experts_TK[:, 1] != first_T).all()
    assert_close(weight_T[first_T == 0].unique(), probs_E[:1])
    for expert in (1, 2):
        ours_T = weight_T[first_T == expert]
        whole_T = (ours_T - probs_E[expert]).abs() < 1e-6
        assert_close(ours_T[~whole_T], (probs_E[expert] / 3).expand(int((~whole_T).sum())))
        assert abs(whole_T.float().mean() - 0.25) < 0.04
    weight_T.sum().backward()
    logits_E = LOGITS.clone().requires_grad_()
    (logits_E.softmax(-1) * first_T.bincount()).sum().backward()
    assert_close(router.weight.grad[:, 0], logits_E.grad, rtol=1e-3, atol=0)  # sums of many float32


def test_gemma_scales_inputs_and_outputs():
    router = Gemma4Router(LayerSpec(2, 3), top_k=2, eps=0.0)
    router.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    router.input_scale.data = torch.tensor([2.0, 1.0])
    router.expert_scale.data = torch.tensor([3.0, 0.5, 1.0])
    routing = router(torch.tensor([[3.0, 4.0]]))
    # (3, 4) has a root mean square of 12.5 ** 0.5; divided by that, and by 2 ** 0.5, it is (0.6, 0.8).
    assert_close(routing.logits_TE, torch.tensor([[1.2, 0.8, -1.2]]))
    assert_close(routing.weights_TK, torch.tensor([[1.2, 0.8]]).softmax(-1) * torch.tensor([[3.0, 0.5]]))
