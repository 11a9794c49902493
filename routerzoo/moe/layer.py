"""`MoE`: the layer. Route, dispatch, compute, combine."""
# Shape suffixes: T tokens, D model width.

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Self, final

from torch import Tensor, nn

from routerzoo.moe.dispatch import apply_experts
from routerzoo.moe.experts import Experts, MLPExperts
from routerzoo.moe.grouped_linear import BACKENDS, Backend
from routerzoo.registry import create_router
from routerzoo.router import Router, UnmetRequirementError
from routerzoo.routing import LayerSpec, Routing, RoutingContext

RouterFactory = Callable[[LayerSpec], Router]
ExpertsFactory = Callable[[LayerSpec], Experts]


class NonCausalRouterError(ValueError):
    """A decoder was given a router that looks at later tokens."""


class BatchDependenceWarning(UserWarning):
    """A router that lets one sequence's tokens change another's routing is about to serve."""


@final
class MoE(nn.Module):
    """Mixture-of-Experts layer: a drop-in for a feed-forward network.

    1. The router decides which experts see which tokens.
    2. Tokens are sorted by expert. Dropless: every assignment is computed.
    3. The experts compute.
    4. Each token's results are weighted and added up, and the shared experts' are added to that.

    The layer keeps no record of a call. The routing of a call goes into the context that it was given; read
    `context.routings[layer]` for auxiliary losses and metrics.

    Args:
        spec: sizes of the layer. In place of it, `d_model` and `num_experts` are enough.
        router: name of a router, or a function that builds one from the spec: a class, or a `functools.partial` of it.
        experts: a function that builds the experts from the spec, likewise.
        num_shared_experts: experts of the same shape that see every token, with weight 1 (DeepSeekMoE).
        backend: how the experts' products are computed; see `routerzoo.grouped_linear`.
        allow_non_causal: accept a router that looks at later tokens in a decoder.
        d_model: width of the hidden states, where there is no spec.
        num_experts: number of experts, where there is no spec.

    Raises:
        UnmetRequirementError: the model does not provide what the router requires.
        NonCausalRouterError: a router that is not causal, in a decoder.
        ValueError: sizes or options out of range.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from routerzoo import HyperRouter
        >>> layer = MoE(d_model=32, num_experts=8, router=partial(HyperRouter, top_k=2))
        >>> layer(torch.randn(2, 10, 32)).shape
        torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        spec: LayerSpec | None = None,
        router: str | RouterFactory = "LinearRouter",
        experts: ExpertsFactory = MLPExperts,
        *,
        num_shared_experts: int = 0,
        backend: Backend = "auto",
        allow_non_causal: bool = False,
        d_model: int | None = None,
        num_experts: int | None = None,
    ) -> None:
        super().__init__()
        if spec is None:
            if d_model is None or num_experts is None:
                raise ValueError("a MoE layer needs a spec, or d_model and num_experts")
            spec = LayerSpec(d_model, num_experts)
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        if num_shared_experts < 0:
            raise ValueError(f"num_shared_experts must be at least 0, got {num_shared_experts}")
        self.spec = spec
        self.router = _fitting(
            create_router(router, spec) if isinstance(router, str) else router(spec), allow_non_causal
        )
        self.experts = experts(spec)
        self.experts.backend = backend
        self.shared_experts = experts(replace(spec, num_experts=num_shared_experts)) if num_shared_experts else None
        # Set by models that cannot hand a context to their blocks (see `routerzoo.models.sparsify.provide_context`).
        self.provided_context: RoutingContext | None = None
        # Evaluation is taken for serving, until a trainer that only validates says otherwise.
        self.warns_of_batch_dependence = True

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation; say once if the router is not safe to serve."""
        super().train(mode)
        if not mode and self.warns_of_batch_dependence and not self.router.batch_independent:
            self.warns_of_batch_dependence = False
            warnings.warn(
                f"{type(self.router).__name__} is not batch independent in evaluation: what one sequence of a batch "
                "holds changes how the others are routed, so that one user's input can change another's output (Hayes "
                "et al. 2024, arXiv:2402.05526). Serve sequences one by one, or take a batch-independent router",
                BatchDependenceWarning,
                stacklevel=2,
            )
        return self

    def __getstate__(self) -> dict[str, object]:
        # A copy has no part in the pass that this layer was given a context for, whose tensors belong to a graph.
        return {**self.__dict__, "provided_context": None}

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Tensor:
        """Compute the layer.

        Args:
            x: hidden states `[..., d_model]`.
            context: what the router may look at beside them, each field flattened to one entry per token. The call's
                routing is stored in it.

        Returns:
            Of the shape of `x`.
        """
        context = context if context is not None else self.provided_context
        x_TD = x.reshape(-1, x.shape[-1])
        routing: Routing = self.router(x_TD, context or RoutingContext(compute_aux_losses=False))
        if context is not None:
            routing = without_padding(routing, context)
            context.routings[self.spec.layer] = routing
        y_TD = apply_experts(x_TD, routing, self.experts)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts.dense_forward(x_TD)
        return y_TD.view(*x.shape[:-1], y_TD.shape[1])


def moe_layers(model: nn.Module) -> Iterator[MoE]:
    """Yield the MoE layers of a model in the order of their index."""
    yield from sorted((m for m in model.modules() if isinstance(m, MoE)), key=lambda layer: layer.spec.layer)


def _fitting(router: Router, allow_non_causal: bool) -> Router:
    # A wrapped router's properties are known only now that it is built.
    name = type(router).__name__
    if missing := router.requires - router.spec.provides:
        raise UnmetRequirementError(name, missing)
    if router.spec.decoder and not router.causal and not allow_non_causal:
        instead = f"Its causal form is {router.causal_form}" if router.causal_form else "Choose a causal router"
        raise NonCausalRouterError(
            f"{name} is not causal: a token's routing depends on later tokens, which a decoder has not seen when it "
            f"generates. {instead}, or set allow_non_causal to train one all the same"
        )
    return router


def without_padding(routing: Routing, context: RoutingContext | None) -> Routing:
    """Return a router's answer with padding sent to no expert, as the layer uses it."""
    if context is None or context.padding_mask is None:
        return routing
    if routing.group_T is not None:
        return replace(routing, group_T=routing.group_T.masked_fill(context.padding_mask, -1))
    if routing.experts_TK is None or routing.weights_TK is None:
        return routing
    mask_T1 = context.padding_mask.unsqueeze(1)
    return replace(
        routing,
        experts_TK=routing.experts_TK.masked_fill(mask_T1, -1),
        weights_TK=routing.weights_TK.masked_fill(mask_T1, 0.0),
        may_drop=True,
    )
