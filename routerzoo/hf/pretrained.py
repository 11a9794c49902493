"""The two ways in: `upcycle` a dense model of transformers, `replace_routers` of a Mixture of Experts."""

from __future__ import annotations

import os
import warnings
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from routerzoo.errors import UserError
from routerzoo.hf.changes import KEEP, replace_change, sparsify_change
from routerzoo.hf.modeling import record_change
from routerzoo.hf.recipe import described
from routerzoo.hf.source import load_model
from routerzoo.models.blocks import MoEBlocks
from routerzoo.models.sparsify import plan_sparsify
from routerzoo.moe.layer import ExpertsFactory, RouterFactory, moe_layers

Source = str | os.PathLike[str] | PreTrainedConfig | PreTrainedModel
"""A name or path for `from_pretrained`, a config to build a model from, or a model."""


def upcycle(
    source: Source,
    *,
    num_experts: int,
    router: str | RouterFactory = "LinearRouter",
    experts: str | ExpertsFactory | None = None,
    blocks: MoEBlocks = "all",
    num_shared_experts: int = 0,
    copy_weights: bool = True,
    auto_class: Any = transformers.AutoModelForCausalLM,
    **options: Any,
) -> Any:
    """Make a dense model of transformers a Mixture of Experts, whose experts start as its feed-forward networks.

    Args:
        source: a name or path, a config, or a model, which is changed in place.
        num_experts: experts per layer.
        router: name of a router, its class or a `functools.partial` of it, whose arguments are JSON.
        experts: likewise; by default those that compute what the dense networks do.
        blocks: which of the blocks become MoE layers.
        num_shared_experts: experts per layer that see every token.
        copy_weights: start experts from the dense weights; the output stays the same where weights sum to 1.
        auto_class: builds the model where the source is none.
        options: for `from_pretrained`, such as `dtype` and `device_map`.

    Returns:
        The model, which `save_pretrained` and `from_pretrained` know how to build again.

    Raises:
        ValueError: a model without feed-forward networks that experts can replace; a router that is not registered.
    """
    model = _model(source, auto_class, options)
    bank = next((name for name, _ in model.named_modules() if name.endswith(".experts")), None)
    if bank is not None and not plan_sparsify(model, blocks="all").replaced:
        raise UserError(f"{type(model).__name__} is a Mixture of Experts, with {bank}: replace_routers takes it")
    change = {
        "change": "sparsify",
        "num_experts": num_experts,
        "router": described(router),
        **({} if experts is None else {"experts": described(experts)}),
        "blocks": blocks if isinstance(blocks, str) else list(blocks),
        "num_shared_experts": num_shared_experts,
    }
    sparsify_change(model, **{k: v for k, v in change.items() if k != "change"}, upcycle=copy_weights)  # type: ignore[arg-type]
    record_change(model, change)
    return model


def replace_routers(
    source: Source,
    router: str | RouterFactory = KEEP,
    *,
    auto_class: Any = transformers.AutoModelForCausalLM,
    **options: Any,
) -> Any:
    """Put routers of ours into a released Mixture of Experts; the experts stay, without a copy.

    Args:
        source: a name or path, a config, or a model, which is changed in place. One that has routers of ours already
            gets others.
        router: `"keep"` for the router that computes what the model's gate does, with its weights. Or any other one,
            initialized as it is built: its name, its class or a `functools.partial` of it, whose arguments are JSON. It
            selects as many experts as the model's own does, unless its arguments say how many.
        auto_class: builds the model where the source is none.
        options: for `from_pretrained`, such as `dtype` and `device_map`.

    Returns:
        The model, which `save_pretrained` and `from_pretrained` know how to build again.

    Raises:
        ValueError: a model whose gates are not known; a router that is not registered, or that does not fit.
    """
    model = _model(source, auto_class, options)
    named = {"name": KEEP} if router == KEEP else described(router)
    replace_change(model, router=named)
    record_change(model, {"change": "replace_routers", "router": named})
    return model


def train_routers_only(model: nn.Module) -> None:
    """Freeze all but the routers of a model's MoE layers.

    Raises:
        UserError: routers that have nothing to train.
    """
    routers = {layer.router for layer in moe_layers(model)}
    if not any(True for router in routers for _ in router.parameters()):
        names = ", ".join(sorted({type(router).__name__ for router in routers})) or "no router"
        raise UserError(f"{type(model).__name__} has {names}, without parameters to train: replace_routers")
    model.requires_grad_(False)
    for router in routers:
        router.requires_grad_(True)
    warn_of_untrained_routers(model)


def warn_of_untrained_routers(model: nn.Module) -> None:
    """Warn of routers with parameters that the task's loss does not reach."""
    for router in {layer.router for layer in moe_layers(model)}:
        inner: Any = getattr(router, "router", router)
        trainable = any(True for _ in router.parameters())
        if trainable and inner.top_k == 1 and not inner.properties.trains_at_top_1:
            warnings.warn(
                f"{type(inner).__name__} gives its one choice a weight that does not depend on it: only auxiliary "
                "losses train it, or top_k=2",
                stacklevel=3,
            )


def freeze_experts(model: nn.Module) -> None:
    """Freeze the experts of a model's MoE layers, shared ones too."""
    for layer in moe_layers(model):
        for part in (layer.experts, layer.shared_experts):
            if part is not None:
                part.requires_grad_(False)


def _model(source: Source, auto_class: Any, options: dict[str, Any]) -> Any:
    model: Any
    if isinstance(source, PreTrainedModel):
        if options:
            raise TypeError(f"{', '.join(options)} are for from_pretrained, the source is a model already")
        model = source
    elif isinstance(source, PreTrainedConfig):
        if type(source) not in auto_class._model_mapping:
            raise UserError(
                f"{auto_class.__name__} builds nothing of a {type(source).__name__}: pass another auto_class"
            )
        model = auto_class.from_config(source, **options)
    elif isinstance(source, str | os.PathLike):
        model = load_model(os.fspath(source), auto_class, options)
    else:
        raise TypeError(f"the source is {type(source).__name__}, not a model of transformers, its config, name or path")
    places = {name: parameter.is_meta for name, parameter in model.named_parameters()}
    if any(places.values()) and not all(places.values()):
        name = next(name for name, is_meta in places.items() if is_meta)
        raise UserError(
            f"{name} is offloaded, and cannot be changed: load the model without offloading (device_map='cpu'), save "
            "what was changed, and load that with offloading"
        )
    quantized: Any = getattr(model.config, "quantization_config", None)
    if quantized is not None:
        raise UserError(
            f"{type(model).__name__} is quantized, and cannot be changed: load it without a quantization_config, or "
            "dequantize it, save what was changed, and load that with one"
        )
    return model
