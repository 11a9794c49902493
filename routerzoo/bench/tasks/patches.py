"""`Patches`: images of four objects, each from a source."""
# Shape suffixes: T tokens, D model width, C domains, G images, R rows and columns of objects.

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from routerzoo.bench.registry import register_task
from routerzoo.bench.task import Batch, BenchTask, Prediction, apply_maps, linear_maps

OBJECTS, PATCHES = 2, 2
"""Along each side: objects of an image, patches of an object."""


@register_task
class Patches(BenchTask):
    """Images of 4 x 4 patches; each quarter shows an object, whose source is the domain of its four patches.

    An object is its source's center and a random vector, a patch the object with noise of the same variance; the target
    is `W[source]` of the object. Made for routers that see the whole image, here all routers may.

    A single patch tells its object up to noise: the best map of it leaves an error of about 0.24, where the target's
    mean square is 0.7. The oracle computes each patch by itself and cannot go below, so it is not the best there is:
    the mean of an object's four patches leaves 0.1, and routers that mix patches may have a regret below 0. Slots of
    Soft MoE (Puigcerver et al. 2024, arXiv:2308.00951) do so where they are sharp enough to tell objects apart. Mixing
    logits over similar or attended patches (Nguyen et al. 2025, arXiv:2505.00792) steadies the choice alone. Expert
    choice (Zhou et al. 2022, arXiv:2202.09368) gives each expert as many patches in every image; an image has four
    sources at most, of eight, so that more than half of the choices are experts of sources that it does not show.
    """

    name = "patches"
    title = "source of the image's object"
    predictions: ClassVar[tuple[Prediction, ...]] = (
        Prediction("SimilarityRouter", "LinearRouter", "similar patches are of one object (Nguyen et al. 2025)"),
        Prediction("LinearRouter", "ExpertChoiceRouter", "equal loads in an image of few sources"),
        Prediction("LinearRouter", "HashRouter", "a hash of random ids says nothing of the source"),
    )

    sequence_length = (OBJECTS * PATCHES) ** 2

    def __init__(self, seed: int, steps: int | None = None) -> None:
        super().__init__(seed, steps)
        generator = self.generator("world")
        self.maps_CDD = linear_maps(self.num_domains, self.dim, generator)
        directions_DD = torch.linalg.qr(torch.randn(self.dim, self.dim, generator=generator))[0]
        self.centers_CD = 2.5 * directions_DD[: self.num_domains]

    def batch(self, tokens: int, generator: torch.Generator, progress: float) -> Batch:
        """Draw the objects of each image, then their patches; all standard deviations are 0.7."""
        shape = (tokens // self.sequence_length, OBJECTS, OBJECTS)
        domain_GRR = torch.randint(self.num_domains, shape, generator=generator)
        object_GRRD = 0.7 * torch.randn(*shape, self.dim, generator=generator) + self.centers_CD[domain_GRR]
        domain_T, object_TD = of_patches(domain_GRR), of_patches(object_GRRD)
        x_TD = object_TD + 0.7 * torch.randn(tokens, self.dim, generator=generator)
        return Batch(x_TD, apply_maps(self.maps_CDD, domain_T, object_TD), domain_T, self.random_ids(tokens, generator))


def of_patches(values_GRR: Tensor) -> Tensor:
    """Give each patch its object's value, patches in the order of rows: `[G, R, R, ...]` to `[T, ...]`."""
    return values_GRR.repeat_interleave(PATCHES, 1).repeat_interleave(PATCHES, 2).flatten(0, 2)
