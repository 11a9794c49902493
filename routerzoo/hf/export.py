"""The way out: a model whose routers transformers knows becomes one of its own classes again."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from routerzoo.errors import UserError
from routerzoo.hf.blocks import RoutedExperts
from routerzoo.hf.changes import Site, gate_tensor, released_arguments, released_sites
from routerzoo.hf.experts import activation_of, put_back
from routerzoo.hf.modeling import check_weights, plain_class
from routerzoo.moe.activations import Activation
from routerzoo.moe.experts import SwiGLUExperts
from routerzoo.moe.layer import MoE, inner_router, moe_layers
from routerzoo.router import LogitRouter, Router


@dataclass(frozen=True)
class Counterpart:
    """The released Mixture of Experts whose other layers are those of a dense model.

    Args:
        model: its class.
        sizes: what its config calls the numbers of experts, of experts per token, and the width of an expert.
        renormalize: what its config calls whether weights sum to 1; None where they always do.
        dense_layers: what its config calls the layers without experts; None where there can be none.
        needed: what the dense config must say.
    """

    model: str
    sizes: tuple[str, str, str]
    renormalize: str | None = None
    dense_layers: str | None = None
    needed: Mapping[str, Any] = field(default_factory=dict)


_LLAMA = Counterpart(
    "MixtralForCausalLM",
    ("num_local_experts", "num_experts_per_tok", "intermediate_size"),
    needed={"attention_bias": False, "mlp_bias": False},
)
COUNTERPARTS: dict[str, Counterpart] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen3": Counterpart(
        "Qwen3MoeForCausalLM",
        ("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
        renormalize="norm_topk_prob",
        dense_layers="mlp_only_layers",
    ),
    "olmo2": Counterpart(
        "FlexOlmoForCausalLM",
        ("num_experts", "num_experts_per_tok", "intermediate_size"),
        renormalize="norm_topk_prob",
    ),
}
"""By the type of the dense model."""


def to_transformers(model: Any) -> Any:
    """Return a changed model as one of a class of transformers, which needs nothing of ours; weights are not copied.

    A released model gets its own gates back, with the weights that ours have now. A dense one that was upcycled becomes
    the Mixture of Experts whose other layers are the same: Llama and Mistral become Mixtral, Qwen3 becomes Qwen3-MoE,
    OLMo 2 becomes FlexOlmo. The model that is given is used up.

    Args:
        model: what `upcycle` or `replace_routers` returned, or a saved one that was loaded.

    Raises:
        UserError: a model, a router or a layer that no class of transformers has.
    """
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"to_transformers takes what upcycle or replace_routers returned, got {type(model).__name__}: take the "
            "model out of what is around it, as merge_and_unload does with PEFT's"
        )
    if not hasattr(model.config, "routing"):
        raise UserError(f"{type(model).__name__} is a plain model of transformers: save it as it is")
    check_weights(model)
    layers = list(moe_layers(model))
    routed = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    if len(routed) == len(layers):
        return _released(model)
    if routed:
        raise UserError("a released Mixture of Experts that was upcycled too has no counterpart in transformers")
    return _counterpart(model)


def _plain_config(model: Any) -> Any:
    config = copy.deepcopy(model.config)
    config.__class__ = type(config).__mro__[1]
    config.__dict__.pop("model_type", None)  # of a config that was loaded; the class's counts
    del config.routing
    return config


def _released(model: Any) -> Any:
    config = _plain_config(model)
    with torch.device("meta"):  # modules without weights
        plain: Any = plain_class(model)._from_config(config, dtype=model.dtype)  # type: ignore[no-untyped-call]
    sites = list(released_sites(plain))
    for site in sites:  # a refusal leaves the model as it was
        _check_router(site, plain, inner_router(model.get_submodule(site.name).experts.moe))
    for site in sites:
        block = model.get_submodule(site.name)
        moe, bank = block.experts.moe, site.block.get_submodule("experts")
        _write_gate(site, inner_router(moe), plain)
        put_back(moe.experts, bank)
        setattr(block, site.place, site.gate.train(block.training))
        block.experts = bank.train(block.training)
    _undress(model, plain_class(model), config)
    return model


def _check_router(site: Site, plain: Any, router: Router) -> None:
    architecture, expected = site.architecture, released_arguments(site, plain)
    if type(router).__name__ != architecture.router:
        raise UserError(
            f"{site.name} routes with {type(router).__name__}, {architecture.models} with what {architecture.router} "
            "does: transformers has no class for that"
        )
    own = {key: _attribute(router, key) for key in expected}
    if own != expected:
        raise UserError(f"{site.name} routes with {own}, its class of transformers with {expected}")


def _attribute(router: Any, argument: str) -> Any:
    if argument == "bias":
        return router.bias is not None
    if argument == "hash_layers":
        return router.spec.num_layers if router.table is not None else 0
    inner = router if isinstance(router, LogitRouter) else router.router
    return getattr(inner, {"score": "score_fn"}.get(argument, argument))


@torch.no_grad()
def _write_gate(site: Site, router: Router, plain: Any) -> None:
    for ours, theirs in site.architecture.tensors.items():
        value, old = gate_tensor(router, ours), gate_tensor(site.gate, theirs)
        if ours == "table":
            value = value[:, : old.shape[1]].contiguous()
        if isinstance(old, nn.Parameter):
            value = value.to(_loaded_dtype(plain, f"{site.name}.{site.place}.{theirs}", old))
        _set(site.gate, theirs, value.view(old.shape))


def _loaded_dtype(plain: Any, name: str, parameter: Tensor) -> torch.dtype:
    """Return the dtype in which `from_pretrained` loads a parameter: some gates stay in float32."""
    kept = any(re.search(pattern.replace("*", ".*"), name) for pattern in plain._get_dtype_plan(plain.dtype))
    return torch.float32 if kept else parameter.dtype


def _set(module: nn.Module, path: str, value: Tensor) -> None:
    owner, _, name = path.rpartition(".")
    holder = module.get_submodule(owner)
    old = holder._parameters.get(name)
    if old is not None:
        value = nn.Parameter(value, requires_grad=old.requires_grad)
    setattr(holder, name, value)


def _counterpart(model: Any) -> Any:
    dense_type, name = model.config.routing["model_type"], plain_class(model).__name__
    counterpart = COUNTERPARTS.get(dense_type)
    if counterpart is None or not name.endswith("ForCausalLM"):
        known = ", ".join(f"{key} ({value.model})" for key, value in COUNTERPARTS.items())
        raise UserError(f"no Mixture of Experts of transformers has the other layers of {name}; known are {known}")
    dense = _plain_config(model)
    for key, value in counterpart.needed.items():
        if getattr(dense, key, value) != value:
            raise UserError(f"{counterpart.model} has no {key}, the model has {getattr(dense, key)!r}")
    attention = set(getattr(dense, "layer_types", None) or ())
    if len(attention) > 1:
        raise UserError(f"{counterpart.model} has one kind of attention, the model has {', '.join(sorted(attention))}")
    sizes = _common_sizes(model, counterpart)
    target = getattr(transformers, counterpart.model)
    values = {key: value for key, value in dense.to_dict().items() if key not in ("model_type", "architectures")}
    if attention == {"full_attention"}:  # the counterpart looks at the window alone, whatever the layers are
        values |= {
            key: none for key, none in (("sliding_window", None), ("use_sliding_window", False)) if key in values
        }
    config = target.config_class(**{**values, **sizes})
    with torch.device("meta"):
        plain = target(config)
    state = _renamed_state(model)
    plain.load_state_dict(state, strict=True, assign=True)
    buffers = dict(model.named_buffers())
    for path, buffer in list(plain.named_buffers()):  # those that are not saved, of positions
        if buffer.is_meta:
            _set(plain, path, buffers[path])
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain.train(model.training)


def _common_sizes(model: Any, counterpart: Counterpart) -> dict[str, Any]:
    """Return what the config of the counterpart says of all MoE layers."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, MoE)}
    found = {
        (*_checked_layer(name, layer), layer.num_experts, layer.experts.hidden_dim) for name, layer in layers.items()
    }
    if len(found) > 1:
        raise UserError(f"{counterpart.model} has equal layers, those of the model differ: {sorted(found)}")
    ((top_k, renormalize, activation, num_experts, hidden_dim),) = found
    if not renormalize and counterpart.renormalize is None:
        raise UserError(f"the weights of {counterpart.model} sum to 1: build the router with renormalize=True")
    dense = [
        index for index in range(model.config.num_hidden_layers) if not any(f".{index}." in name for name in layers)
    ]
    if dense and counterpart.dense_layers is None:
        raise UserError(f"all layers of {counterpart.model} have experts, the model's {dense} have none: blocks='all'")
    sizes: dict[str, Any] = dict(zip(counterpart.sizes, (num_experts, top_k, hidden_dim), strict=True))
    if activation_of(ACT2FN[model.config.hidden_act]) != activation:
        if dense:
            raise UserError(
                f"experts of the model have the activation {activation}, its dense layers {model.config.hidden_act}: "
                f"{counterpart.model} has one for both"
            )
        sizes["hidden_act"] = {"gelu_tanh": "gelu_pytorch_tanh"}.get(activation, activation)
    if counterpart.renormalize is not None:
        sizes[counterpart.renormalize] = renormalize
    if counterpart.dense_layers is not None:
        sizes[counterpart.dense_layers] = dense
    return sizes


def _checked_layer(name: str, layer: MoE) -> tuple[int, bool, Activation]:
    """Return how many experts a token has, whether their weights sum to 1, and the experts' activation."""
    router: Any = inner_router(layer)
    known = type(router).__name__ in ("LinearRouter", "TopKRouter") and router.score_fn == "softmax"
    plain = known and router.bias is None and router.scale == 1 and getattr(router, "noise_weight", None) is None
    biased = bool(torch.any(getattr(router, "selection_bias", torch.zeros(1)) != 0)) if plain else True
    if not plain or biased or getattr(router, "num_groups", 1) != 1:
        raise UserError(
            f"{name} routes with {type(router).__name__}: transformers knows the linear gate with softmax weights, "
            "LinearRouter or TopKRouter without bias, groups, scale and noise"
        )
    experts = layer.experts
    if layer.shared_experts is not None or not isinstance(experts, SwiGLUExperts) or experts.gate_up_bias is not None:
        raise UserError(
            f"{name} has shared experts, or others than SwiGLUExperts without bias, which its counterpart has not"
        )
    return router.top_k, bool(router.renormalize), experts.activation


def _renamed_state(model: Any) -> dict[str, Tensor]:
    renamed = {
        "router.weight": "gate.weight",
        "experts.gate_up": "experts.gate_up_proj",
        "experts.down": "experts.down_proj",
    }
    layers = [name for name, layer in model.named_modules() if isinstance(layer, MoE)]
    state = dict(model.state_dict(keep_vars=True))
    for name in layers:
        own = {key: state.pop(key) for key in list(state) if key.startswith(f"{name}.")}
        for ours, theirs in renamed.items():
            value = own[f"{name}.{ours}"]
            state[f"{name}.{theirs}"] = value.to(model.dtype) if ours.startswith("router") else value
    return state


def _undress(model: Any, cls: type, config: Any) -> None:
    model.routing.remove()
    del model.routing
    for name in ("_init_weights", "_keep_in_fp32_modules_strict", "_weight_conversions"):
        model.__dict__.pop(name, None)
    routed = model.config
    for module in model.modules():  # all submodules keep the same config
        if getattr(module, "config", None) is routed:
            module.config = config
    model.__class__ = cls
    for module in reversed(list(model.modules())):  # a model's plans are made of its submodels'
        if isinstance(module, PreTrainedModel):
            module.init_parallel_plans()
