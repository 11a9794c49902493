"""`Drift`: the frequencies of the domains turn at half time."""
# Shape suffixes: T tokens, D model width, V token ids, C domains.

from __future__ import annotations

from typing import ClassVar

import torch

from routerzoo.bench.registry import register_task
from routerzoo.bench.task import Batch, BenchTask, Prediction, apply_maps, linear_maps

RARE = 0.02
"""Share of the tokens that the rare half of the domains has."""


@register_task
class Drift(BenchTask):
    """Eight clusters with token ids of their own; four are frequent in the first half of training, four in the second.

    Evaluation is on the frequencies of its time. Until the turn the rare domains have 2 % of the tokens, too few to
    learn from, and experts and gate settle on the frequent ones. What can still move when the others come gives them
    experts of their own. What was frozen before cannot: the table that StableMoE distills in its first tenth (Dai et
    al. 2022, arXiv:2204.08396) was taught the ids of the rare domains by few tokens and an unsettled gate, so that they
    share experts. The turn decides: trained on the later frequencies throughout, StableMoE has half the regret of a
    linear gate.
    """

    name = "drift"
    title = "cluster, frequencies turn"
    predictions: ClassVar[tuple[Prediction, ...]] = (
        Prediction("LinearRouter", "StableMoERouter", "its table is frozen before the later domains come"),
        Prediction("LinearRouter", "RandomFrozenRouter", "a frozen random gate mixes domains"),
        Prediction("LinearRouter", "HashRouter", "a random table of ids mixes domains"),
    )

    def __init__(self, seed: int, steps: int | None = None) -> None:
        super().__init__(seed, steps)
        generator = self.generator("world")
        self.maps_CDD = linear_maps(self.num_domains, self.dim, generator)
        directions_DD = torch.linalg.qr(torch.randn(self.dim, self.dim, generator=generator))[0]
        self.centers_CD = 2.5 * directions_DD[: self.num_domains]
        self.domain_V = torch.randperm(self.vocab_size, generator=generator) % self.num_domains
        half = self.num_domains // 2
        early_C = torch.arange(self.num_domains) < half
        self.early_share_C = torch.where(early_C, (1 - RARE) / half, RARE / half)

    def batch(self, tokens: int, generator: torch.Generator, progress: float) -> Batch:
        """Draw the id by the frequencies of the time, then the hidden state around its domain's center."""
        share_C = self.early_share_C if progress < 0.5 else self.early_share_C.flip(0)
        ids_T = torch.multinomial(share_C[self.domain_V], tokens, replacement=True, generator=generator)
        domain_T = self.domain_V[ids_T]
        x_TD = 0.7 * torch.randn(tokens, self.dim, generator=generator) + self.centers_CD[domain_T]
        return Batch(x_TD, apply_maps(self.maps_CDD, domain_T, x_TD), domain_T, ids_T)
