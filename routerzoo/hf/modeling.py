"""Models of transformers that route with routerzoo: classes and configs, saved and loaded as all others are.

A model that was changed is of a subclass of its class, made when it is first needed: `LlamaForCausalLM` becomes
`RoutedLlamaForCausalLM`. Its config is the model's with the model type `routerzoo`, and keeps in `routing` the type
that it was and the changes. Importing `routerzoo.hf` makes `AutoConfig`, and with it all Auto classes, read that type.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import transformers
from safetensors import SafetensorError
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from routerzoo.errors import UserError
from routerzoo.hf.blocks import RoutedExperts
from routerzoo.hf.changes import CHANGES, check_change
from routerzoo.hf.context import ContextOfInputs
from routerzoo.hf.source import damaged_weights
from routerzoo.moe.context import ContextHook
from routerzoo.moe.layer import MoE, inner_router, moe_layers

MODEL_TYPE = "routerzoo"
PREFIX = "Routed"


class RoutedConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """What `AutoConfig` finds for the model type `routerzoo`; reads a config of the type that the model was."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the config of a changed model.

        Raises:
            UserError: a config that does not say what the model was.
        """
        routing = config_dict.get("routing")
        routing = routing if isinstance(routing, dict) else {}
        base, changes = str(routing.get("model_type")), routing.get("changes")
        if base not in CONFIG_MAPPING:
            raise UserError(f"this config's routing names no model type that transformers knows, but {base}")
        if not isinstance(changes, list):
            raise UserError(f"this config's routing has no list of changes, but {changes!r}")
        for change in changes:
            check_change(change)
        return config_class(CONFIG_MAPPING[base]).from_dict(config_dict, **kwargs)


_CLASSES: dict[Any, Any] = {}


def config_class(base: Any) -> Any:
    """Return the class of configs of changed models of a type, and let the Auto classes know it."""
    if base in _CLASSES:
        return _CLASSES[base]
    _CLASSES[base] = routed = type(PREFIX + base.__name__, (base,), {"model_type": MODEL_TYPE, "__module__": __name__})
    for name in modeling_auto.__all__:
        auto: Any = getattr(modeling_auto, name)
        mapping = getattr(auto, "_model_mapping", None)
        if mapping is not None and base in mapping:
            model = mapping[base]
            if isinstance(model, type):
                auto.register(routed, model_class(model, routed))
    return routed


def model_class(base: Any, config: Any) -> Any:
    """Return the class of changed models of a class of transformers."""
    if base in _CLASSES:
        return _CLASSES[base]

    def __init__(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        if not any(moe_layers(self)):  # else its base model was built by an Auto class, and is changed already
            for change in config.routing["changes"]:
                apply_change(self, change)
        drop_plans(self)
        add_context(self)

    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return base.from_pretrained.__func__(cls, pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise UserError(damaged_weights(str(pretrained_model_name_or_path), error)) from error

    def resize_token_embeddings(self: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        for layer in moe_layers(self):
            router = inner_router(layer)
            size = router.spec.vocab_size
            if "token_ids" in router.requires and size is not None and new_num_tokens not in (None, size):
                raise UserError(
                    f"{type(router).__name__} looks up {size} token ids, not {new_num_tokens}: resize the embeddings "
                    "before replace_routers or upcycle"
                )
        return base.resize_token_embeddings(self, new_num_tokens, *args, **kwargs)

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        check_weights(self)
        base.save_pretrained(self, *args, **kwargs)

    members = {
        "__init__": __init__,
        "save_pretrained": save_pretrained,
        "resize_token_embeddings": resize_token_embeddings,
        "from_pretrained": classmethod(from_pretrained),
        "config_class": config,
        "__module__": __name__,
        "__doc__": base.__doc__,
    }
    routed: type = type(PREFIX + base.__name__, (base,), members)
    _CLASSES[base] = routed
    return routed


def apply_change(model: nn.Module, change: Mapping[str, Any]) -> None:
    """Repeat what a config says was done to a model."""
    kind, options = change["change"], {key: value for key, value in change.items() if key != "change"}
    CHANGES[kind](model, **options)


def add_context(model: Any) -> None:
    """Give routers the context of each forward pass; the last one is `model.routing.context`."""
    for module in model.modules():
        if module is not model and isinstance(getattr(module, "routing", None), ContextHook):
            module.routing.remove()  # the outermost model's counts
            del module.routing
    if not isinstance(getattr(model, "routing", None), ContextHook):
        model.routing = ContextHook(model, ContextOfInputs(model))


def drop_plans(model: nn.Module) -> None:
    """Take what is gone, and what MoE layers stand in for, out of the plans of tensor and expert parallelism.

    Such a plan sums the parts that processes have of the experts; each has all of ours, which would be added up.
    """
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        ours = [name for name, part in module.named_modules() if isinstance(part, MoE | RoutedExperts)]
        names = {re.sub(r"\d+", "*", name) for name, _ in (*module.named_modules(), *module.named_parameters())}
        replaced = {re.sub(r"\d+", "*", name) for name in ours}
        for attribute in ("_tp_plan", "_ep_plan"):
            plan = getattr(module, attribute) or {}
            setattr(module, attribute, {key: plan[key] for key in plan if key in names and key not in replaced})


def record_change(model: Any, change: Mapping[str, Any]) -> None:
    """Make a model that was changed one of a class of ours, whose config tells the change."""
    config, swapped = _own_config(model), change["change"] == "replace_routers"
    if hasattr(config, "routing"):
        changes = config.routing["changes"]
        if swapped:  # of all its layers
            config.routing = {**config.routing, "changes": [{**each, "router": change["router"]} for each in changes]}
        else:
            config.routing = {**config.routing, "changes": [*changes, dict(change)]}
        return
    config.routing = {"model_type": config.model_type, "changes": [dict(change)]}
    config.__class__ = config_class(type(config))
    model.__class__ = model_class(type(model), type(config))
    _CAN_RECORD_REGISTRY[model] = model._can_record_outputs
    # Names of transformers' checkpoints, which it would save the weights under.
    model._weight_conversions = []
    drop_plans(model)
    add_context(model)


def _own_config(model: Any) -> Any:
    """Give a model a config of its own: the caller, or another model, may hold the one that it was built from."""
    copies: dict[int, Any] = {}
    own = copy.deepcopy(model.config, copies)
    for module in model.modules():
        if id(held := getattr(module, "config", None)) in copies:
            module.config = copies[id(held)]
    return own


def check_weights(model: nn.Module) -> None:
    """Raise a UserError where weights of MoE layers are computed from others, which are saved under other names."""
    for name, layer in model.named_modules():
        if isinstance(layer, MoE) and any(parametrize.is_parametrized(part) for part in layer.modules()):
            raise UserError(
                f"weights of {name} are computed from others, as those of quantize_experts are, and would not be read "
                "again: save or export the model before"
            )


def plain_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """Return the class of transformers that a changed model's was made of."""
    return type(model).__mro__[1]


def __getattr__(name: str) -> Any:
    """Find the classes that this module makes, for `pickle`."""
    base = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if isinstance(base, type) and issubclass(base, PreTrainedConfig):
        return config_class(base)
    if isinstance(base, type) and issubclass(base, PreTrainedModel):
        return model_class(base, config_class(base.config_class))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


AutoConfig.register(MODEL_TYPE, RoutedConfig, exist_ok=True)
