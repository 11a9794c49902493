"""`Ids`: the domain is a function of the token id."""
# Shape suffixes: T tokens, D model width, V token ids, C domains.

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn.functional import normalize

from routerzoo.bench.registry import register_task
from routerzoo.bench.task import Batch, BenchTask, Prediction, apply_maps, linear_maps


@register_task
class Ids(BenchTask):
    """64 token ids with random embeddings, eight ids a domain; the hidden state is the embedding with noise.

    The domain is a union of eight clusters that lie anywhere. A linear gate has 32 dimensions for 64 clusters: only
    half of all ways to part as many points in two are linear (Cover 1965), and noise blurs those. A table of token ids
    routes every occurrence of an id alike, whatever the noise (Roller et al. 2021, "Hash Layers", arXiv:2106.04426). A
    random table leaves an expert eight ids of many domains, where ideal routing gives it one domain: hashing is good,
    not ideal. A table that a gate has taught can join ids of one domain (StableMoE, Dai et al. 2022, arXiv:2204.08396).
    """

    name = "ids"
    title = "function of the token id"
    predictions: ClassVar[tuple[Prediction, ...]] = (
        Prediction("HashRouter", "LinearRouter", "ids carry the domain (Roller et al. 2021)"),
        Prediction("HashRouter", "XMoERouter", "ids carry the domain (Roller et al. 2021)"),
        Prediction("StableMoERouter", "LinearRouter", "a frozen table of ids (Dai et al. 2022)"),
        Prediction("HashFirstRouter", "LinearRouter", "the first layers hash (DeepSeek-V4)"),
        Prediction("LinearRouter", "RandomFrozenRouter", "a learned gate separates some of the ids"),
    )

    def __init__(self, seed: int, steps: int | None = None) -> None:
        super().__init__(seed, steps)
        generator = self.generator("world")
        self.maps_CDD = linear_maps(self.num_domains, self.dim, generator)
        self.domain_V = torch.randperm(self.vocab_size, generator=generator) % self.num_domains
        self.embedding_VD = 2.5 * normalize(torch.randn(self.vocab_size, self.dim, generator=generator), dim=1)

    def batch(self, tokens: int, generator: torch.Generator, progress: float) -> Batch:
        """Draw the id, then the hidden state around its embedding with a standard deviation of 0.7."""
        ids_T = self.random_ids(tokens, generator)
        domain_T = self.domain_V[ids_T]
        x_TD = 0.7 * torch.randn(tokens, self.dim, generator=generator) + self.embedding_VD[ids_T]
        return Batch(x_TD, apply_maps(self.maps_CDD, domain_T, x_TD), domain_T, ids_T)
