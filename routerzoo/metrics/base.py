"""`RoutingMetric`: what the metrics of routing have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torchmetrics import Metric


class RoutingMetric(Metric):
    """A torchmetrics `Metric` whose sums are float64, and that draws a result or several.

    Only `set_dtype` changes the dtype of its sums: under torchmetrics, `model.to(torch.bfloat16)` does so too, in which
    a count stops at 256. On MPS, which has no float64, they are float32.
    """

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update: bool | None = False
    shown: ClassVar[tuple[str, ...]] = ()
    """Entries of a result that are drawn."""
    unit: ClassVar[str] = ""
    """What the drawn numbers are."""

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Self:
        converts = self._dtype_convert

        def move(state: Tensor) -> Tensor:
            target = fn(state.new_empty(0))
            dtype = target.dtype if converts and state.is_floating_point() else state.dtype
            if target.device.type == "mps" and dtype == torch.float64:
                dtype = torch.float32
            return state.to(target.device, dtype)

        return super()._apply(move, exclude_state)  # type: ignore[return-value]

    def _add(self, **values: Tensor) -> None:
        """Add to sums, in their dtype, and not in place: what inference mode has reset could not be written to."""
        for name, value in values.items():
            total: Tensor = getattr(self, name)
            setattr(self, name, total + value.detach().to(total.dtype))

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw a result, or the curves of several.

        Args:
            val: a result of `forward` or `compute`, or a list of these; by default the current result.
            ax: axes to draw into.

        Returns:
            Figure and axes.

        Raises:
            ValueError: an empty list.
        """
        val = self.compute() if val is None else val
        if not isinstance(val, (list, tuple)):
            return self._draw(val, ax)
        if not val:
            raise ValueError(f"{type(self).__name__} has no result to draw: the list is empty")
        return self._draw_several(val, ax)

    def _numbers(self, result: Any) -> dict[str, Tensor]:
        return {name: result[name] for name in self.shown}

    def _draw(self, result: Any, ax: Any) -> Any:
        from routerzoo.metrics.figures import bars

        bounds = (self.plot_lower_bound, self.plot_upper_bound)
        return bars(self._numbers(result), ax, ylabel=self.unit, bounds=bounds)

    def _draw_several(self, results: Sequence[Any], ax: Any) -> Any:
        from routerzoo.metrics.figures import new_axes

        ax = new_axes(ax, (6, 3.5))
        self._plot([self._numbers(result) for result in results], ax)
        ax.set(ylabel=self.unit)
        return ax.figure, ax
