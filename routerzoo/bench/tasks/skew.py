"""`Skew`: clusters whose frequencies follow Zipf's law."""
# Shape suffixes: C domains.

from __future__ import annotations

from typing import ClassVar

import torch

from routerzoo.bench.registry import register_task
from routerzoo.bench.task import Prediction
from routerzoo.bench.tasks.clusters import Clusters


@register_task
class Skew(Clusters):
    """The clusters of `Clusters`, the i-th with a frequency in proportion to `i^-1.5`.

    The most frequent domain holds 52 % of the tokens, the rarest 2 %. Ideal routing is as unequal: the experts of the
    most frequent domain have four times the mean load. A router that makes loads equal must split the large domain over
    experts and let the small ones share, which costs specialization (Qiu et al. 2025, "Demons in the Detail",
    arXiv:2501.11873; Wang et al. 2024, arXiv:2408.15664, on the gradient of balance losses). A weak balance loss gives
    way to the task; an assignment of equal loads (Lewis et al. 2021, arXiv:2103.16716; Clark et al. 2022,
    arXiv:2202.01169; expert choice, Zhou et al. 2022, arXiv:2202.09368) does not.
    """

    name = "skew"
    title = "cluster, Zipf frequencies"
    predictions: ClassVar[tuple[Prediction, ...]] = (
        Prediction("LinearRouter", "HashRouter", "a hash of random ids says nothing of the cluster"),
        Prediction("LinearRouter", "SBaseRouter", "equal loads in training split the large domain"),
        Prediction("LinearRouter", "SinkhornRouter", "equal loads in training split the large domain"),
        Prediction("LinearRouter", "ExpertChoiceRouter", "equal loads by construction leave tokens without experts"),
    )

    def __init__(self, seed: int, steps: int | None = None) -> None:
        super().__init__(seed, steps)
        share_C = torch.arange(1, self.num_domains + 1) ** -1.5
        self.share_C = share_C / share_C.sum()
