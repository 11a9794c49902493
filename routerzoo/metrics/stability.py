"""How routing changes over training: metrics on a fixed set of tokens, at a fixed k."""
# Shape suffixes: T tokens, E experts, R records over training.

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from torchmetrics import Metric

from routerzoo.metrics.sets import expert_sets
from routerzoo.routing import Routing


class _SetOverlap(Metric):
    """Compares two routings of the same tokens."""

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    tokens: Tensor

    def __init__(self, num_experts: int, **options: Any) -> None:
        super().__init__(**options)
        self.num_experts = num_experts
        self.add_state("tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _sets(self, one: Routing, other: Routing) -> tuple[Tensor, Tensor]:
        """Return both routings' expert sets, bool `[T, E]`, of the tokens that have an expert in either."""
        one_TE, other_TE = expert_sets(one, self.num_experts), expert_sets(other, self.num_experts)
        if one_TE.shape != other_TE.shape:
            raise ValueError(f"the routings are of {len(one_TE)} and {len(other_TE)} tokens; both must be of the same")
        real_T = one_TE.any(1) | other_TE.any(1)
        return one_TE[real_T], other_TE[real_T]


@final
class RoutingFluctuation(_SetOverlap):
    """Compares the routing of the same tokens at two checkpoints.

    - `fluctuation`: share of a token's experts that differ, `1 - |A and B| / max(|A|, |B|)`, averaged over tokens.
    - `changed_tokens`: share of the tokens whose set of experts differs (X-MoE's RF ratio, arXiv:2204.09179, at k = 1,
      where both are equal).

    Sets are compared: swapping the first and the second choice is no change. A hash router's fluctuation is 0 by
    construction; a frozen gate's is not, since hidden states change.

    Args:
        num_experts: experts of the layer.
        options: further arguments of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric, weights_TK = RoutingFluctuation(num_experts=4), torch.full((2, 2), 0.5)
        >>> before, after = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 0], [2, 1]])
        >>> metric.update(Routing(before, weights_TK), Routing(after, weights_TK))
        >>> metric.compute()["fluctuation"]
        tensor(0.2500)
    """

    replaced: Tensor
    changed: Tensor

    def __init__(self, num_experts: int, **options: Any) -> None:
        super().__init__(num_experts, **options)
        for name in ("replaced", "changed"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, before: Routing, after: Routing) -> None:
        """Add tokens, as routed at both checkpoints.

        Raises:
            ValueError: routings of different numbers of tokens, soft or merged ones, or ones over another number of
                experts.
        """
        a_TE, b_TE = self._sets(before, after)
        largest_T = torch.maximum(a_TE.sum(1), b_TE.sum(1))
        self.replaced = self.replaced + (1 - (a_TE & b_TE).sum(1) / largest_T).sum()
        self.changed = self.changed + (a_TE != b_TE).any(1).sum()
        self.tokens = self.tokens + len(a_TE)

    def compute(self) -> dict[str, Tensor]:
        """Return the means; NaN without any token."""
        return {
            "fluctuation": (self.replaced / self.tokens).float(),
            "changed_tokens": (self.changed / self.tokens).float(),
        }

    def plot(self, val: dict[str, Tensor] | None = None, ax: Any = None) -> Any:
        """Draw both, by default those computed, as bars; return figure and axes."""
        from routerzoo.metrics.figures import bars

        return bars(self.compute() if val is None else val, ax, ylabel="share")


@final
class RouterSaturation(_SetOverlap):
    """Share of the final experts that a checkpoint selects already (OLMoE, equation 5, arXiv:2409.02060).

    - `saturation`: `|experts at t and at the end| / |experts at the end|`, averaged over tokens.
    - `chance`: the expectation for random experts, `|experts at t| / E`. Compare at a fixed k: a larger k raises both.

    Args:
        num_experts: experts of the layer.
        options: further arguments of `torchmetrics.Metric`.
    """

    shared: Tensor
    by_chance: Tensor

    def __init__(self, num_experts: int, **options: Any) -> None:
        super().__init__(num_experts, **options)
        for name in ("shared", "by_chance"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, routing: Routing, final: Routing) -> None:
        """Add tokens, as routed at a checkpoint and at the end.

        Raises:
            ValueError: routings of different numbers of tokens, soft or merged ones, or ones over another number of
                experts.
        """
        a_TE, b_TE = self._sets(routing, final)
        self.shared = self.shared + ((a_TE & b_TE).sum(1) / b_TE.sum(1).clamp_min(1)).sum()
        self.by_chance = self.by_chance + a_TE.sum() / self.num_experts
        self.tokens = self.tokens + len(a_TE)

    def compute(self) -> dict[str, Tensor]:
        """Return the means; NaN without any token."""
        return {
            "saturation": (self.shared / self.tokens).float(),
            "chance": (self.by_chance / self.tokens).float(),
        }

    def plot(self, val: dict[str, Tensor] | None = None, ax: Any = None) -> Any:
        """Draw both, by default those computed, as bars; return figure and axes."""
        from routerzoo.metrics.figures import bars

        return bars(self.compute() if val is None else val, ax, ylabel="share of the final experts")


@final
class LastFluctuation(Metric):
    """Share of the tokens whose routing does not change any more (StableMoE, arXiv:2204.08396, figure 1).

    Update it with the routing of the same tokens at several steps of training, in order. `compute` returns the recorded
    `steps`, and for each the share of tokens that are `settled`: they keep their final set of experts from there on. It
    rises to 1 at the last record.

    Args:
        num_experts: experts of the layer.
        options: further arguments of `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = True
    last_record: list[Tensor]

    def __init__(self, num_experts: int, **options: Any) -> None:
        super().__init__(**options)
        self.num_experts = num_experts
        # For each token the last record that differs from the one after it, -1 for none.
        self.add_state("last_record", default=[], dist_reduce_fx="cat")
        self.steps: list[int] = []
        self._previous_TE: Tensor | None = None

    def update(self, step: int, routing: Routing) -> None:
        """Record the tokens' routing at a step.

        Raises:
            ValueError: another number of tokens than before, a soft or merged routing, one over another number of
                experts, or a step that is not after the last.
        """
        now_TE = expert_sets(routing, self.num_experts)
        if self.steps and step <= self.steps[-1]:
            raise ValueError(f"steps must be recorded in order; {step} comes after {self.steps[-1]}")
        if self._previous_TE is None:
            self.last_record = [torch.full((len(now_TE),), -1, dtype=torch.int64, device=now_TE.device)]
        else:
            if self._previous_TE.shape != now_TE.shape:
                raise ValueError(f"the routing is of {len(now_TE)} tokens, before it was of {len(self._previous_TE)}")
            changed_T = (self._previous_TE != now_TE).any(1)
            # What differs from the record after it differs from the final one, or is overwritten by a later record.
            self.last_record = [torch.where(changed_T, len(self.steps) - 1, self.last_record[0])]
        self._previous_TE = now_TE
        self.steps.append(step)

    def forward(self, step: int, routing: Routing) -> dict[str, Tensor]:
        """Update, and return the curve so far: a single record has no value."""
        self.update(step, routing)
        curve: dict[str, Tensor] = self.compute()
        return curve

    def compute(self) -> dict[str, Tensor]:
        """Return `steps` and `settled`, both `[R]`."""
        states = self.last_record
        last_T = torch.cat(list(states)) if isinstance(states, (list, tuple)) and states else torch.as_tensor(states)
        records_R = torch.arange(len(self.steps), device=last_T.device)
        settled_R = (last_T.unsqueeze(1) < records_R).float().mean(0) if len(last_T) else records_R.float() * torch.nan
        return {"steps": torch.tensor(self.steps), "settled": settled_R}

    def reset(self) -> None:
        """Drop all records."""
        super().reset()
        self.steps, self._previous_TE = [], None

    def plot(self, val: dict[str, Tensor] | None = None, ax: Any = None) -> Any:
        """Draw a curve, by default the computed one; return figure and axes."""
        from routerzoo.metrics.figures import curves

        val = self.compute() if val is None else val
        return curves(val["steps"], {"settled": val["settled"]}, ax, xlabel="training step", ylabel="share of tokens")
