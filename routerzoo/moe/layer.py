"""`MoE`: the layer. Route, dispatch, compute, combine."""
# Shape suffixes: T tokens, D model width.

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, TypeVar, final

import torch
from torch import Tensor, is_grad_enabled, nn

from routerzoo.functional.initialization import own_generator
from routerzoo.functional.recomputation import in_backward
from routerzoo.moe.dispatch import apply_experts, dense_forward
from routerzoo.moe.experts import EXPERTS, Experts, MLPExperts, TwoLayerExperts
from routerzoo.moe.grouped_linear import BACKENDS, Backend
from routerzoo.moe.step_load import StepLoad
from routerzoo.registry import create_router, did_you_mean
from routerzoo.router import Router, UnmetRequirementError
from routerzoo.routing import LayerRouting, LayerSpec, Routing, RoutingContext

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

RouterFactory = Callable[[LayerSpec], Router]
ExpertsFactory = Callable[[LayerSpec], Experts]
M = TypeVar("M", bound=nn.Module)
RoutingHook = Callable[[LayerRouting, RoutingContext], None]


class NonCausalRouterError(ValueError):
    """A decoder was given a router that looks at later tokens."""


class BatchDependenceWarning(UserWarning):
    """A router that lets one sequence's tokens change another's routing is about to serve."""


class MissingUpdatesWarning(UserWarning):
    """A router that must be updated once per optimizer step is trained without it."""


@final
class MoE(nn.Module):
    """Mixture-of-Experts layer: a drop-in for a feed-forward network.

    1. The router decides which experts see which tokens.
    2. Tokens are sorted by expert. Dropless: every assignment is computed.
    3. The experts compute.
    4. Each token's results are weighted and added up, and the shared experts' are added to that.

    The router's initial values are drawn from a generator of its own: two layers of one seed that differ in the router
    start with the same experts, and leave the same random numbers for what is built next.

    The layer keeps no record of a call. It publishes the routing of each call once, without padding: in the context,
    for auxiliary losses (`context.routings`), and to what `register_routing_hook` was given, for metrics. A forward
    pass that activation checkpointing repeats publishes nothing.

    Args:
        spec: sizes of the layer. In place of it, `d_model` and `num_experts` are enough.
        router: name of a router, or a function that builds one from the spec: a class, or a `functools.partial` of it.
        experts: name of a class of experts (`MLPExperts`, `SwiGLUExperts`), or a function that builds them, likewise.
        num_shared_experts: experts of the same shape that see every token, with weight 1 (DeepSeekMoE).
        gate_shared_experts: weight the shared experts with a learned `sigmoid(w x)` instead (Qwen2-MoE).
        weights_on_input: multiply an expert's input with its weight instead of its output (Llama 4). For routers that
            name experts.
        backend: how the experts' products are computed; see `routerzoo.grouped_linear`.
        low_memory: keep the hidden states and the experts' pre-activations alone for the backward pass, and compute
            the rest again: memory that does not grow with k at equal FLOPs. By default on a GPU, where it is the
            faster one too; for `MLPExperts` and `SwiGLUExperts` with the backend `auto`, and routers that name experts.
        allow_non_causal: accept a router that looks at later tokens in a decoder.
        d_model: width of the hidden states, where there is no spec.
        num_experts: number of experts, where there is no spec.

    Raises:
        UnmetRequirementError: the model does not provide what the router requires.
        NonCausalRouterError: a router that is not causal, in a decoder.
        TypeError: a spec, router or experts of another type.
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
        experts: str | ExpertsFactory = MLPExperts,
        *,
        num_shared_experts: int = 0,
        gate_shared_experts: bool = False,
        weights_on_input: bool = False,
        backend: Backend = "auto",
        low_memory: bool | None = None,
        allow_non_causal: bool = False,
        d_model: int | None = None,
        num_experts: int | None = None,
    ) -> None:
        super().__init__()
        if not (spec is None or isinstance(spec, LayerSpec)):
            raise TypeError(
                f"the first argument of MoE is a LayerSpec, got {spec!r}: MoE(d_model=..., num_experts=...)"
            )
        if spec is not None and not (d_model is None and num_experts is None):
            raise ValueError("a MoE layer takes a spec, or d_model and num_experts, not both")
        if spec is None:
            if d_model is None or num_experts is None:
                raise ValueError("a MoE layer needs a spec, or d_model and num_experts")
            spec = LayerSpec(d_model, num_experts)
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        if num_shared_experts < 0:
            raise ValueError(f"num_shared_experts must be at least 0, got {num_shared_experts}")
        if gate_shared_experts and not num_shared_experts:
            raise ValueError("gate_shared_experts needs num_shared_experts of at least 1")
        if low_memory and weights_on_input:
            raise ValueError("low_memory=True weights outputs, not inputs: leave low_memory or weights_on_input out")
        self.weights_on_input = weights_on_input
        self.low_memory = low_memory
        self.spec, self.num_experts, self.num_shared_experts = spec, spec.num_experts, num_shared_experts
        with own_generator():  # so that all else starts equal, whatever the router
            self.router = _checked(_built_router(router, spec), allow_non_causal)
        build = _experts_factory(experts)
        self.experts = _of_type(build(spec), Experts, "experts")
        self.experts.backend = backend
        if low_memory and not (isinstance(self.experts, TwoLayerExperts) and backend == "auto"):
            raise ValueError(
                "low_memory=True takes MLPExperts or SwiGLUExperts and the backend 'auto', got "
                f"{type(self.experts).__name__} and {backend!r}: leave low_memory out"
            )
        self.shared_experts = build(replace(spec, num_experts=num_shared_experts)) if num_shared_experts else None
        if self.shared_experts is not None:
            self.shared_experts.backend = backend
        self.shared_gate = nn.Linear(spec.d_model, 1, bias=False) if gate_shared_experts else None
        self.mesh: DeviceMesh | None = None
        """The ranks that share the experts; see `routerzoo.distributed.expert_parallel`."""
        self.step_load: StepLoad | None = None
        """What `routerzoo.attach` keeps for losses of the global batch; None where nothing is attached."""
        self.warns_of_batch_dependence = True
        """Evaluation is taken for serving, until a trainer that only validates sets this to False."""
        self._warns_of_missing_updates = self._warns_of_reentrance = True
        self._provided_context: RoutingContext | None = None
        self._had_context = False  # whether the last forward pass was provided one
        self._routing_hooks: dict[int, RoutingHook] = {}
        self._hook_numbers = itertools.count()

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation; warn once if the router is not safe to serve."""
        super().train(mode)
        if not mode and self.warns_of_batch_dependence:
            router = inner_router(self)
            if not router.properties.batch_independent:
                self.warns_of_batch_dependence = False
                warnings.warn(
                    f"{type(router).__name__} is not batch independent in evaluation: what one sequence of a batch "
                    "holds changes how the others are routed, so that one user's input can change another's output "
                    "(Hayes et al. 2024, arXiv:2402.05526). Serve sequences one by one, or take a batch-independent "
                    "router",
                    BatchDependenceWarning,
                    stacklevel=2,
                )
        return self

    @property
    def is_driven(self) -> bool:
        """Whether `routerzoo.attach` updates the router once per optimizer step."""
        return self.step_load is not None

    def reset_parameters(self) -> None:
        """Initialize router, experts and shared experts as the constructor did, on the device where they are."""
        reset_router(inner_router(self))
        for part in (self.experts, self.shared_experts):
            if part is not None:
                part.reset_parameters()
        if self.shared_gate is not None:
            self.shared_gate.reset_parameters()

    def __getstate__(self) -> dict[str, object]:
        # Observers, and the context of a pass, belong to this layer, not to its copy.
        alone: dict[str, object] = {
            "step_load": None,
            "_warns_of_missing_updates": True,
            "_provided_context": None,
            "_had_context": False,
            "_routing_hooks": {},
            "_hook_numbers": itertools.count(),
        }
        return {**self.__dict__, **alone}

    def register_routing_hook(self, hook: RoutingHook) -> RoutingHookHandle:
        """Call a function with each routing that the layer publishes, and with its context.

        Returns:
            A handle, whose `remove` ends it.
        """
        number = next(self._hook_numbers)
        self._routing_hooks[number] = hook
        return RoutingHookHandle(self, number)

    def forward(
        self, x: Tensor, context: RoutingContext | None = None, *, router_input: Tensor | None = None
    ) -> Tensor:
        """Compute the layer.

        Args:
            x: hidden states `[..., d_model]`.
            context: what the router may look at beside them, one entry for each token. The call's routing is added to
                `context.routings`.
            router_input: hidden states that the router sees, where the experts see others (Gemma 4).

        Returns:
            Of the shape of `x`.

        Raises:
            TypeError: a context that is no `RoutingContext`.
            ValueError: hidden states of another width, a context that lacks what the router requires, or a pass that
                is computed again after its context is gone.
        """
        context = self._current_context() if context is None else context
        if not isinstance(context, RoutingContext):
            raise TypeError(f"the context of a MoE layer is a RoutingContext, got {type(context).__name__}")
        x_TD = x.reshape(-1, x.shape[-1])
        routed_TD = x_TD if router_input is None else router_input.reshape(-1, router_input.shape[-1])
        routing = without_padding(self.router(routed_TD, context), context)
        if not in_backward():
            self._publish(routing, context)
            if self.training and not torch.compiler.is_compiling():
                self._warn_of_what_training_lacks(routed_TD)
        y_TD = apply_experts(
            x_TD, routing, self.experts, self.num_experts, self.mesh, self.low_memory, self.weights_on_input
        )
        if self.shared_experts is not None:
            shared_TD = dense_forward(self.shared_experts, x_TD, self.num_shared_experts)
            if self.shared_gate is not None:
                shared_TD = self.shared_gate(x_TD).sigmoid() * shared_TD
            y_TD = y_TD + shared_TD
        return y_TD.view(*x.shape[:-1], y_TD.shape[1])

    def _current_context(self) -> RoutingContext:
        """Return the context that was provided, or an empty one once its pass is over; recomputation finds it still."""
        context = self._provided_context
        if in_backward():
            if context is None and self._had_context:
                raise ValueError(
                    "activation checkpointing computes a MoE layer again whose context is gone: run the backward pass "
                    "inside `with provide_context(...)`, or keep the ContextHook and the model's output until then"
                )
        else:
            context = None if context is None or context.is_finished else context
            self._had_context = context is not None
        return RoutingContext(compute_aux_losses=False) if context is None else context

    def _publish(self, routing: Routing, context: RoutingContext) -> None:
        call = sum(published.layer is self for published in context.routings)
        published = LayerRouting(self, call, routing)
        context.routings.append(published)
        for hook in tuple(self._routing_hooks.values()):
            hook(published, context)

    def _warn_of_what_training_lacks(self, x_TD: Tensor) -> None:
        if self._warns_of_reentrance and x_TD.requires_grad and not is_grad_enabled():
            self._warns_of_reentrance = False
            warnings.warn(
                "a MoE layer in training routes hidden states that require a gradient while gradients are off: under "
                "reentrant activation checkpointing auxiliary losses have no gradient, and updates of routers see "
                "nothing; set use_reentrant=False",
                stacklevel=2,
            )
        if self._warns_of_missing_updates and not self.is_driven and is_grad_enabled():
            router = inner_router(self)
            if router.needs_updates and not router.is_frozen:
                self._warns_of_missing_updates = False
                warnings.warn(
                    f"{type(router).__name__} must be updated once per optimizer step, and is trained without it: call "
                    "routerzoo.attach(model, optimizer, total_steps=...) once, or add the callback "
                    "routerzoo.RouterHooks() to the Trainer",
                    MissingUpdatesWarning,
                    stacklevel=2,
                )


class RoutingHookHandle:
    """Removes a routing hook."""

    def __init__(self, layer: MoE, number: int) -> None:
        self._layer, self._number = layer, number

    def remove(self) -> None:
        """Call the hook no more."""
        self._layer._routing_hooks.pop(self._number, None)


def moe_layers(model: nn.Module) -> Iterator[MoE]:
    """Yield the MoE layers of a model, each once, in the order of the model.

    Where PEFT keeps copies of a module beside it (`modules_to_save`), those of the active copy alone.
    """
    for module in active_modules(model):
        if isinstance(module, MoE):
            yield module


def inner_router(layer: MoE) -> Router:
    """Return a layer's router, also where something else, such as an adapter, is wrapped around it.

    Of the copies that PEFT keeps (`modules_to_save`), it is the active one.
    """
    if isinstance(layer.router, Router):
        return layer.router
    return next(module for module in active_modules(layer.router) if isinstance(module, Router))


def reset_router(router: Router) -> None:
    """Initialize a layer's router as the layer's constructor did: with random numbers of its own."""
    tensors = itertools.chain(router.parameters(), router.buffers())
    with own_generator(next((tensor.device for tensor in tensors), None)):
        router.reset_parameters()


def active_modules(module: nn.Module, seen: set[nn.Module] | None = None) -> Iterator[nn.Module]:
    """Yield what `modules` does, without the copies that PEFT keeps in `modules_to_save` and does not call.

    Raises:
        ValueError: an active adapter that has no copy of the module.
    """
    seen = set() if seen is None else seen
    if module in seen:
        return
    seen.add(module)
    yield module
    copies, children = module._modules.get("modules_to_save"), module.children()
    if isinstance(copies, nn.ModuleDict) and hasattr(module, "active_adapters"):  # PEFT's ModulesToSaveWrapper
        children = iter([_active_copy(module, copies)])
    for child in children:
        yield from active_modules(child, seen)


def _active_copy(wrapper: nn.Module, copies: nn.ModuleDict) -> nn.Module:
    # The same choice as the wrapper's `forward`.
    names: Any = wrapper.active_adapters
    if wrapper.disable_adapters or not names:
        return wrapper.get_submodule("original_module")
    if names[0] not in copies:
        raise ValueError(
            f"the active adapter {names[0]!r} has no copy in modules_to_save, only {', '.join(copies) or 'none'}: "
            "activate one that has (set_adapter), so that its router is known"
        )
    return copies[names[0]]


def without_padding(routing: Routing, context: RoutingContext) -> Routing:
    """Return a routing with padding sent to no expert."""
    if context.padding_mask is None:
        return routing
    if routing.selected is not None:
        routing = replace(routing, selected=without_padding(routing.selected, context))
    if routing.group_T is not None:
        return replace(routing, group_T=routing.group_T.masked_fill(context.padding_mask, -1))
    if routing.token_N is not None and routing.expert_N is not None and routing.weight_N is not None:
        mask_N = context.padding_mask.index_select(0, routing.token_N)
        expert_N, weight_N = routing.expert_N.masked_fill(mask_N, -1), routing.weight_N.masked_fill(mask_N, 0.0)
        return replace(routing, expert_N=expert_N, weight_N=weight_N, may_drop=True)
    if routing.experts_TK is None or routing.weights_TK is None:
        return routing
    mask_T1 = context.padding_mask.unsqueeze(1)
    return replace(
        routing,
        experts_TK=routing.experts_TK.masked_fill(mask_T1, -1),
        weights_TK=routing.weights_TK.masked_fill(mask_T1, 0.0),
        may_drop=True,
    )


def _built_router(router: str | RouterFactory, spec: LayerSpec) -> Router:
    if isinstance(router, str):
        return create_router(router, spec)
    if isinstance(router, Router):
        raise TypeError(
            f"router is a {type(router).__name__} that is built already: give its class, or functools.partial of it"
        )
    if not callable(router):
        raise TypeError(f"router is the name of one, or a function that builds one, got {router!r}")
    return _of_type(router(spec), Router, "router")


def _experts_factory(experts: str | ExpertsFactory) -> ExpertsFactory:
    if isinstance(experts, str):
        if experts not in EXPERTS:
            raise ValueError(
                f"unknown experts {experts!r}{did_you_mean(experts, EXPERTS)} There are {', '.join(EXPERTS)}."
            )
        return EXPERTS[experts]
    if isinstance(experts, Experts):
        raise TypeError(
            f"experts are {type(experts).__name__} that are built already; give their class, or functools.partial of it"
        )
    if not callable(experts):
        raise TypeError(f"experts is the name of a class, or a function that builds them, got {experts!r}")
    return experts


def _of_type(built: M, kind: type[nn.Module], what: str) -> M:
    if not isinstance(built, kind):
        raise TypeError(f"the function given as {what} returned {built!r}; it must return routerzoo.{kind.__name__}")
    return built


def _checked(router: Router, allow_non_causal: bool) -> Router:
    # A wrapped router's properties are known only now that it is built.
    name = type(router).__name__
    if missing := router.requires - router.spec.provides:
        raise UnmetRequirementError(name, missing)
    if router.spec.decoder and not router.properties.causal and not allow_non_causal:
        instead = f"Its causal form is {router.causal_form}" if router.causal_form else "Choose a causal router"
        raise NonCausalRouterError(
            f"{name} is not causal: a token's routing depends on later tokens, which a decoder has not seen when it "
            f"generates. {instead}, or set allow_non_causal to train one all the same"
        )
    return router
