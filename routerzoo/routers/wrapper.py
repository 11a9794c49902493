"""`RouterWrapper`: a policy around any router, such as a capacity, a replay or a steering of its logits."""
# Shape suffixes: T tokens, E experts, K choices per token, V token ids.

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from routerzoo.registry import create_router
from routerzoo.router import Router
from routerzoo.routing import LayerSpec, Routing, RoutingContext


class RouterWrapper(Router):
    """Base class of routers that change what another one answers, or what it is asked.

    A subclass implements `route` and calls `self.router.route` in it. Everything else is the inner router's until the
    subclass says otherwise: its k, its stages of training, and what it declares. A property of the whole is the
    conjunction of the two: `return super().causal and ...`.

    Args:
        spec: sizes of the layer the router sits in.
        router: name of the inner router, or a function that builds it from the spec.
    """

    def __init__(self, spec: LayerSpec, *, router: str | Callable[[LayerSpec], Router] = "LinearRouter") -> None:
        inner = create_router(router, spec) if isinstance(router, str) else router(spec)
        super().__init__(spec, top_k=inner.top_k, max_top_k=inner.max_top_k)
        self.router = inner
        self.require(*inner.requires)

    @property
    def causal(self) -> bool:  # type: ignore[override]
        """As the inner router."""
        return self.router.causal

    @property
    def causal_form(self) -> str:  # type: ignore[override]
        """As the inner router."""
        return self.router.causal_form

    @property
    def batch_independent(self) -> bool:  # type: ignore[override]
        """As the inner router."""
        return self.router.batch_independent

    @property
    def tokenwise(self) -> bool:  # type: ignore[override]
        """As the inner router."""
        return self.router.tokenwise

    @property
    def trainable(self) -> bool:  # type: ignore[override]
        """As the inner router."""
        return self.router.trainable

    @property
    def trained_buffers(self) -> frozenset[str]:  # type: ignore[override]
        """The inner router's, under the names that they have here."""
        return frozenset(f"router.{name}" for name in self.router.trained_buffers)

    @property
    def normalized(self) -> bool:  # type: ignore[override]
        """As the inner router."""
        return self.router.normalized

    @property
    def nonnegative(self) -> bool:  # type: ignore[override]
        """As the inner router."""
        return self.router.nonnegative

    @property
    def trains_at_top_1(self) -> bool:  # type: ignore[override]
        """As the inner router."""
        return self.router.trains_at_top_1

    @property
    def compiles(self) -> bool:  # type: ignore[override]
        """As the inner router."""
        return self.router.compiles

    @property
    def wants_feedback(self) -> bool:  # type: ignore[override]
        """As the inner router."""
        return self.router.wants_feedback

    @property
    def default_loss_weights(self) -> Mapping[str, float]:  # type: ignore[override]
        """As the inner router."""
        return self.router.default_loss_weights

    @property
    def top_k(self) -> int:
        """The inner router's k."""
        return self.router.top_k

    @top_k.setter
    def top_k(self, value: int) -> None:
        if "router" in self._modules:  # not while the base class is built
            self.router.top_k = value

    def select_experts(self, logits_TE: Tensor) -> Tensor:
        """Choose as the inner router does."""
        return self.router.select_experts(logits_TE)

    def combine_weights(self, logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """Weigh as the inner router does."""
        return self.router.combine_weights(logits_TE, experts_TK)

    def feedback(self, routing: Routing, context: RoutingContext, token_losses_T: Tensor) -> Mapping[str, Tensor]:
        """Pass it on."""
        return self.router.feedback(routing, context, token_losses_T)

    def fit_token_counts(self, token_counts_V: Tensor) -> None:
        """Pass it on."""
        self.router.fit_token_counts(token_counts_V)

    def on_step_start(self, step: int, total_steps: int) -> None:
        """Pass it on."""
        self.router.on_step_start(step, total_steps)

    def before_optimizer_step(self) -> None:
        """Pass it on."""
        self.router.before_optimizer_step()

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
