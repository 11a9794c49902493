"""How routing changes over training: metrics on a fixed set of tokens, at a fixed k."""
# Shape suffixes: T tokens, E experts, R records over training.

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from routerzoo.metrics.base import RoutingMetric
from routerzoo.metrics.sets import expert_sets
from routerzoo.routing import Routing


class _SetOverlap(RoutingMetric):
    """Compares two routings of the same tokens."""

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
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

    higher_is_better = False
    shown = ("fluctuation", "changed_tokens")
    unit = "share"
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
        replaced_T = 1 - (a_TE & b_TE).sum(1) / largest_T
        self._add(replaced=replaced_T.sum(), changed=(a_TE != b_TE).any(1).sum(), tokens=torch.tensor(len(a_TE)))

    def compute(self) -> dict[str, Tensor]:
        """Return the means; NaN without any token."""
        return {
            "fluctuation": (self.replaced / self.tokens).float(),
            "changed_tokens": (self.changed / self.tokens).float(),
        }


@final
class RouterSaturation(_SetOverlap):
    """Share of the final experts that a checkpoint selects already (OLMoE, equation 5, arXiv:2409.02060).

    - `saturation`: `|experts at t and at the end| / |experts at the end|`, averaged over tokens.
    - `chance`: the expectation for random experts, `|experts at t| / E`. Compare at a fixed k: a larger k raises both.

    Args:
        num_experts: experts of the layer.
        options: further arguments of `torchmetrics.Metric`.
    """

    shown = ("saturation", "chance")
    unit = "share of the final experts"
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
        shared_T = (a_TE & b_TE).sum(1) / b_TE.sum(1).clamp_min(1)
        by_chance = a_TE.sum() / self.num_experts
        self._add(shared=shared_T.sum(), by_chance=by_chance, tokens=torch.tensor(len(a_TE)))

    def compute(self) -> dict[str, Tensor]:
        """Return the means; NaN without any token."""
        return {
            "saturation": (self.shared / self.tokens).float(),
            "chance": (self.by_chance / self.tokens).float(),
        }


@final
class LastFluctuation(RoutingMetric):
    """Share of the tokens whose routing does not change any more (StableMoE, arXiv:2204.08396, figure 1).

    Update it with the routing of the same tokens at several steps of training, in order. `compute` returns the recorded
    `steps`, and for each the share of tokens that are `settled`: they keep their final set of experts from there on. It
    rises to 1 at the last record. `forward` returns the curve so far, since a single record has no value. Several
    processes follow different tokens, or none, at the same steps.

    Args:
        num_experts: experts of the layer.
        options: further arguments of `torchmetrics.Metric`.
    """

    full_state_update = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    unit = "share of tokens"
    steps_R: Tensor
    last_record_T: Tensor
    previous_TE: Tensor

    def __init__(self, num_experts: int, **options: Any) -> None:
        super().__init__(**options)
        self.num_experts = num_experts
        self.add_state("steps_R", torch.zeros(0, dtype=torch.int64))
        # For each token the last record that differs from the one after it, -1 for none.
        self.add_state("last_record_T", torch.zeros(0, dtype=torch.int64))
        self.add_state("previous_TE", torch.zeros(0, num_experts, dtype=torch.bool))

    def update(self, step: int, routing: Routing) -> None:
        """Record the tokens' routing at a step.

        Raises:
            ValueError: another number of tokens than before, a soft or merged routing, one over another number of
                experts, or a step that is not after the last.
        """
        now_TE = expert_sets(routing, self.num_experts)
        last = len(self.steps_R) - 1
        if last < 0:
            self.last_record_T = self.last_record_T.new_full((len(now_TE),), -1)
        else:
            if step <= int(self.steps_R[-1]):
                raise ValueError(f"steps must be recorded in order; {step} comes after {int(self.steps_R[-1])}")
            if self.previous_TE.shape != now_TE.shape:
                raise ValueError(f"the routing is of {len(now_TE)} tokens, before it was of {len(self.previous_TE)}")
            # What differs from the record after it differs from the final one, or is overwritten by a later record.
            self.last_record_T = torch.where((self.previous_TE != now_TE).any(1), last, self.last_record_T)
        self.previous_TE = now_TE
        self.steps_R = torch.cat([self.steps_R, self.steps_R.new_tensor([step])])

    def forward(self, step: int, routing: Routing) -> dict[str, Tensor]:
        """Update, and return the curve so far."""
        self.update(step, routing)
        syncs, self._to_sync = self._to_sync, self.dist_sync_on_step
        curve: dict[str, Tensor] = self.compute()
        self._forward_cache = curve  # type: ignore[assignment]
        self._to_sync, self._computed = syncs, None
        return curve

    def compute(self) -> dict[str, Tensor]:
        """Return `steps` and `settled`, both `[R]`; NaN without any token."""
        records_R = torch.arange(len(self.steps_R), device=self.steps_R.device)
        settled_TR = self.last_record_T.unsqueeze(1) < records_R
        return {"steps": self.steps_R, "settled": settled_TR.float().mean(0)}

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        wrapped = super()._wrap_compute(compute)

        @functools.wraps(compute)
        def curves() -> dict[str, Tensor]:
            # torchmetrics squeezes tensors of one entry.
            return {name: values.reshape(-1) for name, values in wrapped().items()}

        return curves

    def _sync_dist(
        self, dist_sync_fn: Callable[..., list[Tensor]] = gather_all_tensors, process_group: Any = None
    ) -> None:
        """Join the tokens of all processes. torchmetrics would stack states, which requires equal shapes."""
        gather = functools.partial(dist_sync_fn, group=process_group or self.process_group)
        steps = gather(self.steps_R)
        self.last_record_T = torch.cat(gather(self.last_record_T))
        recorded = [steps_R for steps_R in steps if len(steps_R)]
        if any(not torch.equal(steps_R, recorded[0]) for steps_R in recorded):
            raise ValueError(f"processes have recorded different steps: {[s.tolist() for s in recorded]}")
        self.steps_R = recorded[0] if recorded else self.steps_R

    def _draw(self, result: dict[str, Tensor], ax: Any) -> Any:
        return self._draw_several([result], ax)

    def _draw_several(self, results: Sequence[dict[str, Tensor]], ax: Any) -> Any:
        from routerzoo.metrics.figures import curves

        for result in results:
            _, ax = curves(
                result["steps"], {"settled": result["settled"]}, ax, xlabel="training step", ylabel=self.unit
            )
        return ax.figure, ax
