"""The scopes over which the load of a linear gate is balanced, as choices of a router that compare them."""

from __future__ import annotations

from routerzoo.bench.choices import RouterChoice

BALANCE, Z = 0.01, 0.001
"""Coefficients of the balance loss (Switch) and of the z-loss (ST-MoE)."""


def _scope(label: str, loss: str | None) -> RouterChoice:
    weights = {"z": Z} if loss is None else {loss: BALANCE, "z": Z}
    return RouterChoice("LinearRouter", {}, label, loss_weights=weights)


SCOPES: tuple[RouterChoice, ...] = (
    _scope("sequence", "sequence_balance"),
    _scope("micro-batch", "local_balance"),
    _scope("accumulated batch", "global_balance"),
    _scope("all processes", "balance"),
    _scope("none", None),
    # The same gate with a selection bias (Wang et al. 2024), whose load is counted over the whole step.
    RouterChoice("TopKRouter", {"bias_speed": 1e-3}, "loss-free", loss_weights={"z": Z}),
)
"""From the narrowest, then without a loss: no balancing, and balancing by a bias."""
