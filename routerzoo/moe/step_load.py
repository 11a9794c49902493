"""`StepLoad`: the experts' assignments in an optimizer step so far, for balance losses of its whole batch."""
# Shape suffixes: E experts.

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from routerzoo.routing import LayerRouting


class StepLoad:
    """Assignments of each expert of a layer, over the micro-batches of an optimizer step.

    A pass counts once its gradient arrives, finite; `routerzoo.attach` clears the counts after each step.

    Attributes:
        earlier_E: assignments of the passes before this one, `[num_experts]`; None at the beginning of a step.
    """

    def __init__(self) -> None:
        self.earlier_E: Tensor | None = None
        self._followed: weakref.WeakSet[LayerRouting] = weakref.WeakSet()

    def clear(self) -> None:
        """Begin another step."""
        self.earlier_E = None

    def follow(self, published: LayerRouting, load_E: Tensor) -> None:
        """Count the assignments of a pass, once, as soon as its gradient arrives."""
        logits_TE = published.routing.for_losses.logits_TE
        if logits_TE is None or not logits_TE.requires_grad or published in self._followed:
            return
        self._followed.add(published)
        logits_TE.register_hook(self._counter(load_E))  # type: ignore[no-untyped-call]

    def _counter(self, load_E: Tensor) -> Callable[[Tensor], None]:
        uncounted = [load_E]  # a second backward pass through the same forward pass finds nothing

        @torch.no_grad()
        def add(gradient: Tensor) -> None:
            while uncounted:
                counted_E = torch.where(gradient.isfinite().all(), uncounted.pop(), 0.0)
                self.earlier_E = counted_E if self.earlier_E is None else self.earlier_E + counted_E

        return add
