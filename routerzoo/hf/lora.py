"""Adapters of PEFT, from options that are JSON."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from routerzoo.errors import UserError
from routerzoo.moe.layer import moe_layers
from routerzoo.registry import did_you_mean

OF_MODULES = ("layers_to_transform", "layers_pattern", "exclude_modules")
"""Arguments that PEFT 0.21 applies to `target_modules`, and ignores for `target_parameters`."""


def adapted(model: Any, options: dict[str, Any]) -> Any:
    """Return PEFT's model around a model: by default with LoRA on its experts.

    Args:
        model: of transformers, with MoE layers.
        options: arguments of `LoraConfig`.

    Raises:
        UserError: PEFT is not installed, or the options name what the model has not, or PEFT refuses them.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError("LoRA needs peft: pip install 'routerzoo[hf]'") from error
    layer = next(moe_layers(model), None)
    if layer is None:
        raise UserError("LoRA here is that of experts, and the model has none")
    options = dict(options)
    if not options.get("target_modules") and not options.get("target_parameters"):
        banks = [name for name, parameter in layer.experts.named_parameters() if parameter.ndim == 3]
        options["target_parameters"] = [f"experts.{name}" for name in banks]
    _check_names(model, options)
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 reads it of every model.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            return peft.get_peft_model(model, peft.LoraConfig(**options))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"lora: {' '.join(str(error).split()).partition('. ')[0]}") from error


def _check_names(model: nn.Module, options: dict[str, Any]) -> None:
    """Refuse names that PEFT would pass over."""
    if options.get("target_parameters") and (ignored := [name for name in OF_MODULES if options.get(name)]):
        raise UserError(f"lora: PEFT ignores {ignored[0]} for target_parameters: leave it out")
    if isinstance(saved := options.get("modules_to_save"), str):  # PEFT would take each letter for an ending
        raise UserError(f"lora: modules_to_save is {saved!r}, not a list: [{saved}]")
    modules = [name for name, module in model.named_modules() if any(True for _ in module.parameters())]
    parameters = [name for name, _ in model.named_parameters()]
    for argument, known, words in (
        ("target_modules", modules, 1),
        ("modules_to_save", modules, 1),
        ("exclude_modules", modules, 1),
        ("target_parameters", parameters, 2),
    ):
        given = options.get(argument)
        for name in given if isinstance(given, list | tuple | set) else ():
            if not any(f".{one}".endswith(f".{name}") for one in known):
                hint = did_you_mean(str(name), _endings(known, words))
                raise UserError(
                    f"lora: {argument} names {name!r}, as no part of the model with weights is called{hint}"
                )
    for argument in ("rank_pattern", "alpha_pattern"):
        for pattern in options.get(argument) or ():
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in (*modules, *parameters)):
                raise UserError(f"lora: {argument} has {pattern!r}, which matches no part of the model with weights")


def _endings(names: Iterable[str], words: int) -> list[str]:
    return sorted({".".join(name.split(".")[-words:]) for name in names})
