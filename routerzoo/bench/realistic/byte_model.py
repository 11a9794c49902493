"""`ByteLanguageModel`: the task of the realistic tier, bytes of clearly distinct domains."""
# Shape suffixes: T tokens, G sequences, S tokens of a sequence, M micro-batches, C domains.

from __future__ import annotations

import functools
import hashlib
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routerzoo.bench.realistic.generated import GENERATED, generated_bytes
from routerzoo.bench.realistic.sources import REAL, Text, own
from routerzoo.bench.registry import register_task
from routerzoo.bench.task import Batch, BenchTask, Prediction
from routerzoo.errors import UserError
from routerzoo.models.decoder import Decoder
from routerzoo.moe.experts import MLPExperts
from routerzoo.moe.layer import RouterFactory
from routerzoo.registry import did_you_mean
from routerzoo.routing import RoutingContext

TRAIN_BYTES, TEST_BYTES = 160_000, 20_000
"""Of a generated domain: more than a run trains on."""


class ByteDecoder(nn.Module):
    """A `Decoder` that takes the routers' context from its caller, and returns a row for each token.

    Args:
        decoder: the model.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, ids_GS: Tensor, context: RoutingContext) -> Tensor:
        """Return next-byte logits, `[T, 256]`."""
        logits_GSV: Tensor = self.decoder(ids_GS, context=context)[0]
        return logits_GSV.flatten(0, 1)


@register_task
class ByteLanguageModel(BenchTask):
    """A causal language model of bytes; each micro-batch is text of one domain.

    The idea is that of the MoE Routing Testbed (arXiv, April 2026, of which only the abstract was read): on a mix of
    clearly distinct domains, a reference router that receives the domain label bounds from above what routing is worth,
    and small models differ visibly. The reference (`oracle`) gives each domain k experts, with equal weights.
    It is a strong bound rather than a proven one: a router that shares experts between domains, or specializes by token
    within one, may pass it.

    A step is eight micro-batches of two sequences, so that the scope of balancing matters, as it does where a
    micro-batch of a large model holds a few sequences of one corpus (Qiu et al. 2025, arXiv:2501.11873). Evaluation is
    on text that training has not seen, of all domains alike.

    Class attributes beside those of `BenchTask` are the domains and the sizes of the decoder.
    """

    name = "bytes"
    title = "domain of the text"
    tier = "realistic"
    predictions = (
        Prediction("all processes", "blind", "a router that sees the text tells more than chance"),
        Prediction("oracle", "dense", "experts of its own hold what one network must share among all domains"),
        Prediction("accumulated batch", "micro-batch", "balance over few sequences forbids domains (Qiu et al. 2025)"),
        Prediction("all processes", "sequence", "balance over few sequences forbids domains (Qiu et al. 2025)"),
    )

    dim = 96
    hidden_dim = 96
    vocab_size = 256
    tokens = 1024
    sequence_length = 64
    steps = 500
    warm_up_steps = 100
    max_gradient_norm = 1.0
    evaluation_tokens = 16_384
    micro_batches = 8
    causal = True

    num_blocks: ClassVar[int] = 2
    num_heads: ClassVar[int] = 4
    domains: ClassVar[tuple[str, ...]] = (*REAL, *GENERATED)
    """Names of built-in domains, or `name=path` of a text file or a folder of them."""
    packed: ClassVar[bool] = False
    """Each sequence is two documents of domains of their own, with the boundary between them at a random place."""

    def __init__(self, seed: int, steps: int | None = None) -> None:
        super().__init__(seed, steps)
        self._texts = [
            tuple(torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in text[:2])
            for text in (self._text(domain) for domain in self.domains)
        ]

    def _text(self, domain: str) -> Text:
        if domain not in GENERATED:
            return _fixed_text(domain, self.sequence_length)
        train = generated_bytes(domain, TRAIN_BYTES, self.seed_of(f"{domain}/train"))
        return Text(train, generated_bytes(domain, TEST_BYTES, self.seed_of(f"{domain}/test")), "generated")

    @classmethod
    def with_options(cls, options: str) -> type[BenchTask]:
        """Return the task with other domains, separated by commas; each gets k experts.

        Raises:
            UserError: fewer than two domains, a name given twice, or one that is not known or cannot be read.
        """
        domains = tuple(options.split(","))
        names = [domain.partition("=")[0] for domain in domains]
        if len(set(names)) < max(len(names), 2):
            raise UserError(f"a mix has at least two domains, each with a name of its own, got {options or 'none'}")
        changes = {
            "name": f"{cls.name}-{'-'.join(names)}",
            "domains": domains,
            "num_domains": len(domains),
            "num_experts": cls.top_k * len(domains),
            "predictions": (),
            "__doc__": cls.__doc__,
            "__module__": cls.__module__,
        }
        other: type[ByteLanguageModel] = type(cls.__name__, (cls,), changes)
        other.data()  # says what is missing
        return other

    @classmethod
    def data(cls) -> str:
        """Name the texts that are read, with versions and a digest."""
        texts = [_fixed_text(domain, cls.sequence_length) for domain in cls.domains if domain not in GENERATED]
        digest = hashlib.sha256()
        for text in texts:
            digest.update(text.train + text.test)
        return "; ".join([*(text.source for text in texts), f"digest {digest.hexdigest()[:12]}"])

    def batch(self, tokens: int, generator: torch.Generator, progress: float) -> Batch:
        """Draw windows of text: in training a domain for each micro-batch, in evaluation all domains in turn."""
        sequences = tokens // self.sequence_length
        held_out = generator.initial_seed() in (self.seed_of("evaluation"), self.seed_of("curve"))
        if held_out:
            domain_G = torch.arange(sequences) % self.num_domains
        else:
            size = self.tokens // self.sequence_length // self.micro_batches
            domain_M = torch.randint(self.num_domains, (-(-sequences // size),), generator=generator)
            domain_G = domain_M.repeat_interleave(size)[:sequences]
        ids_GS = self._windows(domain_G, held_out, generator)
        domain_GS = domain_G.unsqueeze(1).expand(-1, self.sequence_length)
        if self.packed:
            other_G = torch.randint(self.num_domains, (sequences,), generator=generator)
            length = self.sequence_length
            cut_G1 = torch.randint(length // 4, length - length // 4, (sequences, 1), generator=generator)
            behind_GS = torch.arange(length + 1) >= cut_G1
            ids_GS = torch.where(behind_GS, self._windows(other_G, held_out, generator), ids_GS)
            domain_GS = torch.where(behind_GS[:, :-1], other_G.unsqueeze(1), domain_GS)
        given_GS = ids_GS[:, :-1]
        return Batch(given_GS, ids_GS[:, 1:].flatten(), domain_GS.flatten(), given_GS.flatten())

    def _windows(self, domain_G: Tensor, held_out: bool, generator: torch.Generator) -> Tensor:
        length = self.sequence_length + 1
        windows = []
        for domain in domain_G.tolist():
            text_N = self._texts[domain][held_out]
            start = int(torch.randint(len(text_N) - length + 1, (), generator=generator))
            windows.append(text_N[start : start + length])
        return torch.stack(windows).long()

    def model(self, router: RouterFactory) -> nn.Module:
        """Build a decoder with a MoE layer in each block."""
        decoder = Decoder(
            self.vocab_size,
            router,
            partial(MLPExperts, hidden_dim=self.hidden_dim),
            num_experts=self.num_experts,
            d_model=self.dim,
            num_blocks=self.num_blocks,
            num_heads=self.num_heads,
            max_length=self.sequence_length,
            allow_non_causal=False,
        )
        return ByteDecoder(decoder)

    def token_losses(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy of each byte, in nats."""
        return F.cross_entropy(output, batch.target, reduction="none")

    def attention(self, batch: Batch) -> Tensor | None:
        """Return None: the decoder tells its own."""
        return None


@register_task
class PackedByteLanguageModel(ByteLanguageModel):
    """The same with two documents in each sequence, as packed pretraining data has them.

    Attention does not stop at the boundary, so that a router has to notice it, and a micro-batch mixes up to four
    domains, which narrows the gap between the scopes of balancing.
    """

    name = "bytes-packed"
    title = "domain of the text, two documents a sequence"
    packed = True


@functools.cache
def _fixed_text(domain: str, sequence_length: int) -> Text:
    name, given, path = domain.partition("=")
    if not given and name not in REAL:
        raise UserError(
            f"unknown domain {name!r}{did_you_mean(name, [*REAL, *GENERATED])} There are "
            f"{', '.join([*REAL, *GENERATED])}, and name=path of a text of your own"
        )
    text = own(name, path) if given else REAL[name]()
    if min(len(text.train), len(text.test)) <= sequence_length:
        raise UserError(
            f"the domain {name} has {len(text.train)} bytes to train on and {len(text.test)} to evaluate on, fewer "
            f"than a sequence of {sequence_length}: give more text"
        )
    return text
