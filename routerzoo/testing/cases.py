"""What the checks of `routerzoo.testing` run on: routers of random sizes, with hidden states and a full context."""
# Shape suffixes: T tokens, D model width, E experts, K choices per token, N assignments, V token ids,
# G groups of tokens (sequences), S tokens of one group, P slots of one expert.

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from routerzoo.moe.auxiliary_loss import loss_of
from routerzoo.moe.layer import RouterFactory, without_padding
from routerzoo.router import Router
from routerzoo.routing import TOKEN_FIELDS, LayerSpec, Routing, RoutingContext

VOCAB_SIZE = 13
NUM_TASKS = 3
NUM_HEADS = 2
TOTAL_STEPS = 100
TOKEN_COUNTS = torch.arange(1, VOCAB_SIZE + 1)
"""How often each token id occurs, for routers that are fitted to it."""


class CheckFailure(AssertionError):
    """A router does not do what it declares, or what every router must."""


@dataclass(frozen=True)
class Sizes:
    """One example's sizes; a failed check prints the smallest ones that fail.

    Args:
        num_experts: experts of the layer.
        top_k: experts per token, where the router takes a k.
        d_model: width of the hidden states.
        num_sequences: sequences in the batch.
        length: tokens of a sequence.
        step: optimizer steps taken, of `TOTAL_STEPS`: stages of training are passed through.
        seed: of weights and inputs.
    """

    num_experts: int = 8
    top_k: int = 2
    d_model: int = 8
    num_sequences: int = 3
    length: int = 6
    step: int = 0
    seed: int = 0


class RefusedSizesError(ValueError):
    """The router refuses these sizes with a ValueError, as it may."""


def takes_top_k(factory: RouterFactory) -> bool:
    """Whether a factory can be told k."""
    return "top_k" in inspect.signature(factory).parameters


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw random numbers from a seed for a while, and leave the global random state as it was."""
    with torch.random.fork_rng():
        # `torch.manual_seed` formats a traceback for each kind of device that is not in use: most of a check's time.
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(seed)
        yield


class Case:
    """A router of given sizes, and inputs for it.

    Args:
        factory: builds the router.
        sizes: of this example.
        device: where it runs.
    """

    def __init__(self, factory: RouterFactory, sizes: Sizes, device: torch.device) -> None:
        self.factory, self.sizes, self.device = factory, sizes, device
        self.num_tokens = sizes.num_sequences * sizes.length
        self.spec = LayerSpec(
            sizes.d_model,
            sizes.num_experts,
            layer=0,
            num_layers=2,
            vocab_size=VOCAB_SIZE,
            num_positions=max(sizes.length, 1),
            hidden_dim=4 * sizes.d_model,
            num_tasks=NUM_TASKS,
        )

    def build(self, spec: LayerSpec | None = None, *, top_k: int | None = None, seed: int = 0) -> Router:
        """Build a router that has not trained yet.

        Raises:
            RefusedSizesError: it does not come in these sizes.
        """
        with seeded(self.sizes.seed + seed):
            return self.build_here(spec, top_k=top_k)

    def build_here(self, spec: LayerSpec | None = None, *, top_k: int | None = None) -> Router:
        """Build a router from the global random state as it is."""
        return self.construct(spec, top_k=top_k).to(self.device)

    def construct(self, spec: LayerSpec | None = None, *, top_k: int | None = None) -> Router:
        """Build a router from the global random state, on torch's default device."""
        arguments: dict[str, Any] = dict(getattr(self.factory, "checked_with", {}))  # of a class, not of a partial
        if takes_top_k(self.factory):
            arguments["top_k"] = self.sizes.top_k if top_k is None else top_k
        try:
            router: Router = self.factory(self.spec if spec is None else spec, **arguments)
        except ValueError as error:
            raise RefusedSizesError(str(error)) from error
        return router

    def router(self, *, training: bool = False, top_k: int | None = None, seed: int = 0) -> Router:
        """Build a router, and take it to the example's step of training."""
        router = self.build(top_k=top_k, seed=seed)
        self.fit(router)
        if router.needs_updates:
            router.begin_step(self.sizes.step, TOTAL_STEPS)
        return router.train(training)

    def fit(self, router: Router) -> None:
        """Fit a router to the frequencies of token ids, where it wants that."""
        if router.wants_token_counts:
            router.fit_token_counts(TOKEN_COUNTS.to(self.device))

    def hidden(self, seed: int = 1, scale: float = 1.0) -> Tensor:
        """Return random hidden states, float32 `[T, D]`."""
        with seeded(self.sizes.seed + seed):
            return (torch.randn(self.num_tokens, self.sizes.d_model) * scale).to(self.device)

    def context(self, *, ids_seed: int = 1, **changes: Any) -> RoutingContext:
        """Return a context with every field, and an empty carry. There is no padding."""
        tokens = torch.arange(self.num_tokens)
        with seeded(self.sizes.seed + ids_seed):
            token_ids = torch.randint(VOCAB_SIZE, (self.num_tokens,))
            heads = torch.randn(self.num_tokens, NUM_HEADS, max(self.sizes.length, 1))
        length = max(self.sizes.length, 1)
        fields: dict[str, Any] = {
            "token_ids": token_ids,
            "positions": tokens % length,
            "sequence_ids": tokens // length,
            "padding_mask": torch.zeros(self.num_tokens, dtype=torch.bool),
            "task_ids": tokens // length % NUM_TASKS,
            "attention": heads.softmax(-1),
        }
        fields = {name: value.to(self.device) for name, value in fields.items()}
        return RoutingContext(**{**fields, "step": self.sizes.step, "total_steps": TOTAL_STEPS, **changes})

    def route(self, router: Router, x_TD: Tensor, context: RoutingContext, seed: int = 2) -> Routing:
        """Route in a pass of its own, from a random state of its own, so that a router's noise is always the same."""
        with seeded(self.sizes.seed + seed):
            routing: Routing = router(x_TD, context.new_pass())
        return routing

    def route_with_losses(
        self, router: Router, x_TD: Tensor, context: RoutingContext
    ) -> tuple[Routing, dict[str, Tensor]]:
        """Route as a layer does, without padding, and return the raw losses too: the router's own and the declared."""
        context = context.new_pass()
        with seeded(self.sizes.seed + 2):
            routing = without_padding(router(x_TD, context), context)
        losses = dict(routing.losses)
        if router.wants_feedback and router.training:
            losses |= router.feedback(routing, context, self.token_losses(len(x_TD)))
        routing = replace(routing, losses=losses)
        names = [*losses, *(router.default_loss_weights if router.training else ())]
        return routing, {name: loss_of(name, routing, context) for name in names}

    def token_losses(self, num_tokens: int) -> Tensor:
        """Return what stands for the task's loss of each token."""
        return self.hidden(30)[:num_tokens, 0].abs()

    def take(self, context: RoutingContext, places: Tensor | slice) -> RoutingContext:
        """Return the context of some of the tokens."""
        return context.new_pass(**{name: getattr(context, name)[places] for name in TOKEN_FIELDS})

    def effect(self, routing: Routing, x_TD: Tensor) -> Tensor:
        """Return what a routing does to each token, `[T, ...]`: equal effects are equal outputs of any experts.

        For assignments it is the weight of every expert and whether it was chosen; for slots, the output of experts
        that are linear maps; for merged experts, the weight of every expert.
        """
        num_experts, num_tokens = self.sizes.num_experts, len(x_TD)
        if routing.dispatch_GSEP is not None and routing.combine_GSEP is not None:
            groups, length = routing.dispatch_GSEP.shape[:2]
            with seeded(0):
                maps_EDD = torch.randn(num_experts, self.sizes.d_model, self.sizes.d_model).to(x_TD)
            x_GSD = x_TD.view(groups, length, -1)
            slots_GEPD = torch.einsum("gsep,gsd->gepd", routing.dispatch_GSEP.to(x_TD), x_GSD)
            slots_GEPF = torch.einsum("gepd,edf->gepf", slots_GEPD, maps_EDD)
            return torch.einsum("gsep,gepf->gsf", routing.combine_GSEP.to(x_TD), slots_GEPF).reshape(num_tokens, -1)
        if routing.merge_GE is not None:
            return routing.merged_weights()
        pairs = routing.assignments()
        bins = pairs.token_N * (num_experts + 1) + pairs.expert_N.remainder(num_experts + 1)
        effect = pairs.weight_N.new_zeros(2, num_tokens * (num_experts + 1))
        effect = effect.index_add(1, bins, torch.stack([pairs.weight_N, torch.ones_like(pairs.weight_N)]))
        return effect.view(2, num_tokens, num_experts + 1)[:, :, :num_experts].permute(1, 0, 2).flatten(1)


Law = Callable[[Case], None]


class Cases:
    """Examples of a router in many sizes.

    Args:
        factory: builds the router.
        examples: how many random sizes each law is tried on.
        device: where the router runs.
    """

    def __init__(self, factory: RouterFactory, examples: int = 4, device: str | torch.device = "cpu") -> None:
        self.factory, self.examples, self.device = factory, examples, torch.device(device)

    def case(self, sizes: Sizes) -> Case:
        """Return the example of these sizes."""
        return Case(self.factory, sizes, self.device)

    def standard(self, **sizes: int) -> Case:
        """Return an example of sizes that the router takes, near the usual ones.

        Raises:
            CheckFailure: it takes none.
        """
        for num_experts, top_k, d_model in ((8, 2, 8), (8, 1, 8), (16, 4, 16), (16, 8, 32), (64, 8, 64)):
            usual = {"num_experts": num_experts, "top_k": top_k, "d_model": d_model, "num_sequences": 3, "length": 8}
            case = self.case(Sizes(**{**usual, **sizes}))
            try:
                case.build()
            except RefusedSizesError as error:
                refusal = error
            else:
                return case
        raise CheckFailure(f"refuses all sizes that were tried, at last with: {refusal}")

    def each(self, law: Law) -> None:
        """Try a law on usual sizes, at the start and at the end of training, then on random ones.

        Raises:
            CheckFailure: the law does not hold, with the smallest sizes that were found to break it; or the router
                takes no sizes at all.
        """
        for step in (0, TOTAL_STEPS - 1):
            case = self.standard(length=6, step=step)
            try:
                _try(law, case)
            except CheckFailure:
                self._try_random(law, max(self.examples, 20))  # smaller sizes that break it too are easier to read
                raise
        self._try_random(law, self.examples)

    def _try_random(self, law: Law, examples: int) -> None:
        import hypothesis
        from hypothesis import strategies as st

        sizes = st.builds(
            Sizes,
            num_experts=st.sampled_from((1, 2, 3, 4, 5, 8, 16)),
            top_k=st.sampled_from((1, 2, 3, 4)),
            d_model=st.sampled_from((4, 5, 8, 16)),
            num_sequences=st.sampled_from((1, 2, 3, 4)),
            length=st.sampled_from((1, 2, 3, 6)),
            step=st.sampled_from((0, TOTAL_STEPS - 1)),
            seed=st.integers(0, 99).map(lambda seed: 1000 * seed),
        )
        refused: list[str] = []
        tried: list[Sizes] = []

        def example(sizes: Sizes) -> None:
            hypothesis.assume(sizes.top_k <= sizes.num_experts)
            try:
                _try(law, self.case(sizes))
            except RefusedSizesError as error:
                refused.append(str(error))
                hypothesis.reject()
            tried.append(sizes)

        settings = hypothesis.settings(
            max_examples=examples,
            # Not `explain`, which traces every line: a failure would take ten times as long.
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            report_multiple_bugs=False,
            print_blob=False,
        )
        try:
            settings(hypothesis.given(sizes)(example))()
        except hypothesis.errors.Unsatisfiable:
            if tried:
                return
            raise CheckFailure(f"refuses all sizes that were tried, at last with: {refused[-1]}") from None


def _try(law: Law, case: Case) -> None:
    """Try a law on one example, and name the sizes where it fails."""
    sizes = ", ".join(f"{name}={value}" for name, value in vars(case.sizes).items())
    try:
        law(case)
    except RefusedSizesError:
        raise
    except CheckFailure as error:
        raise CheckFailure(f"{error} [{sizes}]") from error
    except Exception as error:
        raise CheckFailure(f"raises {type(error).__name__}: {error} [{sizes}]") from error
