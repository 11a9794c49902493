"""`Xor`: the domain is not a linear function of the hidden state."""
# Shape suffixes: T tokens, D model width, B bits, C domains.

from __future__ import annotations

from typing import ClassVar

import torch

from routerzoo.bench.registry import register_task
from routerzoo.bench.task import Batch, BenchTask, Prediction, apply_maps, linear_maps


@register_task
class Xor(BenchTask):
    """Six signs along orthogonal directions; the domain is the exclusive or of each of three pairs.

    A domain is eight of the 64 corners of a cube, two opposite ones of each of its three squares, so that all domains
    have the same mean and no linear score separates one from the rest (Minsky and Papert 1969). A linear gate is best
    off giving its 16 experts corners that lie together, of several domains. A gate with a hidden layer computes the
    exclusive or: RMoE's GRU (Qiu et al. 2024, arXiv:2408.06793), which in a single layer is no more than that.
    """

    name = "xor"
    title = "exclusive or of directions"
    predictions: ClassVar[tuple[Prediction, ...]] = (
        Prediction("RMoERouter", "LinearRouter", "a gate with a hidden layer separates what a linear one cannot"),
        Prediction("LinearRouter", "RandomFrozenRouter", "16 learned experts split the corners better than random"),
        Prediction("LinearRouter", "HashRouter", "a hash of random ids says nothing of the corner"),
    )

    def __init__(self, seed: int, steps: int | None = None) -> None:
        super().__init__(seed, steps)
        generator = self.generator("world")
        self.maps_CDD = linear_maps(self.num_domains, self.dim, generator)
        directions_DD = torch.linalg.qr(torch.randn(self.dim, self.dim, generator=generator))[0]
        self.directions_BD = 2.0 * directions_DD[:6]

    def batch(self, tokens: int, generator: torch.Generator, progress: float) -> Batch:
        """Draw six bits, then the hidden state around their corner with a standard deviation of 0.7."""
        bits_TB = torch.randint(2, (tokens, 6), generator=generator)
        corner_TD = (2.0 * bits_TB - 1) @ self.directions_BD
        x_TD = 0.7 * torch.randn(tokens, self.dim, generator=generator) + corner_TD
        domain_T = (bits_TB[:, ::2] ^ bits_TB[:, 1::2]) @ torch.tensor([1, 2, 4])
        return Batch(x_TD, apply_maps(self.maps_CDD, domain_T, x_TD), domain_T, self.random_ids(tokens, generator))
