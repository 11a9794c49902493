"""routerzoo: Mixture-of-Experts routers, compared, used and invented.

`MoE` is the layer, `Router` the interface, `create_router` and `list_routers` the registry, `sparsify` puts MoE layers
into a model that exists. Tasks and data modules for Lightning are loaded on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from routerzoo.models.sparsify import plan_sparsify, sparsify
from routerzoo.moe.attach import attach
from routerzoo.moe.auxiliary_loss import auxiliary_loss
from routerzoo.moe.averaging import copy_router_state
from routerzoo.moe.context import ContextHook, provide_context
from routerzoo.moe.experts import Experts, MLPExperts, SwiGLUExperts
from routerzoo.moe.grouped_linear import grouped_linear
from routerzoo.moe.layer import MoE, moe_layers
from routerzoo.registry import create_router, list_routers, register_router
from routerzoo.router import ByMode, LogitRouter, LossWeight, Router
from routerzoo.routers import (
    HashRouter,
    HyperRouter,
    LinearRouter,
    RandomFrozenRouter,
    StableMoERouter,
    XMoERouter,
)
from routerzoo.routers.wrapper import RouterWrapper
from routerzoo.routing import LayerSpec, Routing, RoutingContext
from routerzoo.tune_cpu import tune_cpu

__version__ = "0.2.0"

# These import Lightning, which takes seconds; they are loaded on first use.
_LAZY = {
    "ExpertSpecialization": "routerzoo.callbacks",
    "FineTune": "routerzoo.callbacks",
    "ImageClassification": "routerzoo.tasks",
    "ImageData": "routerzoo.data",
    "KSchedule": "routerzoo.callbacks",
    "LabelledText": "routerzoo.data",
    "LanguageModeling": "routerzoo.tasks",
    "PretrainedLanguageModeling": "routerzoo.tasks",
    "PretrainedTextClassification": "routerzoo.tasks",
    "RouterHooks": "routerzoo.callbacks",
    "RoutingMonitor": "routerzoo.callbacks",
    "ShardedStrategy": "routerzoo.distributed.strategy",
    "StabilityMonitor": "routerzoo.callbacks",
    "TextClassification": "routerzoo.tasks",
    "TextData": "routerzoo.data",
}
if TYPE_CHECKING:
    from routerzoo.callbacks import ExpertSpecialization as ExpertSpecialization
    from routerzoo.callbacks import FineTune as FineTune
    from routerzoo.callbacks import KSchedule as KSchedule
    from routerzoo.callbacks import RouterHooks as RouterHooks
    from routerzoo.callbacks import RoutingMonitor as RoutingMonitor
    from routerzoo.callbacks import StabilityMonitor as StabilityMonitor
    from routerzoo.data import ImageData as ImageData
    from routerzoo.data import LabelledText as LabelledText
    from routerzoo.data import TextData as TextData
    from routerzoo.distributed.strategy import ShardedStrategy as ShardedStrategy
    from routerzoo.tasks import ImageClassification as ImageClassification
    from routerzoo.tasks import LanguageModeling as LanguageModeling
    from routerzoo.tasks import PretrainedLanguageModeling as PretrainedLanguageModeling
    from routerzoo.tasks import PretrainedTextClassification as PretrainedTextClassification
    from routerzoo.tasks import TextClassification as TextClassification

__all__ = [
    "ByMode",
    "ContextHook",
    "Experts",
    "HashRouter",
    "HyperRouter",
    "LayerSpec",
    "LinearRouter",
    "LogitRouter",
    "LossWeight",
    "MLPExperts",
    "MoE",
    "RandomFrozenRouter",
    "Router",
    "RouterWrapper",
    "Routing",
    "RoutingContext",
    "StableMoERouter",
    "SwiGLUExperts",
    "XMoERouter",
    "attach",
    "auxiliary_loss",
    "copy_router_state",
    "create_router",
    "grouped_linear",
    "list_routers",
    "moe_layers",
    "plan_sparsify",
    "provide_context",
    "register_router",
    "sparsify",
    "tune_cpu",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'routerzoo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
