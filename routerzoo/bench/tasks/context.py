"""`Context`: the domain is set by the first token of the sequence."""
# Shape suffixes: T tokens, D model width, C domains, G sequences, S tokens of one sequence, R directions of topics.

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from routerzoo.bench.registry import register_task
from routerzoo.bench.task import Batch, BenchTask, Prediction, apply_maps, linear_maps


@register_task
class Context(BenchTask):
    """A cue at the start of a sequence names the domain of the seven tokens that follow, which do not show it.

    All tokens of a sequence share a topic, a random vector that is independent of the domain; the cue has twice as much
    of it, and its domain's center. The tokens that follow, the only ones with a loss, have topic and noise alone: the
    mutual information of such a token and its domain is 0. Every router that looks at one token at a time is therefore
    blind, whatever it has learned: gates, hashes, and also RMoE (its recurrence runs over layers, arXiv:2408.06793) and
    Yuan's attention router (its attention is between experts, arXiv:2405.17976).

    What can win mixes tokens. Routing by similar tokens (Nguyen et al. 2025, arXiv:2505.00792): by its topic the cue is
    what a token resembles most, beside itself. Routing by attention (same paper): the attention layer before, which
    the task stands in for, gives half to the token itself and half to the first one, as trained heads do (Xiao et al.
    2024, "attention sinks", arXiv:2309.17453). SMEAR (Muqeeth et al. 2023, arXiv:2306.03745) merges experts by the
    sequence's mean, an eighth of which is the cue. Soft MoE mixes tokens, too: its experts see the cue in their slots,
    but which slot a token reads from does not follow the domain.
    """

    name = "context"
    title = "first token of the sequence"
    predictions: ClassVar[tuple[Prediction, ...]] = (
        Prediction("SimilarityRouter", "LinearRouter", "a token resembles the cue by its topic (Nguyen et al. 2025)"),
        Prediction("AttentionRouter", "LinearRouter", "the attention reads the cue (Nguyen et al. 2025)"),
        Prediction("SMEARRouter", "LinearRouter", "the sequence's mean holds the cue (Muqeeth et al. 2023)"),
        Prediction("SimilarityRouter", "HashRouter", "a token's own id says nothing"),
        Prediction("SimilarityRouter", "RMoERouter", "its recurrence runs over layers, not over tokens"),
        Prediction("SimilarityRouter", "YuanRouter", "its attention is between experts, not between tokens"),
    )

    sequence_length = 8
    topic_dim: ClassVar[int] = 4

    def __init__(self, seed: int, steps: int | None = None) -> None:
        super().__init__(seed, steps)
        generator = self.generator("world")
        self.maps_CDD = linear_maps(self.num_domains, self.dim, generator)
        directions_DD = torch.linalg.qr(torch.randn(self.dim, self.dim, generator=generator))[0]
        self.centers_CD = 3.0 * directions_DD[: self.num_domains]
        self.topics_RD = 3.0 * directions_DD[self.num_domains : self.num_domains + self.topic_dim]

    def batch(self, tokens: int, generator: torch.Generator, progress: float) -> Batch:
        """Draw each sequence's domain and topic, then its tokens with a standard deviation of 0.7."""
        sequences = tokens // self.sequence_length
        domain_G = torch.randint(self.num_domains, (sequences,), generator=generator)
        topic_GR = normalize(torch.randn(sequences, self.topic_dim, generator=generator), dim=1)
        topic_GD = topic_GR @ self.topics_RD
        x_GSD = 0.7 * torch.randn(sequences, self.sequence_length, self.dim, generator=generator)
        x_GSD += topic_GD.unsqueeze(1)
        x_GSD[:, 0] += topic_GD + self.centers_CD[domain_G]
        x_TD, domain_T = x_GSD.flatten(0, 1), domain_G.repeat_interleave(self.sequence_length)
        return Batch(x_TD, apply_maps(self.maps_CDD, domain_T, x_TD), domain_T, self.random_ids(tokens, generator))

    def token_losses(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the squared errors, 0 for cues."""
        return super().token_losses(output, batch) * (self.places(batch) > 0)

    def attention(self, batch: Batch) -> Tensor:
        """Return half of a token's attention at itself, half at the first token."""
        own_TS = one_hot(self.places(batch), self.sequence_length).float()
        first_S = one_hot(torch.tensor(0), self.sequence_length).float()
        return ((own_TS + first_S) / 2).unsqueeze(1)

    def places(self, batch: Batch) -> Tensor:
        """Return each token's place in its sequence, from 0."""
        return torch.arange(len(batch.domain_T)) % self.sequence_length
