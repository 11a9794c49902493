"""What happens over training, beside the training itself."""

from routerzoo.callbacks.fine_tune import FineTune
from routerzoo.callbacks.k_schedule import KSchedule
from routerzoo.callbacks.non_finite import StopOnNonFiniteLoss
from routerzoo.callbacks.predictions import PredictionWriter
from routerzoo.callbacks.report import RunReport
from routerzoo.callbacks.routing_monitor import RoutingMonitor
from routerzoo.callbacks.routing_pictures import RoutingPictures
from routerzoo.callbacks.specialization import ExpertSpecialization
from routerzoo.callbacks.stability import StabilityMonitor

__all__ = [
    "ExpertSpecialization",
    "FineTune",
    "KSchedule",
    "PredictionWriter",
    "RoutingMonitor",
    "RoutingPictures",
    "RunReport",
    "StabilityMonitor",
    "StopOnNonFiniteLoss",
]
