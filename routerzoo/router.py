"""`Router`: the base class of every routing method, and the properties that it declares."""
# Shape suffixes: T tokens, D model width, E experts, K choices per token.

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from routerzoo.routing import CONTEXT_FIELDS, LayerSpec, Routing, RoutingContext


class UnmetRequirementError(ValueError):
    """A router needs something that the model around it does not provide.

    Args:
        router: name of the router.
        missing: the `RoutingContext` fields, or `LayerSpec` sizes, that are missing.
        hint: what would provide them.
    """

    def __init__(self, router: str, missing: frozenset[str], hint: str = "") -> None:
        what = " and ".join(sorted(missing))
        super().__init__(f"{router} requires {what}, which this model does not provide{hint and f': {hint}'}")
        self.router, self.missing = router, missing


class Router(nn.Module, ABC):
    """Sends each token to some of a layer's experts.

    A subclass implements `route`. It is called in float32 with autocast off, so that a near-tie is decided the same way
    at every precision; `forward` casts the weights back to the hidden dtype. A concrete router is final: variants
    compose or wrap. What training changes and inference needs belongs into parameters and buffers. A hidden state that
    is NaN gives weights that are NaN, or an error; never a plausible choice.

    Class attributes declare the router's properties. `routerzoo.testing.check_router` proves them.

    Args:
        spec: sizes of the layer that the router sits in.
        top_k: experts per token.
        max_top_k: the largest k that the router can do; by default the number of experts.

    Raises:
        ValueError: `top_k` below 1 or above `max_top_k`.
        UnmetRequirementError: the model does not provide what the router requires.
    """

    paper: ClassVar[str] = ""
    """Where the method was published: authors, venue and year, address."""
    inspired_by: ClassVar[bool] = False
    """True where the source could not be read in full, so that faithfulness cannot be claimed."""
    requires: frozenset[str] = frozenset()
    """The `RoutingContext` fields that `route` reads."""
    causal: bool = True
    """A token's routing ignores later tokens. A property that looks at `self.training`, where evaluation differs."""
    causal_form: ClassVar[str] = ""
    """What to use instead in a decoder, where the router is not causal: the error names it."""
    batch_independent: bool = True
    """A token's routing ignores other sequences of the batch. A property, where evaluation differs."""
    tokenwise: bool = True
    """In evaluation a token is routed the same when it is routed alone, as generation does."""
    trainable: bool = True
    """The router has parameters that learn."""
    trained_buffers: frozenset[str] = frozenset()
    """The buffers that training changes (running statistics, frozen copies). All others stay as they were drawn."""
    normalized: bool = False
    """A token's weights sum to 1."""
    nonnegative: bool = True
    """No weight is below 0."""
    trains_at_top_1: bool = True
    """The task's gradient reaches the router's parameters at top_k = 1 (it does not where one weight is always 1)."""
    compiles: bool = True
    """`torch.compile(fullgraph=True)` takes the router."""
    wants_feedback: bool = False
    """The router has losses that depend on how well each token was predicted: see `feedback`."""
    default_loss_weights: ClassVar[Mapping[str, float]] = {}
    """The published coefficient of each auxiliary loss, used where the task is given none."""

    def __init__(self, spec: LayerSpec, *, top_k: int = 2, max_top_k: int | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.require()
        self.is_frozen = False
        self.max_top_k = spec.num_experts if max_top_k is None else max_top_k
        self.top_k = top_k

    def require(self, *names: str) -> None:
        """Require further context fields, where an argument makes them necessary.

        Raises:
            UnmetRequirementError: the model does not provide one.
        """
        if names:
            self.requires = self.requires | frozenset(names)
        if missing := self.requires - self.spec.provides:
            raise UnmetRequirementError(type(self).__name__, missing)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A checkpoint made in Python names the class among its hyper-parameters, and is read with weights_only=True.
        torch.serialization.add_safe_globals([cls])
        if unknown := frozenset(cls.requires) - CONTEXT_FIELDS:
            raise TypeError(
                f"{cls.__name__}.requires names {', '.join(sorted(unknown))}; a context has {CONTEXT_FIELDS}"
            )

    @classmethod
    def __subclasses__(cls) -> list[type]:
        """List the direct subclasses, but none that has a registered router's name without being it.

        Configs name classes by their short names, which jsonargparse looks up here. A package that happens to define a
        second LinearRouter would otherwise make the name ambiguous in everybody's configs.
        """
        from routerzoo.registry import is_shadowed

        return [subclass for subclass in type.__subclasses__(cls) if not is_shadowed(subclass)]

    @property
    def top_k(self) -> int:
        """Experts per token. It may change over training and is part of the `state_dict`."""
        return self._top_k

    @top_k.setter
    def top_k(self, value: int) -> None:
        if not 1 <= value <= self.max_top_k:
            bound = "num_experts" if self.max_top_k == self.spec.num_experts else "the largest k of this router"
            raise ValueError(f"top_k must be between 1 and {bound} = {self.max_top_k}, got {value}")
        self._top_k = value

    @abstractmethod
    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Decide in float32 where each token goes.

        Args:
            x_TD: hidden states, float32 (float64 where the model is).
            context: what else is known; the fields in `requires` are present.
        """

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Routing:
        """Route T tokens.

        Args:
            x_TD: hidden states `[tokens, d_model]`, any floating dtype.
            context: what else the router may look at; not needed where `requires` is empty.

        Returns:
            The routing, its weights in the dtype of `x_TD`.

        Raises:
            ValueError: hidden states of another width, or a required context field that is missing.
        """
        context = context if context is not None else RoutingContext()
        if x_TD.ndim != 2 or x_TD.shape[1] != self.spec.d_model:
            raise ValueError(
                f"{type(self).__name__} takes hidden states [tokens, {self.spec.d_model}], got {list(x_TD.shape)}"
            )
        for name in self.requires:
            value = getattr(context, name)
            if value is None:
                raise ValueError(f"{type(self).__name__} requires {name}; pass RoutingContext({name}=...)")
            # One entry a token; attention alone has more dimensions, behind that one.
            found = value.shape[:1] if name == "attention" else getattr(value, "shape", None)
            if isinstance(value, Tensor) and found != x_TD.shape[:1]:
                raise ValueError(f"{name} has shape {list(value.shape)}, the hidden states are {list(x_TD.shape)}")
        with torch.autocast(x_TD.device.type, enabled=False):
            routing = self.route(x_TD if x_TD.dtype == torch.float64 else x_TD.float(), context)
        return _with_weights_like(x_TD, routing)

    def select_experts(self, logits_TE: Tensor) -> Tensor:
        """Choose experts by logits alone, as evaluation does. Optional: for policies around the router.

        Such as steering, which changes logits, and a capacity, which rules experts out by a logit of minus infinity.

        Args:
            logits_TE: of the kind that this router's routings hold.

        Returns:
            int64 `[tokens, k]`, -1 for none; an expert that is ruled out only where there are fewer than k others.

        Raises:
            NotImplementedError: the router does not choose by logits alone.
        """
        raise NotImplementedError(f"{type(self).__name__} does not choose by logits alone; it implements no choose")

    def combine_weights(self, logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """Weigh experts as the router would, had it chosen them, with gradients. Optional, like `select_experts`.

        Args:
            logits_TE: of the kind that this router's routings hold.
            experts_TK: int64, different experts for each token; -1 for none.

        Returns:
            Weights `[tokens, k]`; 0 for none.

        Raises:
            NotImplementedError: the router's weights do not follow from logits and experts.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot weigh experts by logits; it implements no weigh")

    def feedback(self, routing: Routing, context: RoutingContext, token_losses_T: Tensor) -> Mapping[str, Tensor]:
        """Return losses that need to know what came of a routing, as reinforcement learning does.

        Called in training where `wants_feedback`, once the task's loss is known. What `route` needs to keep for it goes
        into the context's `carry`, under a key that names the class and the layer.

        Args:
            routing: this router's answer.
            context: as `route` had it.
            token_losses_T: the task's loss of each token, in nats, without gradient; 0 for padding and for tokens
                without a target.

        Returns:
            Raw scalars by name, as `Routing.losses`.
        """
        return {}

    def fit_token_counts(self, token_counts_V: Tensor) -> None:
        """Learn from the training split how often each token id occurs, once, before the first step.

        Args:
            token_counts_V: int64 `[vocab_size]`.
        """

    def on_step_start(self, step: int, total_steps: int) -> None:
        """Prepare for a training step; called before its forward pass.

        Args:
            step: optimiser steps taken so far.
            total_steps: optimiser steps that the run will take.
        """

    def before_optimizer_step(self) -> None:
        """Adjust gradients or buffers once they are complete (accumulated, reduced) before the optimiser reads them."""

    def freeze(self) -> None:
        """Learn no more: parameters get no gradient, and nothing is adapted. For fine-tuning with a fixed routing.

        Gradients still pass through to the hidden states, and the losses are as before.
        """
        self.requires_grad_(False)
        self.is_frozen = True

    def scale_initial_logits(self, factor: float) -> None:
        """Multiply the logits' scale by a factor, before training. Nothing to do in a router without logits.

        So that routers can be compared from the same initial scale; see `routerzoo.routers.logit_scale`.

        Raises:
            NotImplementedError: this router cannot.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement scale_initial_logits")

    def get_extra_state(self) -> dict[str, int]:
        """Return what the `state_dict` holds beside parameters and buffers."""
        return {"top_k": self.top_k}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Take what `get_extra_state` gave."""
        self.top_k = state["top_k"]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A gate rounded to 16 bits decides near-ties at random, so `.half()`, `.bfloat16()` and 16-bit trainers
        # leave routers in their own precision.
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and moved.element_size() < 4:
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"d_model={self.spec.d_model}, num_experts={self.spec.num_experts}, top_k={self.top_k}"


def _with_weights_like(x_TD: Tensor, routing: Routing) -> Routing:
    names = ("weights_TK", "weight_N", "dispatch_GSEP", "combine_GSEP", "merge_GE")
    given = {name: value for name in names if (value := getattr(routing, name)) is not None}
    if all(value.dtype == x_TD.dtype for value in given.values()):
        return routing
    return replace(routing, **{name: value.to(x_TD.dtype) for name, value in given.items()})
