"""Choosing experts from scores: what top-k routers share."""
# Shape suffixes: T tokens, E experts, K choices per token.

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

ScoreFunction = Literal["softmax", "sigmoid"]


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


def topk_softmax(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose the `top_k` largest logits and take the softmax over them alone.

    The same as renormalising the selected entries of the softmax over all experts (Shazeer et al. 2017, equation 3).

    Returns:
        Weights and experts, both `[tokens, top_k]`.
    """
    selected_TK, experts_TK = topk(logits_TE, top_k)
    return selected_TK.softmax(dim=-1), experts_TK


def topk_indices(logits_TE: Tensor, top_k: int) -> Tensor:
    """Return the experts of the `top_k` largest logits, best first: what most routers' `select_experts` is."""
    return topk(logits_TE, top_k)[1]


def softmax_at(logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """Return the softmax over the logits of given experts alone, 0 for none (-1)."""
    none_TK = experts_TK < 0
    # Not minus infinity, whose softmax over nothing else would have a gradient that is no number.
    lowest = torch.finfo(logits_TE.dtype).min
    selected_TK = logits_TE.gather(1, experts_TK.clamp_min(0)).masked_fill(none_TK, lowest)
    return selected_TK.softmax(dim=-1).masked_fill(none_TK, 0.0)


def gather_weights(scores_TE: Tensor, experts_TK: Tensor, *, renormalize: bool = False) -> Tensor:
    """Return the scores of given experts, 0 for none (-1), divided by their sum if so wished."""
    weights_TK = scores_TE.gather(1, experts_TK.clamp_min(0)).masked_fill(experts_TK < 0, 0.0)
    return weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(1e-20) if renormalize else weights_TK


def score(logits_TE: Tensor, function: ScoreFunction) -> Tensor:
    """Turn logits into scores in [0, 1].

    Raises:
        ValueError: a function of another name.
    """
    if function == "softmax":
        return logits_TE.softmax(dim=-1)
    if function == "sigmoid":
        return torch.sigmoid(logits_TE)
    raise ValueError(f"score function must be softmax or sigmoid, got {function!r}")
