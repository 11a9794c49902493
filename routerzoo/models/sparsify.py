"""`sparsify`: dense feed-forward networks of any model become MoE layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from routerzoo.models.blocks import MoEBlocks, moe_block_indices
from routerzoo.models.feed_forward import FeedForward, find_feed_forward, substitute
from routerzoo.models.missing_weights import initialize_missing_weights
from routerzoo.models.weight_decay import spare_biases
from routerzoo.moe.experts import Experts, FeedForwardWeights, MLPExperts, SwiGLUExperts
from routerzoo.moe.grouped_linear import Backend
from routerzoo.moe.layer import ExpertsFactory, MoE, RouterFactory, inner_router, moe_layers
from routerzoo.router import ByMode, Router
from routerzoo.routing import LayerSpec, RoutingContext

M = TypeVar("M", bound=nn.Module)

PROBE_TOKENS, TOLERANCE = 32, 1e-3
"""Whether weights sum to 1 is tried on so many random hidden states."""


@dataclass(frozen=True)
class SparsifyPlan:
    """What `sparsify` would do to a model. Prints as a table.

    Args:
        replaced: the name of each feed-forward network that becomes a MoE layer, and what it is.
        kept: the name of each that stays, and why.
    """

    replaced: dict[str, str]
    kept: dict[str, str]

    def __str__(self) -> str:
        rows = [("replace", *item) for item in self.replaced.items()] + [("keep", *item) for item in self.kept.items()]
        width = max((len(row[1]) for row in rows), default=0)
        return "\n".join(f"{what:7}  {name:{width}}  {why}" for what, name, why in rows)


def plan_sparsify(
    model: nn.Module,
    *,
    blocks: MoEBlocks = "every-other",
    match: Callable[[nn.Module], bool] | None = None,
) -> SparsifyPlan:
    """Return which feed-forward networks `sparsify` would replace, which not, and why; the model stays as it is.

    Args:
        model: any module.
        blocks: see `sparsify`.
        match: see `sparsify`.

    Raises:
        ValueError: blocks that do not exist.

    Example:
        >>> import timm
        >>> print(plan_sparsify(timm.create_model("vit_tiny_patch16_224", depth=2)))
        replace  blocks.1.mlp  Mlp: 192 -> 768 -> 192, gelu
        keep     blocks.0.mlp  blocks leaves it out
    """
    found = find_feed_forward(model, match)
    taken = _taken(found, match)
    chosen = [taken[index] for index in moe_block_indices(blocks, len(taken))]
    return SparsifyPlan(
        {_path(network): network.describe() for network in chosen if network.reading is not None},
        {
            _path(network): network.reason or "blocks leaves it out"
            for network in found
            if network not in chosen or network.reading is None
        },
    )


def sparsify(
    model: M,
    *,
    num_experts: int,
    router: str | RouterFactory = "LinearRouter",
    experts: str | ExpertsFactory | None = None,
    blocks: MoEBlocks = "every-other",
    upcycle: bool = False,
    num_shared_experts: int = 0,
    match: Callable[[nn.Module], bool] | None = None,
    provides: frozenset[str] = frozenset(),
    vocab_size: int | None = None,
    num_positions: int | None = None,
    decoder: bool = False,
    backend: Backend = "auto",
) -> M:
    """Replace dense feed-forward networks of a model by MoE layers, in place.

    A network is two linear maps with an activation between them, or three of a gated one, however their module is
    called; each is tried, to know that it computes nothing else. What surrounds it (attention, norms, residual paths,
    dropout) stays. `plan_sparsify` says what would be replaced, what not, and why.

    Args:
        model: any module with feed-forward networks as submodules.
        num_experts: experts per layer.
        router: name of a router, or a function that builds one from a `LayerSpec`.
        experts: a function that builds the experts from a `LayerSpec`. By default those of the same shape, activation,
            dropout and biases as the dense network.
        blocks: which of the feed-forward networks found, in the order of the model.
        upcycle: start every expert from the dense network's weights (Komatsuzaki et al. 2023,
            https://arxiv.org/abs/2212.05055). Where the combine weights sum to 1, and without shared experts, the
            model's output stays the same. Experts of a frozen network are frozen; new ones never are.
        num_shared_experts: experts per layer that see every token.
        match: tells which modules to replace; one that cannot be is an error. By default the feed-forward networks of
            blocks: not those that mix tokens, nor those of class attention, pooling heads, adapters.
        provides: the context fields that you will provide with `routerzoo.provide_context`, for routers that
            require any.
        vocab_size: number of token ids, where you provide them.
        num_positions: longest sequence.
        decoder: refuse routers that are not causal.
        backend: see `routerzoo.grouped_linear`.

    Returns:
        The model.

    Raises:
        ValueError: no feed-forward network found, one that experts cannot replace, or blocks that do not exist.
        UnmetRequirementError: the router requires a field that is not provided.

    Warns:
        UserWarning: an upcycled model does not compute what the dense one did; networks are left as they are, or were
            frozen in part.

    Example:
        >>> import timm
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=4)
        >>> model = sparsify(model, num_experts=4, router="HyperRouter")
        >>> [layer.spec.layer for layer in moe_layers(model)]
        [0, 1]
    """
    found = find_feed_forward(model, match, exact=experts is None or upcycle)
    taken = _taken(found, match)
    if not taken:
        raise ValueError(_nothing_found(model, found))
    chosen = [taken[index] for index in moe_block_indices(blocks, len(taken))]
    for network in chosen:
        if network.reading is None:
            raise ValueError(f"{_called(network)} cannot become a MoE layer: {network.reason}")
    if match is None and (misread := [network for network in found if network.misread]):
        left = "; ".join(f"{_called(network)}: {network.reason}" for network in misread[:3])
        more = f"; and {len(misread) - 3} more" if len(misread) > 3 else ""
        warnings.warn(f"sparsify leaves as they are: {left}{more}. See routerzoo.plan_sparsify", stacklevel=2)
    numbered = sum(1 for _ in moe_layers(model))
    # All layers are built before the first is put in place, so that a refusal leaves the model as it was.
    built, changes = [], ["shared experts start at random, and are added"] if upcycle and num_shared_experts else []
    for layer, network in enumerate(chosen, start=numbered):
        weights = network.weights()
        hidden_dim, d_model = weights.up.weight_OI.shape
        spec = LayerSpec(
            d_model,
            num_experts,
            layer=layer,
            num_layers=numbered + len(chosen),
            vocab_size=vocab_size,
            num_positions=num_positions,
            hidden_dim=hidden_dim,
            provides=provides,
            decoder=decoder,
        )
        weight = weights.up.weight_OI
        build = experts
        if build is None:
            build = _same_experts(network, weights)
            if upcycle and not weight.is_meta:
                build = partial(_without_values, build, weight)
        with torch.device("meta") if weight.is_meta else nullcontext():
            moe = MoE(
                spec,
                router,
                build,
                num_shared_experts=num_shared_experts,
                backend=backend,
            )
        _check_dropout(network, moe)
        if upcycle:
            moe.experts.upcycle_from(weights)
            if moe.shared_experts is not None:
                moe.shared_experts.reset_parameters()
            _freeze_alike(network, moe.experts)
            changes.append(_change_of(inner_router(moe)))
        inner_router(moe).to(torch.promote_types(weight.dtype, torch.float32))  # where the default dtype is of 16 bits
        built.append(moe.to(device=weight.device, dtype=weight.dtype).train(network.holder.training))
    for network, moe in zip(chosen, built, strict=True):
        _put(model, network, moe)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):  # nested tensors are for its fast path alone
            module.enable_nested_tensor = module.use_nested_tensor = False
    initialize_missing_weights(model)
    spare_biases(model)
    if why := "; ".join(filter(None, dict.fromkeys(changes))):
        warnings.warn(f"the upcycled model does not compute what the dense one did: {why}", stacklevel=2)
    return model


def _taken(found: list[FeedForward], match: Callable[[nn.Module], bool] | None) -> list[FeedForward]:
    """Return the networks that `blocks` counts: those that can be replaced, or those that the caller has named."""
    return found if match is not None else [network for network in found if network.reading is not None]


def _put(model: nn.Module, network: FeedForward, moe: MoE) -> None:
    reading = network.reading
    assert reading is not None
    if reading.place:
        substitute(network.holder, reading, moe)
        return
    replacement: nn.Module = moe
    if reading.output_dropout:
        replacement = nn.Sequential(moe, nn.Dropout(reading.output_dropout)).train(moe.training)
    for place in network.names:
        parent, _, name = place.rpartition(".")
        setattr(model.get_submodule(parent), name, replacement)


def _same_experts(network: FeedForward, weights: FeedForwardWeights) -> ExpertsFactory:
    reading = network.reading
    assert reading is not None
    maps = (weights.up, weights.down, weights.gate)
    bias = any(linear is not None and linear.bias_O is not None for linear in maps)
    experts = SwiGLUExperts if reading.layers.gated else MLPExperts
    return partial(experts, activation=weights.activation, dropout=reading.dropout, bias=bias)


def _without_values(build: ExpertsFactory, weight: Tensor, spec: LayerSpec) -> Experts:
    """Build experts that are about to be overwritten, in the dense network's dtype and on its device."""
    with torch.device("meta"):
        experts = build(spec)
    return experts.to(weight.dtype).to_empty(device=weight.device)


def _check_dropout(network: FeedForward, moe: MoE) -> None:
    p = network.reading.dropout if network.reading is not None else 0.0
    if p and not getattr(moe.experts, "dropout", 0.0):
        raise ValueError(
            f"{_called(network)} drops hidden units with a probability of {p:g}, the experts drop none: give them "
            f"dropout={p:g}, or build the dense model without"
        )


def _freeze_alike(network: FeedForward, experts: nn.Module) -> None:
    trained = [parameter.requires_grad for parameter in network.parameters()]
    if not any(trained):
        experts.requires_grad_(False)
    elif not all(trained):
        warnings.warn(
            f"{_called(network)} is frozen in part, its experts are trained: set requires_grad of theirs", stacklevel=3
        )


@torch.no_grad()
def _change_of(router: Router) -> str:
    """Return why experts that are all the dense network compute something else together; empty if they do not."""
    name = type(router).__name__
    declared = router.normalized
    keeps = declared.evaluation if isinstance(declared, ByMode) else declared
    if not any(tensor.is_meta for tensor in [*router.parameters(), *router.buffers()]):
        with torch.random.fork_rng(devices=[]):
            routing = router.eval()(*_probe(router.spec))
        if routing.dispatch_GSEP is not None:
            return f"{name} mixes tokens before experts see them"
        if routing.merge_GE is not None:
            sums_T = routing.merged_weights().sum(-1)
        else:
            token_N, expert_N, weight_N, *_ = routing.assignments()
            sums_T = torch.zeros(PROBE_TOKENS).index_add(0, token_N, weight_N.float() * (expert_N >= 0))
        keeps = bool(((sums_T - 1).abs() < TOLERANCE).all())
    return "" if keeps else f"the weights of {name} do not sum to 1, as those of LinearRouter with top_k=2 do"


def _probe(spec: LayerSpec) -> tuple[Tensor, RoutingContext]:
    """Return hidden states of a sequence, and all that a context may hold."""
    tokens = PROBE_TOKENS
    place_T = torch.arange(tokens)
    nothing_T = torch.zeros_like(place_T)
    context = RoutingContext(
        token_ids=place_T % (spec.vocab_size or 1),
        positions=place_T % (spec.num_positions or tokens),
        sequence_ids=nothing_T,
        task_ids=nothing_T,
        attention=torch.full((tokens, 1, tokens), 1 / tokens),
        step=0,
        total_steps=1,
    )
    return torch.randn(tokens, spec.d_model, dtype=torch.float32), context


def _nothing_found(model: nn.Module, found: list[FeedForward]) -> str:
    name = type(model).__name__
    if found:
        reasons = "; ".join(f"{_called(network)}: {network.reason}" for network in found[:3])
        return f"no feed-forward network of {name} can become a MoE layer: {reasons}"
    kinds = sorted({type(module).__name__ for module in model.modules()})
    return (
        f"no feed-forward network found in {name}, which consists of {', '.join(kinds)}; "
        "pass match= to routerzoo.sparsify, a function that tells one"
    )


def _path(network: FeedForward) -> str:
    """Return where the MoE layer comes, or the network is."""
    place = network.reading.place if network.reading is not None else ""
    return ".".join(part for part in (network.names[0], place) if part)


def _called(network: FeedForward) -> str:
    return f"{network.names[0] or 'the model'} ({type(network.holder).__name__})"
