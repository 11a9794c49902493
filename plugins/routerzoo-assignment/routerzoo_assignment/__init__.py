"""Routers that assign tokens to experts jointly: expert choice, optimal transport, BASE; and a rewarded policy."""

from routerzoo_assignment.base_layer import BaseLayerRouter
from routerzoo_assignment.expert_choice import ExpertChoiceRouter
from routerzoo_assignment.expert_threshold import ExpertThresholdRouter
from routerzoo_assignment.reinforced import RLRouter
from routerzoo_assignment.s_base import SBaseRouter
from routerzoo_assignment.selective_sinkhorn import SelectiveSinkhornRouter
from routerzoo_assignment.sinkhorn import SinkhornRouter
from routerzoo_assignment.transport import log_sinkhorn

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
