"""`Need`: tokens of one, two or three components."""
# Shape suffixes: T tokens, D model width, C domains, K components of a token, G sequences, S tokens of one sequence.

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from routerzoo.bench.registry import register_task
from routerzoo.bench.task import Batch, BenchTask, Prediction, apply_maps, linear_maps


@dataclass(frozen=True)
class Components(Batch):
    """A batch whose tokens have several domains.

    Args:
        components_TK: the domains of each token, -1 for none.
    """

    components_TK: Tensor = field(kw_only=True)


@register_task
class Need(BenchTask):
    """One to three of 16 domains are active in a token; its target is the mean of their maps.

    The hidden state is the sum of the active domains' centers, with noise. Ideal routing takes one expert for each
    active domain, with equal weights: 1, 2 or 3 experts, 2 on average, as many as a router of fixed k has; ideal
    routing to two at most has a regret of about 0.2. A softmax gate can represent it (equal logits for the active
    domains, low ones for the others), and top-p with a threshold above 2/3 would then choose exactly the active ones:
    "harder tasks need more experts" (Huang et al. 2024, arXiv:2403.07652).

    But a gate's uncertainty is not the need: while logits differ little, one active domain leaves more probability to
    the others than three do, and top-p spends most where least is needed. The correlation of k and need says which it
    is. DA-MoE (Aghdam et al. 2024, arXiv:2409.06669) takes k from the attention that a token receives; here it is in
    proportion to the need, as that method assumes of important tokens.

    The domain of a token, for the mutual information, is one of its components at random. The oracle names that one
    first; a router that is as good and prefers another component has a lower value.
    """

    name = "need"
    title = "one to three components"
    num_domains = 16
    max_need: ClassVar[int] = 3
    predictions: ClassVar[tuple[Prediction, ...]] = (
        Prediction("LinearRouter", "RandomFrozenRouter", "a learned gate finds the centers"),
        Prediction("DAMoERouter", "RandomFrozenRouter", "a learned gate finds the centers"),
        Prediction("TopPRouter", "RandomFrozenRouter", "a learned gate finds the centers"),
        Prediction("LinearRouter", "HashRouter", "a hash of random ids says nothing of the components"),
    )

    def __init__(self, seed: int, steps: int | None = None) -> None:
        super().__init__(seed, steps)
        generator = self.generator("world")
        self.maps_CDD = linear_maps(self.num_domains, self.dim, generator)
        directions_DD = torch.linalg.qr(torch.randn(self.dim, self.dim, generator=generator))[0]
        self.centers_CD = 4.0 * directions_DD[: self.num_domains]

    def batch(self, tokens: int, generator: torch.Generator, progress: float) -> Batch:
        """Draw need and components, then the hidden state; `domain_T` is one of the components."""
        need_T = torch.randint(1, self.max_need + 1, (tokens,), generator=generator)
        order_TC = torch.rand(tokens, self.num_domains, generator=generator).argsort(1)
        absent_TK = torch.arange(self.max_need) >= need_T.unsqueeze(1)
        components_TK = order_TC[:, : self.max_need].masked_fill(absent_TK, -1)
        x_TD = 0.7 * torch.randn(tokens, self.dim, generator=generator)
        x_TD += self.centers_CD[components_TK].masked_fill(absent_TK.unsqueeze(2), 0.0).sum(1)
        target_TD = torch.zeros_like(x_TD)
        for component_T in components_TK.unbind(1):
            target_TD += apply_maps(self.maps_CDD, component_T, x_TD)
        target_TD /= need_T.unsqueeze(1)
        ids_T = self.random_ids(tokens, generator)
        return Components(x_TD, target_TD, components_TK[:, 0], ids_T, need_T, components_TK=components_TK)

    def oracle(self, batch: Batch) -> Tensor:
        """Return the expert of each component."""
        assert isinstance(batch, Components)
        return batch.components_TK

    def attention(self, batch: Batch) -> Tensor:
        """Return the same attention for all tokens of a sequence: in proportion to the need of each."""
        assert batch.need_T is not None
        need_GS = batch.need_T.view(-1, self.sequence_length).float()
        share_GS = need_GS / need_GS.sum(1, keepdim=True)
        return share_GS.repeat_interleave(self.sequence_length, 0).unsqueeze(1)
