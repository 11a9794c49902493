"""Loading of MoE layers in models of transformers: what a checkpoint lacks, and the precision of routers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch import nn

from routerzoo.functional.initialization import Reinitializable
from routerzoo.moe.layer import reset_router
from routerzoo.router import Router


def initialize_missing_weights(model: nn.Module) -> None:
    """Let `from_pretrained` initialize routers and experts that the checkpoint lacks, such as a dense one's.

    transformers builds a model on the meta device, and gives what the checkpoint lacks to the model's `_init_weights`,
    module by module. Those of the library know torch's layers and leave ours uninitialized. Routers stay in float32
    where the checkpoint is loaded in 16 bits.

    Args:
        model: where it is one of transformers', or holds some, their `_init_weights` is extended, in place.
    """
    for module in model.modules():
        if hasattr(module, "_initialize_missing_keys"):
            if not isinstance(module._init_weights, _InitWeights):
                module._init_weights = _InitWeights(module)  # type: ignore[assignment]
            strict: Any = getattr(module, "_keep_in_fp32_modules_strict", None)
            module._keep_in_fp32_modules_strict = {*(strict or ()), *_router_tensors(module)}  # type: ignore[assignment]


def _router_tensors(model: nn.Module) -> Iterator[str]:
    """Yield the names of all tensors of routers that are of floating point; transformers would convert integers too."""
    for name, router in model.named_modules():
        if isinstance(router, Router):
            for key, tensor in itertools.chain(router.named_parameters(), router.named_buffers()):
                if tensor.is_floating_point():
                    yield f"{name}.{key}"


class _InitWeights:
    """The `_init_weights` of a model, extended. No closure, so that the model can be copied and pickled."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, module: nn.Module) -> None:
        if isinstance(module, Router):
            reset_router(module)
        elif isinstance(module, Reinitializable):
            module.reset_parameters()
        else:
            type(self.model)._init_weights(self.model, module)
