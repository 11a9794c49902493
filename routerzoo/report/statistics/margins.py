"""What difference is negligible, by metric: the one table of margins."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """How values of a metric are compared.

    Args:
        margin: a difference that is negligible; None where nobody has said, and equivalence cannot be shown.
        unit: of the margin and of differences.
        kind: `plain` values are compared as they are. `perplexity` is compared by its logarithm, in bits. A `share` is
            in [0, 1], and its margin is relative: to the errors, or to the hits where these are fewer.
    """

    margin: float | None
    unit: str
    kind: Literal["plain", "perplexity", "share"] = "plain"

    def compared(self, value: float) -> float:
        """Return a value on the scale on which differences are taken."""
        return math.log2(value) if self.kind == "perplexity" and value > 0 else value

    def width(self, mean: float) -> float:
        """Return the margin around a mean, on the scale of differences; NaN without one."""
        if self.margin is None:
            return math.nan
        return self.margin * min(mean, 1 - mean) if self.kind == "share" else self.margin

    @property
    def stated(self) -> str:
        """The margin in words."""
        if self.margin is None:
            return "no margin"
        if self.kind == "share":
            return f"{100 * self.margin:g} % of the errors (of the hits, if fewer)"
        return f"{self.margin:g} {self.unit}"


# Differences between routers in papers are 0.003 to 0.011 bits per character on enwik8.
MARGINS = {
    "bpb": Metric(0.005, "bits per byte"),
    "bpc": Metric(0.005, "bits per character"),
    "ppl": Metric(0.005, "bits per token", "perplexity"),
    "loss": Metric(0.0035, "nats"),  # 0.005 bits
    "accuracy": Metric(0.02, "accuracy", "share"),
    "regret": Metric(0.02, "regret"),  # 0 is the oracle, 1 the blind router
}


def metric(name: str, margins: Mapping[str, float] | None = None) -> Metric:
    """Return how a metric is compared.

    Args:
        name: of the metric. One that the table does not have is compared as it is.
        margins: by metric, instead of the table's; in the same units.
    """
    known = MARGINS.get(name, Metric(None, name))
    margins = margins or {}
    return replace(known, margin=margins[name]) if name in margins else known
