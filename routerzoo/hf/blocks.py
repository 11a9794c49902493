"""What stands in a block of a released model where its gate and its experts were."""
# Shape suffixes: T tokens, D model width.

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import output_capturing

from routerzoo.hf.architectures import ARCHITECTURES, Architecture
from routerzoo.moe.layer import MoE, inner_router
from routerzoo.router import Router
from routerzoo.routing import Routing


class HandOn(nn.Module):
    """Stands where the gate was, and hands its input on to the layer that stands where the experts were.

    So that the rest of a block (shared experts and their gate, norms, residual paths) stays the model's own.

    Args:
        architecture: what the gate is.
        gate: the gate.
    """

    def __init__(self, architecture: Architecture, gate: nn.Module) -> None:
        super().__init__()
        self.takes_scores = architecture.takes_scores
        self.jitter: float = getattr(gate, architecture.jitter) if architecture.jitter else 0.0

    def forward(self, hidden: Tensor, *others: Any) -> tuple[Tensor, ...]:
        """Return the hidden states where the block expects logits, weights and indices."""
        if self.training and self.jitter > 0:
            hidden *= torch.empty_like(hidden).uniform_(1 - self.jitter, 1 + self.jitter)
        x_TD = hidden.reshape(-1, hidden.shape[-1])
        # One copy, times 1, instead of one for each expert.
        return (x_TD.new_ones(len(x_TD), 1), x_TD) if self.takes_scores else (x_TD, x_TD, x_TD)


class RoutedExperts(nn.Module):
    """Stands where the experts were.

    Args:
        moe: the layer.
        gate: what the class of the gate is called.
        top_k: experts per token of the model as it was released.
    """

    def __init__(self, moe: MoE, gate: str, top_k: int) -> None:
        super().__init__()
        self.moe, self.gate, self.top_k = moe, gate, top_k
        self.watch_router()

    def watch_router(self) -> None:
        """Report the logits of the router of now to transformers, as the gate would."""
        inner_router(self.moe).register_forward_hook(partial(_report, ARCHITECTURES[self.gate].reports))

    def forward(self, hidden: Tensor, indices: Tensor | None = None, router_input: Tensor | None = None) -> Tensor:
        """Compute the layer on what the experts see, routed by what the gate saw."""
        y_TD: Tensor = self.moe(hidden, router_input=router_input)
        return y_TD


def _report(what: str, router: Router, args: Any, routing: Routing) -> None:
    """Give transformers the logits of a routing, where it was asked for `output_router_logits`."""
    collector: Any = output_capturing._active_collector
    collected = None if torch.compiler.is_compiling() else collector.get()
    if collected is None or "router_logits" not in collected or what == "nothing":
        return
    if routing.logits_TE is None:
        raise ValueError(f"{type(router).__name__} has no logits: leave output_router_logits out")
    logits_TE = routing.logits_TE
    collected["router_logits"].append(logits_TE.softmax(-1) if what == "probabilities" else logits_TE)


def place_of_gate(block: nn.Module) -> str | None:
    """Return what a block calls its gate, where that is a known one; None for any other module."""
    if not hasattr(block, "experts"):
        return None
    return next((n for n in ("gate", "router") if type(getattr(block, n, None)).__name__ in ARCHITECTURES), None)
