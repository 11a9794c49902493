"""Routers that assign tokens to experts jointly: expert choice, optimal transport, BASE; and a rewarded policy."""

from routerzoo_assignment.base_layer import BaseLayerRouter
from routerzoo_assignment.expert_choice import ExpertChoiceRouter, ExpertThresholdRouter
from routerzoo_assignment.reinforced import RLRouter
from routerzoo_assignment.sinkhorn import log_sinkhorn
from routerzoo_assignment.sinkhorn_routers import SBaseRouter, SelectiveSinkhornRouter, SinkhornRouter

__all__ = [
    "BaseLayerRouter",
    "ExpertChoiceRouter",
    "ExpertThresholdRouter",
    "RLRouter",
    "SBaseRouter",
    "SelectiveSinkhornRouter",
    "SinkhornRouter",
    "log_sinkhorn",
]
