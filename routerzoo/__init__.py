"""routerzoo: Mixture-of-Experts routers, compared, used and invented.

`MoE` is the layer, `Router` the interface, `create_router` and `list_routers` the registry, `sparsify` puts MoE layers
into a model that exists. Tasks and data modules for Lightning are loaded on first use.
"""

from routerzoo.experts import Experts, MLPExperts, SwiGLUExperts
from routerzoo.grouped import grouped_linear
from routerzoo.moe import MoE, moe_layers
from routerzoo.registry import create_router, list_routers, register_router
from routerzoo.router import Router
from routerzoo.routers import (
    HashRouter,
    HyperRouter,
    LinearRouter,
    RandomFrozenRouter,
    StableMoERouter,
    XMoERouter,
)
from routerzoo.routing import LayerSpec, Routing, RoutingContext

__version__ = "0.1.0"

__all__ = [
    "Experts",
    "HashRouter",
    "HyperRouter",
    "LayerSpec",
    "LinearRouter",
    "MLPExperts",
    "MoE",
    "RandomFrozenRouter",
    "Router",
    "Routing",
    "RoutingContext",
    "StableMoERouter",
    "SwiGLUExperts",
    "XMoERouter",
    "create_router",
    "grouped_linear",
    "list_routers",
    "moe_layers",
    "register_router",
]
