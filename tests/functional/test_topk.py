import pytest
import torch

from routerzoo.functional.topk import softmax_at


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # torch's own, forward mode
@pytest.mark.parametrize("may_drop", [False, True])
def test_the_softmax_over_selected_logits(may_drop):
    logits_TE = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    experts_TK = torch.tensor([[0, -1, 5], [-1, -1, -1], [3, 2, 0]]) if may_drop else logits_TE.topk(3).indices
    selected = softmax_at(logits_TE, experts_TK, may_drop=may_drop)
    for weights_K, logits_E, experts_K in zip(selected, logits_TE.tolist(), experts_TK.tolist(), strict=True):
        scales = [0.0 if expert < 0 else torch.tensor(logits_E[expert]).exp().item() for expert in experts_K]
        expected = [scale / max(sum(scales), 1e-9) for scale in scales]
        assert weights_K.tolist() == pytest.approx(expected, rel=1e-6)

    def compute(logits_TE):
        return softmax_at(logits_TE, experts_TK, may_drop=may_drop)

    assert torch.autograd.gradcheck(compute, logits_TE, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(compute, logits_TE, check_fwd_over_rev=True)


def test_it_keeps_no_logits():
    logits_TE, kept = torch.randn(4, 1000, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda _: None):
        softmax_at(logits_TE, torch.tensor([[0, 1]] * 4), may_drop=False)
    assert max(kept) == 8
