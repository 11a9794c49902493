"""Selecting experts by their scores, and weighting them."""
# Shape suffixes: T tokens, E experts, K choices per token.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from routerzoo.functional.transforms import in_transform

ScoreFunction = Literal["softmax", "sigmoid", "sqrt_softplus"]

_SMALLEST_LOGIT = -80.0
"""From it downward the softplus is `exp`; where that underflows, the gradient of its root would be infinite times 0."""


def _sqrt_softplus(logits_TE: Tensor) -> Tensor:
    root_TE = F.softplus(logits_TE.clamp_min(_SMALLEST_LOGIT)).sqrt()
    return torch.where(logits_TE <= _SMALLEST_LOGIT, (0.5 * logits_TE).exp(), root_TE)


SCORE_FUNCTIONS: dict[ScoreFunction, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits_TE: logits_TE.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": _sqrt_softplus,
}
"""Each keeps the order of the logits."""


def topk(scores_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the `top_k` largest scores of each token and their experts, both `[tokens, top_k]`, best first.

    NaN counts as the largest score, so that a NaN hidden state gives NaN weights rather than a plausible choice.
    """
    if top_k == 1:
        # A reduction costs a quarter of a general top-k.
        scores_T1, experts_T1 = scores_TE.max(dim=-1, keepdim=True)
        return scores_T1, experts_T1
    scores_TK, experts_TK = scores_TE.topk(top_k, dim=-1)
    return scores_TK, experts_TK


def topk_indices(scores_TE: Tensor, top_k: int) -> Tensor:
    """Return the experts of the `top_k` largest scores, best first."""
    return topk(scores_TE, top_k)[1]


def topk_softmax(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Select the `top_k` largest logits and take the softmax over them alone.

    The same as renormalizing the selected entries of the softmax over all experts (Shazeer et al. 2017, equation 3).

    Returns:
        Weights and experts, both `[tokens, top_k]`.
    """
    selected_TK, experts_TK = topk(logits_TE, top_k)
    return selected_TK.softmax(dim=-1), experts_TK


def softmax_at(logits_TE: Tensor, experts_TK: Tensor, *, may_drop: bool = True) -> Tensor:
    """Return the softmax over the logits of given experts alone, 0 for none (-1).

    Args:
        logits_TE: logits.
        experts_TK: experts of each token.
        may_drop: whether `experts_TK` may hold -1; False saves the masking.
    """
    if not may_drop:
        return _gather(logits_TE, experts_TK).softmax(dim=-1)
    none_TK = experts_TK < 0
    # The lowest finite number instead of minus infinity: the softmax over nothing else has a NaN gradient.
    lowest = torch.finfo(logits_TE.dtype).min
    selected_TK = _gather(logits_TE, experts_TK.clamp_min(0)).masked_fill(none_TK, lowest)
    return selected_TK.softmax(dim=-1).masked_fill(none_TK, 0.0)


def gather_weights(
    scores_TE: Tensor, experts_TK: Tensor, *, renormalize: bool = False, may_drop: bool = True
) -> Tensor:
    """Return the scores of given experts, 0 for none (-1).

    Args:
        scores_TE: scores.
        experts_TK: experts of each token.
        renormalize: divide by the sum over the experts of a token.
        may_drop: whether `experts_TK` may hold -1; False saves the masking.
    """
    if may_drop:
        weights_TK = scores_TE.gather(1, experts_TK.clamp_min(0)).masked_fill(experts_TK < 0, 0.0)
    else:
        weights_TK = scores_TE.gather(1, experts_TK)
    return weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(1e-20) if renormalize else weights_TK


def _gather(logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
    keeps = logits_TE.requires_grad and torch.is_grad_enabled()
    if not keeps or torch.compiler.is_compiling() or in_transform():
        return logits_TE.gather(1, experts_TK)
    selected_TK: Tensor = _Gather.apply(logits_TE, experts_TK)
    return selected_TK


class _Gather(torch.autograd.Function):
    """`logits_TE.gather(1, experts_TK)`; torch's own keeps all logits for its gradient, of which it takes the sizes."""

    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
        ctx.save_for_backward(experts_TK)
        ctx.save_for_forward(experts_TK)
        ctx.sizes = logits_TE.shape
        return logits_TE.gather(1, experts_TK)

    @staticmethod
    def backward(ctx: Any, grad_TK: Tensor) -> tuple[Tensor, None]:
        (experts_TK,) = ctx.saved_tensors
        return grad_TK.new_zeros(ctx.sizes).scatter_add(1, experts_TK, grad_TK), None

    @staticmethod
    def jvp(ctx: Any, tangent_TE: Tensor, _: None) -> Tensor:
        (experts_TK,) = ctx.saved_tensors
        return tangent_TE.gather(1, experts_TK)


def apply_score_fn(logits_TE: Tensor, score_fn: ScoreFunction) -> Tensor:
    """Turn logits into nonnegative scores.

    Raises:
        ValueError: an unknown score function.
    """
    return SCORE_FUNCTIONS[checked_score_fn(score_fn)](logits_TE)


def checked_score_fn(score_fn: ScoreFunction) -> ScoreFunction:
    """Return the name of a score function.

    Raises:
        ValueError: an unknown one.
    """
    if score_fn not in SCORE_FUNCTIONS:
        raise ValueError(f"the score function must be one of {', '.join(get_args(ScoreFunction))}, got {score_fn!r}")
    return score_fn
