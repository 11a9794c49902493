"""Pure functions of routing, on plain tensors."""

from routerzoo.functional.gate import gate_linear
from routerzoo.functional.topk import (
    apply_score_fn,
    gather_weights,
    softmax_at,
    topk,
    topk_indices,
    topk_softmax,
)

__all__ = ["apply_score_fn", "gate_linear", "gather_weights", "softmax_at", "topk", "topk_indices", "topk_softmax"]
