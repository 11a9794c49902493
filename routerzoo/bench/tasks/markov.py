"""`Markov`: a causal language model over sequences of eight bigram languages."""
# Shape suffixes: T tokens, D model width, C domains, V and W token ids, G sequences, S and U tokens of one sequence,
# H heads.

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from routerzoo.bench.registry import register_task
from routerzoo.bench.task import Batch, BenchTask, Prediction
from routerzoo.moe.layer import MoE, RouterFactory
from routerzoo.routing import RoutingContext

CONCENTRATION = 2.0
"""Of the Dirichlet distribution that rows of transitions are drawn from: the lower, the more certain the next token."""
SMOOTHING = 1e-4
"""Least probability of any token after any other, before normalization: every language is irreducible."""
HEADS = 2


@register_task
class Markov(BenchTask):
    """Each sequence is of one of eight languages, Markov chains over 32 tokens; the language is the domain.

    A language has token frequencies of its own (Dirichlet(1)), around which the transitions from each token are drawn.
    Its entropy rate is known, `-sum_v pi_v sum_w P_vw log2 P_vw`, about 2 bits, and the loss is what the model needs
    beyond it: the excess bits per token over a predictor that knows language and transitions. The model is a decoder of
    one block: attention, which can gather what tokens came before, then the MoE layer.

    Ideal routing gives a language two experts, which learn its table of 32 x 32 transitions. A router is not told the
    language, but 32 tokens tell it: by the chain rule a predictor that knows all languages and infers which one it
    reads needs at most `log2(8) / 32 = 0.09` bits per token more. A random frozen gate (Chen et al. 2023,
    arXiv:2303.01610) sees the attention's summary without adapting to it. Hashing by the current token (Roller et al.
    2021, arXiv:2106.04426) cuts the same 256 rows of transitions the other way, two tokens an expert in place of a
    language, and leaves to the expert to read the language from the summary: theory does not say which is better.
    """

    name = "markov"
    title = "language of the sequence"
    predictions: ClassVar[tuple[Prediction, ...]] = (
        Prediction("LinearRouter", "RandomFrozenRouter", "a learned gate reads the language that attention sums up"),
        Prediction("LinearRouter", "dense", "one network of the active size holds a part of the 256 transitions"),
        Prediction("HashRouter", "dense", "an expert has the transitions from few tokens (Roller et al. 2021)"),
    )

    vocab_size = 32
    causal = True

    def __init__(self, seed: int, steps: int | None = None) -> None:
        super().__init__(seed, steps)
        generator = np.random.default_rng(self.seed_of("world"))
        share_CV = generator.dirichlet(np.ones(self.vocab_size), self.num_domains)
        rows = [generator.dirichlet(CONCENTRATION * share_V + SMOOTHING, self.vocab_size) for share_V in share_CV]
        transitions_CVW = torch.from_numpy(np.stack(rows)) + SMOOTHING
        self.transitions_CVW = transitions_CVW / transitions_CVW.sum(-1, keepdim=True)
        self.stationary_CV = stationary(self.transitions_CVW)
        self.log2_CVW = self.transitions_CVW.log2().float()
        self._cumulative_CVW = self.transitions_CVW.cumsum(-1).float()
        self._start_CV = self.stationary_CV.float()

    @property
    def entropy_rate(self) -> float:
        """Bits per token of the stream, told the language: the mean over languages."""
        row_CV = -(self.transitions_CVW * self.transitions_CVW.log2()).sum(-1)
        return float((self.stationary_CV * row_CV).sum(-1).mean())

    def batch(self, tokens: int, generator: torch.Generator, progress: float) -> Batch:
        """Draw each sequence's language, then the chain from its stationary distribution."""
        length = self.sequence_length
        domain_G = torch.randint(self.num_domains, (tokens // length,), generator=generator)
        token_G = torch.multinomial(self._start_CV[domain_G], 1, generator=generator).squeeze(1)
        chain = [token_G]
        for uniform_G in torch.rand(length, len(domain_G), generator=generator):
            below_GW = self._cumulative_CVW[domain_G, chain[-1]] < uniform_G.unsqueeze(1)
            chain.append(below_GW.sum(1).clamp_max(self.vocab_size - 1))
        chain_GS = torch.stack(chain, dim=1)
        ids_T, next_T = chain_GS[:, :-1].flatten(), chain_GS[:, 1:].flatten()
        return Batch(ids_T, next_T, domain_G.repeat_interleave(length), ids_T)

    def model(self, router: RouterFactory) -> nn.Module:
        """Build a decoder of one block."""
        return Decoder(self, router)

    def token_losses(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the excess bits of each token; one token's may be negative, their mean is not."""
        bits_T = cross_entropy(output, batch.target, reduction="none") / math.log(2)
        return bits_T + self.log2_CVW[batch.domain_T, batch.token_ids_T, batch.target]

    def attention(self, batch: Batch) -> None:
        """Leave it to the model, which has attention of its own."""


class Decoder(nn.Module):
    """Embedding, causal attention, the MoE layer, and a linear map to logits.

    Args:
        task: gives the sizes.
        router: builds the MoE layer's router.
    """

    later_SU: Tensor

    def __init__(self, task: Markov, router: RouterFactory) -> None:
        super().__init__()
        dim = task.dim
        self.length = task.sequence_length
        self.embedding = nn.Embedding(task.vocab_size, dim)
        self.positions = nn.Parameter(torch.randn(self.length, dim) * 0.02)
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(3))
        self.queries_keys_values = nn.Linear(dim, 3 * dim, bias=False)
        self.mixed = nn.Linear(dim, dim, bias=False)
        self.moe = MoE(task.spec, router)
        self.head = nn.Linear(dim, task.vocab_size)
        later_SU = torch.ones(self.length, self.length, dtype=torch.bool).triu(1)
        self.register_buffer("later_SU", later_SU, persistent=False)

    def forward(self, ids_T: Tensor, context: RoutingContext) -> Tensor:
        """Return the logits of the next token, `[T, V]`; the attention is added to what the router sees."""
        h_GSD = self.embedding(ids_T.view(-1, self.length)) + self.positions
        parts = self.queries_keys_values(self.norms[0](h_GSD)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        query_GHSD, key_GHSD, value_GHSD = parts
        # Computed explicitly, with the same numbers for routers that look at it and those that do not.
        logits_GHSU = query_GHSD @ key_GHSD.mT / math.sqrt(query_GHSD.shape[-1])
        attention_GHSU = logits_GHSU.masked_fill(self.later_SU, -torch.inf).softmax(-1)
        h_GSD = h_GSD + self.mixed((attention_GHSU @ value_GHSD).transpose(1, 2).flatten(2))
        seen = context.replace(attention=attention_GHSU.transpose(1, 2).flatten(0, 1))
        h_GSD = h_GSD + self.moe(self.norms[1](h_GSD), seen)
        logits_GSV: Tensor = self.head(self.norms[2](h_GSD))
        return logits_GSV.flatten(0, 1)


def stationary(transitions_CVW: Tensor) -> Tensor:
    """Return the stationary distribution of each irreducible chain, `[C, V]`."""
    num_chains, size, _ = transitions_CVW.shape
    equations_CWV = transitions_CVW.mT - torch.eye(size, dtype=transitions_CVW.dtype)
    equations_CWV[:, -1] = 1.0  # the probabilities sum to 1, in place of the last equation, which follows from the rest
    right_CW = torch.zeros(num_chains, size, dtype=transitions_CVW.dtype)
    right_CW[:, -1] = 1.0
    stationary_CV: Tensor = torch.linalg.solve(equations_CWV, right_CW)
    return stationary_CV
