"""What is done to a model of transformers, in place: dense networks become MoE layers, gates become our routers.

Each change takes arguments that are JSON, so that the model's config keeps them and `from_pretrained` repeats them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from routerzoo.errors import UserError
from routerzoo.hf.architectures import ARCHITECTURES, Architecture, Of
from routerzoo.hf.blocks import HandOn, RoutedExperts, place_of_gate
from routerzoo.hf.experts import experts_of
from routerzoo.hf.recipe import factory_of, with_top_k
from routerzoo.models.blocks import MoEBlocks
from routerzoo.models.missing_weights import initialize_missing_weights
from routerzoo.models.sparsify import sparsify
from routerzoo.moe.experts import Experts
from routerzoo.moe.layer import MoE, RouterFactory, inner_router, moe_layers
from routerzoo.registry import UnknownRouterError, router_class
from routerzoo.router import Router, UnmetRequirementError
from routerzoo.routing import LayerSpec

KEEP = "keep"
"""In place of a router's name: the one that computes what the model's own gate does, with its weights."""
TEXT_FIELDS = frozenset({"token_ids", "positions", "sequence_ids", "padding_mask"})
"""What `routerzoo.hf.context` reads off the inputs of a model of text."""


class Site(NamedTuple):
    """Where a released model routes.

    Args:
        name: of the block in the model.
        block: the module that holds gate and experts.
        place: what the block calls its gate.
        gate: the gate.
        architecture: what the gate is.
    """

    name: str
    block: nn.Module
    place: str
    gate: nn.Module
    architecture: Architecture


def sparsify_change(
    model: nn.Module,
    *,
    num_experts: int,
    router: Mapping[str, Any],
    experts: Mapping[str, Any] | None = None,
    blocks: MoEBlocks = "all",
    num_shared_experts: int = 0,
    upcycle: bool = False,
) -> None:
    """Replace dense feed-forward networks; see `routerzoo.sparsify`."""
    provided = _provided(model)
    with _said_of(model):
        sparsify(
            model,
            num_experts=num_experts,
            router=factory_of(router),
            experts=None if experts is None else factory_of(experts),
            blocks=blocks,
            num_shared_experts=num_shared_experts,
            upcycle=upcycle,
            provides=provided["provides"],
            vocab_size=provided["vocab_size"],
            num_positions=provided["num_positions"],
            decoder=provided["decoder"],
        )


def replace_change(model: nn.Module, *, router: Mapping[str, Any]) -> None:
    """Replace the gates of a released model, or the routers of MoE layers that it has already."""
    sites = list(released_sites(model))
    if not sites:
        _swap(model, router)
        return
    provided = _provided(model)
    # Routers are built before the first gate is replaced, so that a refusal leaves the model as it was.
    built = []
    for layer, site in enumerate(sites):
        weights: Any = site.block.get_submodule("experts")
        num_experts, hidden_dim = len(weights.down_proj), weights.down_proj.shape[1 if _transposed(site) else 2]
        d_model = weights.down_proj.numel() // (num_experts * hidden_dim)
        named = getattr(site.gate, "num_experts", num_experts)
        if named != num_experts:
            raise UserError(f"the gate of {site.name} names {named} experts, its bank has {num_experts}")
        spec = LayerSpec(d_model, num_experts, layer=layer, num_layers=len(sites), hidden_dim=hidden_dim, **provided)
        with _said_of(model), torch.device(weights.down_proj.device):
            moe = MoE(
                spec,
                _released_router(site, model) if router["name"] == KEEP else _ours(router, site, model),
                partial(experts_of, weights, architecture=site.architecture),
                weights_on_input=site.architecture.weights_on_input,
            )
        inner_router(moe).to(torch.promote_types(weights.down_proj.dtype, torch.float32))
        if router["name"] == KEEP:
            _copy_gate(site, inner_router(moe))
        top_k = released_arguments(site, model)["top_k"]
        built.append(RoutedExperts(moe, type(site.gate).__name__, top_k).train(site.block.training))
    for site, routed in zip(sites, built, strict=True):
        setattr(site.block, site.place, HandOn(site.architecture, site.gate).train(site.block.training))
        site.block.experts = routed
    initialize_missing_weights(model)


CHANGES: dict[str, Callable[..., None]] = {"sparsify": sparsify_change, "replace_routers": replace_change}
"""By the name that a config has for it."""


def check_change(change: Any) -> None:
    """Raise a UserError unless this is what a config says of a change."""
    kind = change.get("change") if isinstance(change, Mapping) else None
    if kind not in CHANGES:
        raise UserError(f"this config's routing has the change {change!r}, which is none of {', '.join(CHANGES)}")
    options = list(inspect.signature(CHANGES[kind]).parameters.values())[1:]
    known, needed = [o.name for o in options], [o.name for o in options if o.default is o.empty]
    for key in change:
        if key not in ("change", *known):
            raise UserError(f"the change {kind} in this config's routing has no {key!r}, but {', '.join(known)}")
    for key in needed:
        if key not in change:
            raise UserError(f"the change {kind} in this config's routing lacks {key}")
    for name in ("router", "experts"):
        if name in change and not (isinstance(change[name], Mapping) and "name" in change[name]):
            raise UserError(f"{name} in this config's routing is {change[name]!r}, not a name and its arguments")


def released_sites(model: nn.Module) -> Iterator[Site]:
    """Yield the blocks of a released model whose gates are known, in its order."""
    for name, block in model.named_modules():
        place = place_of_gate(block)
        if place is not None:
            gate = block.get_submodule(place)
            yield Site(name, block, place, gate, ARCHITECTURES[type(gate).__name__])


def gate_tensor(module: nn.Module, path: str) -> Tensor:
    """Return a parameter or buffer of a module by its name."""
    owner, _, name = path.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(owner), name)
    return tensor


def completed_table(table_VK: Tensor, num_experts: int) -> Tensor:
    """Return a table of each id's experts with all other experts behind them, as routers keep it."""
    chosen_VE = torch.zeros(len(table_VK), num_experts, dtype=torch.bool, device=table_VK.device)
    others_VE = chosen_VE.scatter_(1, table_VK, True).to(torch.int8).argsort(dim=-1, stable=True)
    return torch.cat([table_VK, others_VE], dim=1)[:, :num_experts]


def _ours(router: Mapping[str, Any], site: Site, model: nn.Module) -> RouterFactory:
    return with_top_k(factory_of(router), released_arguments(site, model)["top_k"])


def _released_router(site: Site, model: nn.Module) -> RouterFactory:
    try:
        cls = router_class(site.architecture.router)
    except UnknownRouterError as error:
        raise UserError(
            f"{site.architecture.router} computes what the gate of {site.architecture.models} does, and is in the "
            "package routerzoo-topk, which is not installed"
        ) from error
    return partial(cls, **released_arguments(site, model))


def released_arguments(site: Site, model: nn.Module) -> dict[str, Any]:
    """Return what the router is built with that computes what a model's gate does."""
    renamed = site.architecture.renamed
    found = {n: _read(site, model, v) if isinstance(v, Of) else v for n, v in site.architecture.arguments.items()}
    return {name: renamed.get(value, value) if isinstance(value, str) else value for name, value in found.items()}


def _read(site: Site, model: Any, argument: Of) -> Any:
    for holder in (site.gate, getattr(site.gate, "config", None), model.config.get_text_config()):
        if hasattr(holder, argument.name):
            return getattr(holder, argument.name)
    raise UserError(
        f"neither the gate of {site.name} nor the config has {argument.name}: another transformers version?"
    )


@torch.no_grad()
def _copy_gate(site: Site, router: Router) -> None:
    for ours, theirs in site.architecture.tensors.items():
        own, value = gate_tensor(router, ours), gate_tensor(site.gate, theirs)
        if own.is_meta or value.is_meta:
            continue
        if ours == "table":
            value = completed_table(value, router.spec.num_experts)
        if own.numel() != value.numel():
            raise UserError(f"{theirs} of {site.name} is {list(value.shape)}, the router's {ours} {list(own.shape)}")
        own.copy_(value.view_as(own))


def _swap(model: nn.Module, router: Mapping[str, Any]) -> None:
    layers = list(moe_layers(model))
    if not layers:
        raise UserError(_nothing_known(model))
    if router["name"] == KEEP:
        raise UserError(
            f"{type(model).__name__} has our routers already: 'keep' is for a model of transformers as it is"
        )
    released = {module.moe: module for module in model.modules() if isinstance(module, RoutedExperts)}
    built = []
    for layer in layers:
        experts = layer.experts
        top_k = released[layer].top_k if layer in released else inner_router(layer).top_k
        factory = with_top_k(factory_of(router), top_k)
        with _said_of(model), torch.device(next(experts.parameters()).device):
            twin = MoE(layer.spec, factory, partial(_kept, experts), backend=experts.backend)
        built.append(twin.router.train(layer.training))
    for layer, new in zip(layers, built, strict=True):
        layer.router = new
    for routed in released.values():
        routed.watch_router()
    initialize_missing_weights(model)


def _kept(experts: Experts, spec: LayerSpec) -> Experts:
    return experts


def _nothing_known(model: nn.Module) -> str:
    with_experts = [block for block in model.modules() if hasattr(block, "experts")]
    gates = {type(child).__name__ for block in with_experts for _, child in block.named_children()}
    found = f", which has {', '.join(sorted(gates))}" if gates else ""
    known = ", ".join(architecture.models for architecture in ARCHITECTURES.values())
    return f"no gate of {type(model).__name__} is known{found}. Known are those of {known}; a dense model takes upcycle"


def _transposed(site: Site) -> bool:
    return bool(getattr(site.block.get_submodule("experts"), "is_transposed", site.architecture.transposed))


@contextmanager
def _said_of(model: Any) -> Iterator[None]:
    """Say of a router that requires more than a model gives it what the model gives."""
    try:
        yield
    except UnmetRequirementError as error:
        given = ", ".join(sorted(_provided(model)["provides"])) or "none"
        hint = f"context fields of a {type(model).__name__} are {given}"
        raise UnmetRequirementError(error.router, error.missing, hint) from None


def _provided(model: Any) -> dict[str, Any]:
    """Return what a `LayerSpec` knows of a model of transformers."""
    config = model.config.get_text_config()
    text = model.main_input_name == "input_ids" and not config.is_encoder_decoder
    return {
        "vocab_size": config.vocab_size if text else None,
        "num_positions": getattr(config, "max_position_embeddings", None) if text else None,
        "provides": TEXT_FIELDS if text else frozenset(),
        "decoder": text and model.can_generate(),
    }
