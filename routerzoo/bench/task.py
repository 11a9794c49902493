"""`BenchTask`: one task of the router benchmark, whose latent domains and ideal routing are known."""
# Shape suffixes: T tokens, D model width, K choices per token, C domains, G sequences, S tokens of one sequence.

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from routerzoo.errors import UserError
from routerzoo.moe.layer import MoE, RouterFactory
from routerzoo.routing import LayerSpec


@dataclass(frozen=True)
class Batch:
    """Tokens of a task, sequence after sequence.

    Args:
        x: what the model takes; of the default model, hidden states float32 `[T, D]`.
        target: what the loss compares the model's output with; by default `[T, D]`.
        domain_T: int64, the latent domain of each token; -1 where it has none.
        token_ids_T: int64, below the task's `vocab_size`. Random where ids say nothing.
        need_T: how many experts each token needs, where that differs.
    """

    x: Tensor
    target: Tensor
    domain_T: Tensor
    token_ids_T: Tensor
    need_T: Tensor | None = None

    def split(self, parts: int) -> list[Batch]:
        """Cut it into micro-batches of whole sequences."""
        if parts == 1:
            return [self]
        fields = {name: (None,) * parts if v is None else v.chunk(parts) for name, v in vars(self).items()}
        cut = zip(*fields.values(), strict=True)
        return [replace(self, **dict(zip(fields, values, strict=True))) for values in cut]


@dataclass(frozen=True)
class Prediction:
    """What theory or a paper says of two routers in a task: the first has the lower regret.

    Args:
        better: name of a router or of a control (`oracle`, `blind`, `dense`).
        worse: likewise.
        source: who says so, or the argument in a sentence.
    """

    better: str
    worse: str
    source: str


class BenchTask(ABC):
    """One task. A subclass draws its world from a seed and its batches from a generator.

    The docstring of a subclass states the theory and its sources. Class attributes are the sizes. What is drawn once
    (centers, maps) is drawn in `__init__`, from `self.generator("world")`; an instance is never changed by `batch`.

    The default model is one MoE layer, `y = layer(x, context)`, and the default loss the mean squared error. A task
    with a model of its own overrides `model` and `token_losses`.

    Args:
        seed: everything that the task draws follows from it.
        steps: optimizer steps of the run.
    """

    name: ClassVar[str] = ""
    """How commands and rows name the task: lower case, with dashes."""
    title: ClassVar[str] = ""
    """What tells the domain, in a few words, for tables."""
    tier: ClassVar[str] = "exact"
    """`bench --tier` takes the tasks of one tier: `exact` or `realistic`."""
    predictions: ClassVar[tuple[Prediction, ...]] = ()
    """Orders of regret that theory or papers predict. The record tests them."""

    dim: ClassVar[int] = 32
    num_experts: ClassVar[int] = 16
    hidden_dim: ClassVar[int] = 32
    """Width of each expert."""
    top_k: ClassVar[int] = 2
    """Experts per token of every router that takes a k."""
    num_domains: ClassVar[int] = 8
    vocab_size: ClassVar[int] = 64
    tokens: ClassVar[int] = 512
    """Of a training step; a multiple of `sequence_length`."""
    micro_batches: ClassVar[int] = 1
    """Parts of a training step, which losses of a micro-batch, or accumulated over micro-batches, distinguish."""
    sequence_length: ClassVar[int] = 32
    """Tokens of a sequence, for routers that mix tokens or choose within a sequence."""
    steps: ClassVar[int] = 200
    warm_up_steps: ClassVar[int] = 20
    """Steps over which the learning rate rises, at most a fifth of the run; then it falls by a cosine."""
    max_gradient_norm: ClassVar[float] = math.inf
    """Gradients are clipped to this norm, of all parameters together."""
    evaluation_tokens: ClassVar[int] = 4096
    """Of the final evaluation; a multiple of `sequence_length`."""
    causal: ClassVar[bool] = False
    """A token must not see later ones: routers that are not causal are refused."""
    provides: ClassVar[frozenset[str]] = frozenset(
        {"token_ids", "positions", "sequence_ids", "attention", "step", "total_steps"}
    )
    """The `RoutingContext` fields that routers may require. `task_ids`, where named here, are the domains."""

    def __init__(self, seed: int, steps: int | None = None) -> None:
        self.seed = seed
        self.num_steps = type(self).steps if steps is None else steps

    @abstractmethod
    def batch(self, tokens: int, generator: torch.Generator, progress: float) -> Batch:
        """Draw a batch.

        Args:
            tokens: how many; a multiple of `sequence_length`.
            generator: where all random numbers come from.
            progress: share of training that is over, from 0 to 1; the final evaluation has 1.
        """

    @classmethod
    def with_options(cls, options: str) -> type[BenchTask]:
        """Return the task with what follows its name and a colon.

        Raises:
            UserError: it has no options, or these are none.
        """
        raise UserError(f"the task {cls.name} has no options, got {options!r}")

    @classmethod
    def data(cls) -> str:
        """Name what the task reads beside what it draws, with versions: runs on other data are not comparable."""
        return ""

    @property
    def spec(self) -> LayerSpec:
        """Sizes of the MoE layer, and what its router may require."""
        return LayerSpec(
            self.dim,
            self.num_experts,
            layer=0,
            vocab_size=self.vocab_size,
            num_positions=self.sequence_length,
            hidden_dim=self.hidden_dim,
            num_tasks=self.num_domains if "task_ids" in self.provides else None,
            provides=self.provides,
            decoder=self.causal,
        )

    def model(self, router: RouterFactory) -> nn.Module:
        """Build the model, called as `model(batch.x, context)`; by default one MoE layer.

        The global generator is seeded before the call, and a layer draws its router from a generator of its own, so
        that all other weights are the same for every router.

        Args:
            router: builds the router of a MoE layer from its spec.
        """
        return MoE(self.spec, router)

    def token_losses(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the loss of each token, `[T]`, whose mean is trained and evaluated; by default the squared error."""
        return (output - batch.target).square().mean(-1)

    def oracle(self, batch: Batch) -> Tensor:
        """Return the experts that ideal routing chooses, int64 `[T, K]`, -1 for none; each has an equal weight.

        By default a domain has `num_experts // num_domains` experts of its own, at most `top_k`; a token without a
        domain has none.
        """
        own = min(self.num_experts // self.num_domains, self.top_k)
        experts_TK = batch.domain_T.unsqueeze(1) * own + torch.arange(own)
        return experts_TK.masked_fill(batch.domain_T.unsqueeze(1) < 0, -1)

    def attention(self, batch: Batch) -> Tensor | None:
        """Return what routers that require `attention` look at, `[T, heads, S]`.

        By default the softmax of the hidden states' scaled products within a sequence, as one attention head with
        identity maps computes it. A model with attention of its own returns None here, and puts its attention into the
        context.
        """
        x_GSD = batch.x.view(-1, self.sequence_length, batch.x.shape[-1])
        logits_GSS = x_GSD @ x_GSD.transpose(1, 2) / math.sqrt(x_GSD.shape[-1])
        if self.causal:
            later_SS = torch.ones(self.sequence_length, self.sequence_length, dtype=torch.bool).triu(1)
            logits_GSS = logits_GSS.masked_fill(later_SS, -torch.inf)
        return logits_GSS.softmax(-1).flatten(0, 1).unsqueeze(1)

    def generator(self, purpose: str) -> torch.Generator:
        """Return a generator whose numbers follow from the task's name, its seed and a purpose."""
        return torch.Generator().manual_seed(self.seed_of(purpose))

    def seed_of(self, purpose: str) -> int:
        """Return the seed of `generator`."""
        digest = hashlib.sha256(f"{self.name}/{self.seed}/{purpose}".encode()).digest()
        return int.from_bytes(digest[:8]) >> 1

    def random_ids(self, tokens: int, generator: torch.Generator) -> Tensor:
        """Draw token ids that say nothing."""
        return torch.randint(self.vocab_size, (tokens,), generator=generator)


def check_task(cls: type[BenchTask]) -> None:
    """Draw a small batch of a task, and check that it is what the benchmark expects.

    Raises:
        UserError: it is not, or cannot be drawn; the message says what is wrong.
    """
    length, tokens = cls.sequence_length, 2 * cls.sequence_length
    for name in ("tokens", "evaluation_tokens"):
        if getattr(cls, name) % length:
            raise UserError(f"{cls.name}: {name} must be a multiple of sequence_length = {length}")
    try:
        task = cls(0)
        batch = task.batch(tokens, task.generator("training"), 0.0)
        experts_TK = task.oracle(batch)
    except Exception as error:
        raise UserError(f"the task {cls.name} cannot be drawn: {type(error).__name__}: {error}") from error
    ids_T, domain_T = batch.token_ids_T, batch.domain_T
    for what, values, limit in (("token id", ids_T, cls.vocab_size), ("domain", domain_T, cls.num_domains)):
        if values.shape != (tokens,):
            raise UserError(f"{cls.name}: a batch of {tokens} tokens has {what}s of shape {list(values.shape)}")
        if values.max() >= limit or values.min() < -1:
            wrong = values.max() if values.max() >= limit else values.min()
            raise UserError(f"{cls.name}: there is a {what} {int(wrong)}, and only {limit} of them")
    if (
        experts_TK.ndim != 2
        or len(experts_TK) != tokens
        or not experts_TK.numel()
        or experts_TK.max() >= cls.num_experts
    ):
        raise UserError(
            f"{cls.name}: oracle must return experts below {cls.num_experts}, [tokens, k], got {list(experts_TK.shape)}"
        )


def linear_maps(num_domains: int, dim: int, generator: torch.Generator, rank: int = 4) -> Tensor:
    """Draw one random linear map of low rank for each domain, `[C, D, D]`; `W x` varies about as much as `x` does.

    Args:
        num_domains: how many.
        dim: their width.
        generator: where they are drawn from.
        rank: of each.
    """
    left_CDR = torch.randn(num_domains, dim, rank, generator=generator)
    right_CRD = torch.randn(num_domains, rank, dim, generator=generator)
    return left_CDR @ right_CRD / math.sqrt(rank * dim)


def apply_maps(maps_CDD: Tensor, domain_T: Tensor, x_TD: Tensor) -> Tensor:
    """Return `W[domain] x` for each token, `[T, D]`; 0 for a token without a domain."""
    y_TD = torch.zeros_like(x_TD)
    for domain, map_DD in enumerate(maps_CDD):  # gathering a map for each token takes four times as long
        chosen_N = (domain_T == domain).nonzero().squeeze(1)
        y_TD.index_copy_(0, chosen_N, x_TD[chosen_N] @ map_DD.T)
    return y_TD
