"""Callbacks for any `LightningModule` with MoE layers."""

from routerzoo.callbacks.expert_norms import ExpertNormMonitor
from routerzoo.callbacks.fine_tune import FineTune
from routerzoo.callbacks.k_schedule import KSchedule
from routerzoo.callbacks.non_finite import StopOnNonFiniteLoss
from routerzoo.callbacks.router_hooks import RouterHooks
from routerzoo.callbacks.routing_monitor import RoutingMonitor
from routerzoo.callbacks.specialization import ExpertSpecialization
from routerzoo.callbacks.stability import StabilityMonitor

__all__ = [
    "ExpertNormMonitor",
    "ExpertSpecialization",
    "FineTune",
    "KSchedule",
    "RouterHooks",
    "RoutingMonitor",
    "StabilityMonitor",
    "StopOnNonFiniteLoss",
]
