"""`Router`: the base class of every routing method; `LogitRouter`: the base class of most."""
# Shape suffixes: T tokens, D model width, E experts, K choices per token, V token ids.

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from routerzoo.functional.ids import checked_ids
from routerzoo.functional.initialization import Reinitializable
from routerzoo.functional.topk import (
    ScoreFunction,
    apply_score_fn,
    checked_score_fn,
    gather_weights,
    softmax_at,
    topk_indices,
)
from routerzoo.routing import CONTEXT_FIELDS, LayerSpec, Routing, RoutingContext, checked_whole


class UnmetRequirementError(ValueError):
    """A router needs something that the model around it does not provide.

    Args:
        router: name of the router.
        missing: the `RoutingContext` fields, or `LayerSpec` sizes, that are missing.
        hint: what would provide them.
    """

    def __init__(self, router: str, missing: frozenset[str], hint: str = "") -> None:
        what = " and ".join(sorted(missing))
        sizes = sorted(missing & LayerSpec.__dataclass_fields__.keys())
        if not hint and sizes:
            hint = f"give LayerSpec({', '.join(f'{name}=...' for name in sizes)})"
        elif not hint:
            hint = "fill it in on every call, and name it in LayerSpec.provides"
        super().__init__(f"{router} requires {what}, which this model does not provide{hint and f': {hint}'}")
        self.router, self.missing = router, missing


@dataclass(frozen=True)
class ByMode:
    """A declared property that differs between training and evaluation.

    Args:
        training: its value in training.
        evaluation: its value in evaluation.

    Example:
        >>> ByMode(training=False) & True
        ByMode(training=False, evaluation=True)
    """

    training: bool = True
    evaluation: bool = True

    def __and__(self, other: Declared) -> ByMode:
        other = other if isinstance(other, ByMode) else ByMode(other, other)
        return ByMode(self.training and other.training, self.evaluation and other.evaluation)

    def __rand__(self, other: bool) -> ByMode:
        return self & other


Declared = bool | ByMode


class Properties(NamedTuple):
    """What a router declares, in one mode. `routerzoo.testing.check_router` proves it."""

    causal: bool
    batch_independent: bool
    tokenwise: bool
    trainable: bool
    normalized: bool
    nonnegative: bool
    trains_at_top_1: bool
    compiles: bool


@dataclass(frozen=True)
class LossWeight:
    """The coefficient of an auxiliary loss, as its source applies it.

    Args:
        value: what the loss is multiplied with.
        over_layers: how the layers of a model are reduced: their `sum` (Switch, V-MoE, Megatron), their `mean`
            (MegaBlocks, BlockFFN), or `pooled`: the loss of the tokens of all layers taken together (transformers).
    """

    value: float
    over_layers: Literal["sum", "mean", "pooled"] = "sum"

    def __post_init__(self) -> None:
        if self.over_layers not in ("sum", "mean", "pooled"):
            raise ValueError(f"over_layers must be sum, mean or pooled, got {self.over_layers!r}")


class Router(Reinitializable, ABC):
    """Sends each token to some of a layer's experts.

    A subclass implements `route`; most are a `LogitRouter` and implement `logits` alone. A concrete router is final:
    variants compose or wrap. Keep all learned or adapted state in parameters or buffers. A hidden state that is NaN
    gives NaN weights, or an error; never a plausible choice.

    Class attributes, or attributes set in `__init__`, declare the router's properties: a bool, or a `ByMode` where
    training and evaluation differ. `routerzoo.testing.check_router` proves them.

    Args:
        spec: sizes of the layer that the router sits in.
        top_k: experts per token.
        max_top_k: the largest k that the router can do; by default the number of experts.

    Raises:
        ValueError: `top_k` is no whole number, below 1 or above `max_top_k`.
        UnmetRequirementError: the model does not provide what the router requires.
    """

    paper: str = ""
    """Where the method was published: authors, venue and year, address."""
    inspired_by: bool = False
    """True where the source could not be read in full, so that faithfulness cannot be claimed."""
    requires: frozenset[str] = frozenset()
    """The `RoutingContext` fields that `route` reads."""
    causal: Declared = True
    """A token's routing ignores later tokens."""
    causal_form: str = ""
    """What to use instead in a decoder, where the router is not causal: the error names it."""
    batch_independent: Declared = True
    """A token's routing ignores other sequences of the batch."""
    tokenwise: Declared = True
    """In evaluation a token is routed the same when it is routed alone, as generation does."""
    trainable: Declared = True
    """The router has parameters that learn."""
    normalized: Declared = False
    """A token's weights sum to 1."""
    nonnegative: Declared = True
    """No weight is below 0."""
    trains_at_top_1: Declared = True
    """The task's gradient reaches the router's parameters at top_k = 1 (it does not where one weight is always 1)."""
    compiles: Declared = True
    """`torch.compile(fullgraph=True)` takes the router."""
    trained_buffers: frozenset[str] = frozenset()
    """The buffers that training changes (running statistics, frozen copies). All others stay as they were drawn.

    Averaged models average those of floating point. One whose first value is measured is infinite until then, rather
    than 0 beside a flag: an average of both would be in use before it holds.
    """
    needs_updates: bool = False
    """Training moves the router outside the optimizer (`begin_step`, `update`): `routerzoo.attach` does it."""
    wants_token_counts: bool = False
    """The router is to be fitted to the frequencies of token ids before training: see `fit_token_counts`."""
    wants_feedback: bool = False
    """The router has losses that depend on the loss of each token: see `feedback`."""
    default_loss_weights: Mapping[str, float | LossWeight] = {}
    """The published coefficient of each auxiliary loss, used where none are given; a number is summed over layers."""

    checked_with: ClassVar[Mapping[str, Any]] = {}
    """What `check_router` builds the class with, where defaults hide what it declares (a rare branch of training)."""

    is_registered: bool = False
    """The registry knows this class by its name. A subclass is not, though it inherits this."""

    k: Tensor

    def __init__(self, spec: LayerSpec, *, top_k: int = 2, max_top_k: int | None = None) -> None:
        super().__init__()
        self._stored_ints: dict[str, int] = {}
        self._overridden: dict[str, int] = {}
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

    def required_layer(self) -> int:
        """Return the index of the router's layer, for routers that differ from layer to layer.

        Raises:
            UnmetRequirementError: the model does not number its layers.
        """
        if self.spec.layer is None:
            hint = "number the MoE layers of the model, LayerSpec(..., layer=0), LayerSpec(..., layer=1) and so on"
            raise UnmetRequirementError(type(self).__name__, frozenset({"layer"}), hint)
        return self.spec.layer

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A checkpoint made in Python names the class among its hyper-parameters, and is read with weights_only=True.
        torch.serialization.add_safe_globals([cls])
        if unknown := frozenset(cls.requires) - CONTEXT_FIELDS:
            raise TypeError(
                f"{cls.__name__}.requires names {', '.join(sorted(unknown))}; a context has "
                f"{', '.join(sorted(CONTEXT_FIELDS))}"
            )

    @classmethod
    def __subclasses__(cls) -> list[type]:
        """List the direct subclasses, but none that has a registered router's name without being it.

        Configs name classes by their short names, which jsonargparse looks up here. A package that happens to define a
        second LinearRouter would otherwise make the name ambiguous in everybody's configs.
        """
        registered = {known.__name__: known for known in _subclasses(Router) if known.__dict__.get("is_registered")}
        return [known for known in type.__subclasses__(cls) if registered.get(known.__name__, known) is known]

    @property
    def properties(self) -> Properties:
        """What the router declares in its current mode."""
        declared = {name: getattr(self, name) for name in Properties._fields}
        mode = "training" if self.training else "evaluation"
        return Properties(**{n: getattr(v, mode) if isinstance(v, ByMode) else bool(v) for n, v in declared.items()})

    @property
    def top_k(self) -> int:
        """Experts per token. It may change over training and is part of the `state_dict`."""
        return self.stored_int("k")

    @top_k.setter
    def top_k(self, value: int) -> None:
        self.store_int("k", self._checked_top_k(value))

    def _checked_top_k(self, value: int) -> int:
        whole = checked_whole("top_k", value)
        if not 1 <= whole <= self.max_top_k:
            bound = "num_experts" if self.max_top_k == self.spec.num_experts else "the largest k of this router"
            raise ValueError(f"top_k must be between 1 and {bound} = {self.max_top_k}, got {value}")
        return whole

    @contextmanager
    def override_top_k(self, value: int) -> Iterator[None]:
        """Route with another k for a while; the `state_dict` keeps the trained one.

        Raises:
            ValueError: a k that the router cannot do.
        """
        whole = self._checked_top_k(value)
        before = self._overridden.get("k")
        self._overridden["k"] = whole
        try:
            yield
        finally:
            if before is None:
                del self._overridden["k"]
            else:
                self._overridden["k"] = before

    def store_int(self, name: str, value: int) -> None:
        """Keep an integer that decides the routing, such as a stage of training.

        It is an int64 tensor of the `state_dict`, so that checkpoints of any format hold it, with the same value in
        Python beside it, so that no forward pass reads it from the device.

        Args:
            name: of the buffer; no attribute may have it.
            value: the integer.
        """
        self._stored_ints[name] = value
        if name in self._buffers:
            self._buffers[name].fill_(value)  # type: ignore[union-attr]
        else:
            self.register_buffer(name, torch.tensor(value))

    def stored_int(self, name: str) -> int:
        """Return what `store_int` keeps."""
        return self._overridden[name] if name in self._overridden else self._stored_ints[name]

    def read_stored_ints(self) -> None:
        """Take the integers from their tensors, after these were written by something else.

        `load_state_dict` and `eval` do so. Call it after writing buffers in place, as weight averaging does.
        """
        for name in self._stored_ints:
            tensor = self._buffers[name]
            if tensor is not None and not tensor.is_meta:
                self._stored_ints[name] = int(tensor)

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation, which reads the stored integers again."""
        super().train(mode)
        if not mode:  # not on the way back: some loops call `train` in every step, and a GPU would wait
            self.read_stored_ints()
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # transformers loads buffers so, and marks what a checkpoint holds; what it lacks is memory that nobody has
        # written yet, until `reset_parameters`.
        if name in self.__dict__.get("_stored_ints", ()) and getattr(value, "_is_hf_initialized", False):
            if name == "k":
                self._checked_top_k(int(value))
                self._announce_top_k(int(value))
            self._stored_ints[name] = int(value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        errors: list[str] = args[-1]
        if state_dict.pop(f"{prefix}_extra_state", None) is not None:
            errors.append(
                f"{prefix}_extra_state is of a checkpoint of routerzoo's first format, which this version does not "
                "read: train again, or load it with routerzoo 0.1"
            )
            return
        loaded = state_dict.get(f"{prefix}k")
        if "k" in self._stored_ints and isinstance(loaded, Tensor) and not loaded.is_meta:
            if not 1 <= int(loaded) <= self.max_top_k:
                errors.append(f"{prefix}k is {int(loaded)}; it must be between 1 and {self.max_top_k}")
                return
            self._announce_top_k(int(loaded))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.read_stored_ints()

    def _announce_top_k(self, loaded: int) -> None:
        if loaded != self._stored_ints["k"]:
            warnings.warn(
                f"{type(self).__name__} was built with top_k = {self._stored_ints['k']} and routes with the "
                f"checkpoint's, {loaded}: set top_k after loading to change it",
                LoadedTopKWarning,
                stacklevel=3,
            )

    @abstractmethod
    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Decide where each token goes.

        Autocast is off and the router's floating-point parameters and buffers are at least float32, whatever they were
        loaded in. Compute scores in float32: `routerzoo.functional.gate_linear` does.

        Args:
            x_TD: hidden states, in their own dtype.
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
            ValueError: hidden states of another width, or a required context field that is missing; ids that are not
                integers or, where a CPU reads them, that no table has.
        """
        context = context if context is not None else RoutingContext()
        if x_TD.ndim != 2 or x_TD.shape[1] != self.spec.d_model:
            raise ValueError(
                f"{type(self).__name__} takes hidden states [tokens, {self.spec.d_model}], got {list(x_TD.shape)}"
            )
        for name in {*self.requires, "padding_mask"}:
            value = getattr(context, name)
            if value is None and name not in self.requires:
                continue
            if value is None:
                raise ValueError(f"{type(self).__name__} requires {name}; pass RoutingContext({name}=...)")
            # One entry a token; attention alone has more dimensions, behind that one.
            found = value.shape[:1] if name == "attention" else getattr(value, "shape", None)
            if isinstance(value, Tensor) and found != x_TD.shape[:1]:
                raise ValueError(f"{name} has shape {list(value.shape)}, the hidden states are {list(x_TD.shape)}")
        context = self._with_checked_ids(context)
        # Autocast does not know the meta device.
        with nullcontext() if x_TD.is_meta else torch.autocast(x_TD.device.type, enabled=False):
            narrow = {name: value.float() for name, value in _tensors(self) if _is_narrow(value)}
            if narrow:  # weights that were loaded in 16 bits: the same once more, with float32 in their place
                routing: Routing = torch.func.functional_call(self, narrow, (x_TD, context))
            else:
                routing = self.route(x_TD, context)
        return _with_weights_like(x_TD, routing)

    def _with_checked_ids(self, context: RoutingContext) -> RoutingContext:
        """Return a context whose required ids can be looked up; those of padding are 0."""
        for name, size in (("token_ids", self.spec.vocab_size), ("task_ids", self.spec.num_tasks)):
            ids_T = getattr(context, name)
            if name in self.requires and size is not None:
                checked_T = checked_ids(ids_T, size, context.padding_mask, f"{type(self).__name__} looks {name} up")
                if checked_T is not ids_T:
                    context = context.replace(**{name: checked_T})
        return context

    def select_experts(self, logits_TE: Tensor) -> Tensor:
        """Select experts by logits alone, as evaluation does. Optional: for wrappers around the router.

        Such as steering, which changes logits, and a capacity, which rules experts out by a logit of minus infinity.

        Args:
            logits_TE: of the kind that this router's routings hold.

        Returns:
            int64 `[tokens, k]`, -1 for none; an expert that is ruled out only where there are fewer than k others.

        Raises:
            NotImplementedError: the router does not select by logits alone.
        """
        raise NotImplementedError(f"{type(self).__name__} does not select experts by logits alone")

    def combine_weights(self, logits_TE: Tensor, experts_TK: Tensor, *, may_drop: bool = True) -> Tensor:
        """Weight experts as the router would, had it selected them, with gradients. Optional, like `select_experts`.

        Args:
            logits_TE: of the kind that this router's routings hold.
            experts_TK: int64, different experts for each token; -1 for none.
            may_drop: False promises that no expert is -1, which saves the masking.

        Returns:
            Weights `[tokens, k]`; 0 for none.

        Raises:
            NotImplementedError: the router's weights do not follow from logits and experts.
        """
        raise NotImplementedError(f"{type(self).__name__} has no weights that follow from logits and experts")

    def feedback(self, routing: Routing, context: RoutingContext, token_losses_T: Tensor) -> Mapping[str, Tensor]:
        """Return losses that depend on the per-token task loss (REINFORCE, for example).

        Called in training where `wants_feedback`, once the task's loss is known. What `route` needs to keep for it goes
        into the context's `carry`, under a key that holds the router.

        Args:
            routing: this router's routing.
            context: as `route` had it.
            token_losses_T: the task's loss of each token, in nats, without gradient; 0 for padding and for tokens
                without a target.

        Returns:
            Raw scalars by name, as `Routing.losses`.
        """
        return {}

    def fit_token_counts(self, token_counts_V: Tensor) -> None:
        """Fit the router to the frequencies of token ids in the training split, once, before the first step.

        Args:
            token_counts_V: int64 `[vocab_size]`.
        """

    def begin_step(self, step: int, total_steps: int | None) -> None:
        """Prepare for a training step; called before its forward pass, where `needs_updates`.

        Args:
            step: optimizer steps taken so far.
            total_steps: optimizer steps that the run will take, where known.
        """

    def statistics(self, routing: Routing, context: RoutingContext) -> Mapping[str, Tensor]:
        """Return what `update` needs to know of a training pass, as sums over its tokens.

        Called without gradients, once for each pass, where `needs_updates`. Passes whose gradient is never used are
        left out. The sums are added up over gradient accumulation and over all processes.

        Args:
            routing: this router's routing, without padding. It may be of no tokens.
            context: as `route` had it.
        """
        return {}

    def update(self, statistics: Mapping[str, Tensor]) -> None:
        """Move what training moves outside the optimizer, after each optimizer step that was not skipped.

        Args:
            statistics: the step's sums of `statistics`; zeros where nothing was routed.
        """

    def freeze(self) -> None:
        """Stop learning and adapting: no parameter has a gradient, and no update moves anything.

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

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw parameters and buffers as the constructor did, on the device where they are."""
        super().reset_parameters()
        for module in self.modules():
            if isinstance(module, Router):
                module.read_stored_ints()

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


class LogitRouter(Router):
    """Scores every expert for every token, selects the k largest logits and weights their experts.

    A subclass implements `logits`. The rest follows from a few attributes, of the class or set by `__init__`; so do
    `normalized` and `trains_at_top_1`, unless the class declares them:

    - Selection looks at the logits, not at the scores, so that a score function that saturates makes no ties.
    - With `score_fn="softmax"` and `renormalize`, the weights are the softmax over the selected logits; else the scores
      of the selected experts, divided by their sum where `renormalize`. Then they are multiplied by `scale`.
    - In training, `noise_std` makes selection and weights those of noisy logits.

    Args:
        spec: sizes of the layer that the router sits in.
        top_k: experts per token.
        max_top_k: the largest k that the router can do; by default the number of experts.
        score_fn: how logits become scores; by default the class's.
        renormalize: divide the weights of the selected experts by their sum; by default as the class.
        scale: factor on the weights; by default the class's.

    Raises:
        ValueError: `top_k` is no whole number, below 1 or above `max_top_k`; an unknown score function.
        UnmetRequirementError: the model does not provide what the router requires.
    """

    score_fn: ScoreFunction = "softmax"
    """How logits become scores."""
    renormalize: bool = True
    """The weights of the selected experts are divided by their sum."""
    scale: float = 1.0
    """Factor on the weights."""
    balances_by_score: bool = False
    """Balance losses count the largest scores, not the selected experts: see `Routing.balances_by_score`."""
    gate_name: ClassVar[str] = "weight"
    """The parameter or buffer that the logits are proportional to, as `gate.weight`, for `scale_initial_logits`."""

    def __init__(
        self,
        spec: LayerSpec,
        *,
        top_k: int = 2,
        max_top_k: int | None = None,
        score_fn: ScoreFunction | None = None,
        renormalize: bool | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__(spec, top_k=top_k, max_top_k=max_top_k)
        self.score_fn = checked_score_fn(self.score_fn if score_fn is None else score_fn)
        self.renormalize = self.renormalize if renormalize is None else renormalize
        self.scale = self.scale if scale is None else scale
        if declaring_class(type(self), "normalized") is Router:
            self.normalized = self.renormalize and self.scale == 1.0
        if declaring_class(type(self), "trains_at_top_1") is Router:
            self.trains_at_top_1 = not self.renormalize

    @abstractmethod
    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return the affinity of every token to every expert, float32 `[tokens, num_experts]`.

        Args:
            x_TD: hidden states, in their own dtype; `routerzoo.functional.gate_linear` takes any.
            context: what else is known; the fields in `requires` are present.
        """

    def noise_std(self, x_TD: Tensor) -> float | Tensor | None:
        """Return the standard deviation of the noise on the logits in training, a number or `[T, E]`; None for none."""
        return None

    def balance_probs(self, logits_TE: Tensor) -> Tensor | None:
        """Return the scores that balance losses are taken on, `[T, E]`; None for those of the score function."""
        return None

    def own_losses(self, x_TD: Tensor, logits_TE: Tensor, context: RoutingContext) -> Mapping[str, Tensor]:
        """Return raw losses that are no function of a routing; called in training, where somebody reads them."""
        return {}

    def noisy_logits(
        self, x_TD: Tensor, context: RoutingContext
    ) -> tuple[Tensor, Tensor | None, float | Tensor | None]:
        """Return the logits, with noise in training where there is any; then those without, and its `noise_std`."""
        logits_TE, std = self.logits(x_TD, context), self.noise_std(x_TD) if self.training else None
        if std is None:
            return logits_TE, None, None
        return logits_TE + torch.randn_like(logits_TE) * std, logits_TE, std

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Select by the logits, and weight."""
        logits_TE, clean_TE, std = self.noisy_logits(x_TD, context)
        experts_TK = self.select_experts(logits_TE)
        weights_TK = self.combine_weights(logits_TE, experts_TK, may_drop=False)
        read = self.training and context.compute_aux_losses
        return Routing(
            experts_TK,
            weights_TK,
            logits_TE,
            losses=self.own_losses(x_TD, logits_TE, context) if read else {},
            score_fn=self.score_fn,
            balance_probs_TE=self.balance_probs(logits_TE) if context.compute_aux_losses else None,
            balances_by_score=self.balances_by_score,
            clean_logits_TE=clean_TE,
            noise_std=std,
            may_drop=False,
        )

    def select_experts(self, logits_TE: Tensor) -> Tensor:
        """Return the experts of the k largest logits, int64 `[tokens, k]`, best first."""
        return topk_indices(logits_TE, self.top_k)

    def combine_weights(self, logits_TE: Tensor, experts_TK: Tensor, *, may_drop: bool = True) -> Tensor:
        """Return the weights of given experts, `[tokens, k]`; 0 for none (-1)."""
        if self.score_fn == "softmax" and self.renormalize:
            weights_TK = softmax_at(logits_TE, experts_TK, may_drop=may_drop)
        else:
            scores_TE = apply_score_fn(logits_TE, self.score_fn)
            weights_TK = gather_weights(scores_TE, experts_TK, renormalize=self.renormalize, may_drop=may_drop)
        return weights_TK if self.scale == 1.0 else weights_TK * self.scale

    @torch.no_grad()
    def scale_initial_logits(self, factor: float) -> None:
        """Multiply the gate."""
        try:
            gate: Tensor = attrgetter(self.gate_name)(self)
        except AttributeError:
            raise NotImplementedError(
                f"{type(self).__name__} has no {self.gate_name}: set its class's gate_name to the parameter that the "
                "logits are proportional to, or implement scale_initial_logits"
            ) from None
        gate.mul_(factor)


class LoadedTopKWarning(UserWarning):
    """A checkpoint's k is another than the one that the router was built with."""


def declaring_class(cls: type, name: str) -> type:
    """Return the class that an attribute comes from: `Router`, where no subclass declares the property."""
    return next(base for base in cls.__mro__ if name in vars(base))


def _subclasses(cls: type) -> Iterator[type]:
    subclass: type
    for subclass in type.__subclasses__(cls):
        yield subclass
        yield from _subclasses(subclass)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _is_narrow(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() < 4


def _with_weights_like(x_TD: Tensor, routing: Routing) -> Routing:
    names = ("weights_TK", "weight_N", "dispatch_GSEP", "combine_GSEP", "merge_GE")
    given = {name: value for name in names if (value := getattr(routing, name)) is not None}
    if all(value.dtype == x_TD.dtype for value in given.values()):
        return routing
    return replace(routing, **{name: value.to(x_TD.dtype) for name, value in given.items()})
