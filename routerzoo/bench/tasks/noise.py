"""`Noise`: half of the tokens have no domain."""
# Shape suffixes: T tokens, D model width, C domains.

from __future__ import annotations

import math
from typing import ClassVar

import torch

from routerzoo.bench.registry import register_task
from routerzoo.bench.task import Batch, BenchTask, Prediction, apply_maps, linear_maps


@register_task
class Noise(BenchTask):
    """Clusters as in `Clusters`, and as many tokens of noise, as long as the others, around 0; their target is 0.

    Ideal routing sends noise to no expert, so that its output is 0 and experts learn of their domain alone. In words of
    large models: some tokens need no expert (null experts, Zeng et al. 2024, AdaMoE, arXiv:2406.13233). A router that
    must choose k experts has them learn to answer noise with 0, too. Routers that choose by probability (top-p, Huang
    et al. 2024, arXiv:2403.07652; thresholds) give noise more experts, not fewer, but tokens of a clear domain fewer
    than k. That alone helps a little; weights that are not renormalized, without it, do not help a linear gate.
    """

    name = "noise"
    title = "cluster, or none"
    predictions: ClassVar[tuple[Prediction, ...]] = (
        Prediction("TopPRouter", "LinearRouter", "tokens of a clear domain take fewer experts (Huang et al. 2024)"),
        Prediction("ExpertThresholdRouter", "LinearRouter", "tokens of a clear domain take fewer experts"),
        Prediction("LinearRouter", "RandomFrozenRouter", "a learned gate finds the centers"),
        Prediction("LinearRouter", "HashRouter", "a hash of random ids tells neither cluster nor noise"),
    )

    def __init__(self, seed: int, steps: int | None = None) -> None:
        super().__init__(seed, steps)
        generator = self.generator("world")
        self.maps_CDD = linear_maps(self.num_domains, self.dim, generator)
        directions_DD = torch.linalg.qr(torch.randn(self.dim, self.dim, generator=generator))[0]
        self.centers_CD = 2.5 * directions_DD[: self.num_domains]

    def batch(self, tokens: int, generator: torch.Generator, progress: float) -> Batch:
        """Draw the cluster, or none, then the hidden state: of the same mean squared length in both cases."""
        domain_T = torch.randint(self.num_domains, (tokens,), generator=generator)
        noise_T = torch.rand(tokens, generator=generator) < 0.5
        domain_T = domain_T.masked_fill(noise_T, -1)
        center_TD = self.centers_CD[domain_T].masked_fill(noise_T.unsqueeze(1), 0.0)
        std_T = torch.where(noise_T, math.sqrt(0.7**2 + 2.5**2 / self.dim), 0.7)
        x_TD = std_T.unsqueeze(1) * torch.randn(tokens, self.dim, generator=generator) + center_TD
        return Batch(x_TD, apply_maps(self.maps_CDD, domain_T, x_TD), domain_T, self.random_ids(tokens, generator))
