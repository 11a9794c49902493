"""`Hierarchy`: four super-domains of two sub-domains each."""
# Shape suffixes: T tokens, D model width, C domains, U super-domains.

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from routerzoo.bench.registry import register_task
from routerzoo.bench.task import Batch, BenchTask, Prediction, apply_maps, linear_maps

FINE_MAP = 0.5
"""Scale of what a sub-domain's map adds to its super-domain's."""


@register_task
class Hierarchy(BenchTask):
    """Super-domains that lie far apart and differ much, of two sub-domains that lie close and differ little.

    The centers of two super-domains are 3.5 apart, those of two sub-domains 2.4, at a standard deviation of 0.7; a
    sub-domain's map is its super-domain's and half as much of its own. So the coarse split is easy to see and worth
    most, and the fine one gets a gradient only once an expert serves both sub-domains of one super-domain: gates learn
    the tree from the root (hierarchical mixtures of experts, Jordan and Jacobs 1994; for gradient descent in general,
    Saxe et al. 2019, arXiv:1810.10531). With 4.3 % of tokens nearer to the other sub-domain's center no gate on the
    hidden state reaches the oracle. What a router that stops at the coarse split has left is its regret; its mutual
    information with the domain is then 2/3, the share of the super-domain's entropy in the domain's.
    """

    name = "hierarchy"
    title = "sub-domain of a super-domain"
    predictions: ClassVar[tuple[Prediction, ...]] = (
        Prediction("LinearRouter", "RandomFrozenRouter", "a learned gate finds the coarse split, and part of the fine"),
        Prediction("XMoERouter", "RandomFrozenRouter", "the angle to a center tells the coarse split"),
        Prediction("RandomFrozenRouter", "HashRouter", "a random gate sees the cluster, a hash of random ids does not"),
        Prediction("LinearRouter", "dense", "one network of the active size holds two of eight maps"),
    )

    def __init__(self, seed: int, steps: int | None = None) -> None:
        super().__init__(seed, steps)
        generator = self.generator("world")
        num_super = self.num_domains // 2
        coarse_CDD = linear_maps(num_super, self.dim, generator).repeat_interleave(2, 0)
        fine_CDD = linear_maps(self.num_domains, self.dim, generator)
        self.maps_CDD = (coarse_CDD + FINE_MAP * fine_CDD) / math.sqrt(1 + FINE_MAP**2)
        directions_DD = torch.linalg.qr(torch.randn(self.dim, self.dim, generator=generator))[0]
        coarse_UD, fine_UD = 2.5 * directions_DD[:num_super], 1.2 * directions_DD[num_super : 2 * num_super]
        self.centers_CD = torch.stack([coarse_UD + fine_UD, coarse_UD - fine_UD], dim=1).flatten(0, 1)

    def batch(self, tokens: int, generator: torch.Generator, progress: float) -> Batch:
        """Draw the sub-domain, then the hidden state around its center with a standard deviation of 0.7."""
        domain_T = torch.randint(self.num_domains, (tokens,), generator=generator)
        x_TD = 0.7 * torch.randn(tokens, self.dim, generator=generator) + self.centers_CD[domain_T]
        return Batch(x_TD, apply_maps(self.maps_CDD, domain_T, x_TD), domain_T, self.random_ids(tokens, generator))

    def super_domain(self, domain_T: Tensor) -> Tensor:
        """Return the super-domain of each token."""
        return domain_T // 2
