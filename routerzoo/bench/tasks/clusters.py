"""`Clusters`: the domain is the cluster that the hidden state lies in."""
# Shape suffixes: T tokens, D model width, C domains.

from __future__ import annotations

from typing import ClassVar

import torch

from routerzoo.bench.registry import register_task
from routerzoo.bench.task import Batch, BenchTask, Prediction, apply_maps, linear_maps


@register_task
class Clusters(BenchTask):
    """Eight Gaussian clusters around orthogonal centers, each with a linear map of its own.

    A linear gate whose rows are the centers routes as well as any: 3.2 % of the tokens lie nearer to another center,
    which only the oracle routes right. Gradient descent finds the centers: for a mixture of clusters with a nonlinear
    expert each, the router learns them (Chen et al., NeurIPS 2022, "Towards Understanding the Mixture-of-Experts Layer
    in Deep Learning", arXiv:2208.02813). A frozen random gate cuts clusters at random, and token ids say nothing, so
    that hashing is blind.
    """

    name = "clusters"
    title = "cluster of the hidden state"
    predictions: ClassVar[tuple[Prediction, ...]] = (
        Prediction("LinearRouter", "RandomFrozenRouter", "a learned gate finds the centers (Chen et al. 2022)"),
        Prediction("RandomFrozenRouter", "HashRouter", "a random gate sees the cluster, a hash of random ids does not"),
        Prediction("XMoERouter", "HashRouter", "the angle to a center tells the cluster (Chi et al. 2022)"),
        Prediction("LinearRouter", "dense", "one network of the active size holds two of eight maps"),
    )

    def __init__(self, seed: int, steps: int | None = None) -> None:
        super().__init__(seed, steps)
        generator = self.generator("world")
        self.maps_CDD = linear_maps(self.num_domains, self.dim, generator)
        directions_DD = torch.linalg.qr(torch.randn(self.dim, self.dim, generator=generator))[0]
        self.centers_CD = 2.5 * directions_DD[: self.num_domains]
        self.share_C = torch.full((self.num_domains,), 1 / self.num_domains)

    def batch(self, tokens: int, generator: torch.Generator, progress: float) -> Batch:
        """Draw the cluster, then the hidden state around its center with a standard deviation of 0.7."""
        domain_T = torch.multinomial(self.share_C, tokens, replacement=True, generator=generator)
        x_TD = 0.7 * torch.randn(tokens, self.dim, generator=generator) + self.centers_CD[domain_T]
        return Batch(x_TD, apply_maps(self.maps_CDD, domain_T, x_TD), domain_T, self.random_ids(tokens, generator))
