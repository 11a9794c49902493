"""Which k the runs of a sweep are tested at: of some routers it cannot be chosen."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from routerzoo import registry
from routerzoo.errors import UserError
from routerzoo.moe.layer import RouterFactory
from routerzoo.routing import LayerSpec
from routerzoo.sweep.plan import Cell

KEY = "eval_top_k"


def with_possible_k(cell: Cell, config: str) -> Cell:
    """Return a point of the grid without `eval_top_k` in its test, where its router has one k or chooses its own.

    Args:
        cell: the point.
        config: what its configs resolve to.

    Raises:
        UserError: the router cannot do one of the k. Otherwise its run would fail after it has trained.
    """
    asked = {name: value for name, value in cell.test.items() if name.rpartition(".")[2] == KEY}
    arguments = yaml.safe_load(config)["model"].get("init_args") or {}
    router, num_experts = arguments.get("router"), arguments.get("num_experts")
    if not asked or not router or num_experts is None:
        return cell
    largest = _largest_k(json.dumps(router), num_experts)
    if largest is None:
        return cell
    if largest == 1 < num_experts:
        return dataclasses.replace(cell, test={n: value for n, value in cell.test.items() if n not in asked})
    for value in asked.values():
        for k in value if isinstance(value, list) else [value]:
            if k is not None and not 1 <= k <= largest:
                raise UserError(f"{KEY} must be between 1 and {largest}, got {k}")
    return cell


@functools.cache
def _largest_k(router: str, num_experts: int) -> int | None:
    """Build a router of a small layer, and return its largest k; None where that takes the model itself."""
    registry.load_plugins()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--router", type=RouterFactory)
    sizes: dict[str, Any] = dict.fromkeys(("vocab_size", "num_positions", "hidden_dim"), 64)
    spec = LayerSpec(64, num_experts, layer=0, num_layers=2, num_tasks=2, **sizes)
    try:
        factory = parser.instantiate_classes(parser.parse_object({"router": json.loads(router)})).router
        return int(factory(spec).max_top_k)
    except Exception:  # a router may refuse other sizes than the model's
        return None
