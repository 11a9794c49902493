"""`RouterWrapper`: the base class of routers around another router, such as a capacity, a replay or a steering."""
# Shape suffixes: T tokens, E experts, K choices per token, V token ids.

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from routerzoo.registry import create_router
from routerzoo.router import Properties, Router, declaring_class
from routerzoo.routing import LayerSpec, Routing, RoutingContext


class RouterWrapper(Router):
    """Base class of routers that change what another one returns, or what it is given.

    A subclass implements `route` and calls `self.router.route` in it. Everything else is the inner router's: its k, its
    updates, and what it declares. A subclass whose properties are narrower says so after `super().__init__`:
    `self.causal &= ByMode(training=False)`. A property that its class declares stands, whatever the inner router's is.

    Args:
        spec: sizes of the layer the router sits in.
        router: name of the inner router, or a function that builds it from the spec.
    """

    def __init__(self, spec: LayerSpec, *, router: str | Callable[[LayerSpec], Router] = "LinearRouter") -> None:
        inner = create_router(router, spec) if isinstance(router, str) else router(spec)
        super().__init__(spec, top_k=inner.top_k, max_top_k=inner.max_top_k)
        self.router = inner
        self.require(*inner.requires)
        for name in Properties._fields:
            if declaring_class(type(self), name) is Router:
                setattr(self, name, getattr(inner, name))
        self.causal_form = inner.causal_form
        self.trained_buffers = frozenset(f"router.{name}" for name in inner.trained_buffers)
        self.needs_updates, self.wants_token_counts = inner.needs_updates, inner.wants_token_counts
        self.wants_feedback, self.default_loss_weights = inner.wants_feedback, inner.default_loss_weights

    @property
    def top_k(self) -> int:
        """The inner router's k."""
        return self.router.top_k

    @top_k.setter
    def top_k(self, value: int) -> None:
        if "router" in self._modules:  # not while the base class is built
            self.router.top_k = value

    @contextmanager
    def override_top_k(self, value: int) -> Iterator[None]:
        """Override the inner router's k for a while."""
        with self.router.override_top_k(value):
            yield

    def select_experts(self, logits_TE: Tensor) -> Tensor:
        """Select as the inner router does."""
        return self.router.select_experts(logits_TE)

    def combine_weights(self, logits_TE: Tensor, experts_TK: Tensor, *, may_drop: bool = True) -> Tensor:
        """Weight as the inner router does."""
        return self.router.combine_weights(logits_TE, experts_TK, may_drop=may_drop)

    def feedback(self, routing: Routing, context: RoutingContext, token_losses_T: Tensor) -> Mapping[str, Tensor]:
        """Return the inner router's."""
        return self.router.feedback(routing, context, token_losses_T)

    def fit_token_counts(self, token_counts_V: Tensor) -> None:
        """Fit the inner router."""
        self.router.fit_token_counts(token_counts_V)

    def begin_step(self, step: int, total_steps: int | None) -> None:
        """Prepare the inner router."""
        self.router.begin_step(step, total_steps)

    def statistics(self, routing: Routing, context: RoutingContext) -> Mapping[str, Tensor]:
        """Return the inner router's."""
        return self.router.statistics(routing, context)

    def update(self, statistics: Mapping[str, Tensor]) -> None:
        """Update the inner router."""
        self.router.update(statistics)

    def freeze(self) -> None:
        """Freeze the inner router too."""
        super().freeze()
        self.router.freeze()

    def scale_initial_logits(self, factor: float) -> None:
        """Scale the inner router's."""
        self.router.scale_initial_logits(factor)

    def extra_repr(self) -> str:
        """Show nothing of the inner router's, which shows itself."""
        return ""
