"""What happens over training, beside the training itself."""

from routerzoo.callbacks.anatomy import RoutingAnatomy
from routerzoo.callbacks.fine_tune import FineTune
from routerzoo.callbacks.finite import FiniteLoss
from routerzoo.callbacks.k_schedule import KSchedule
from routerzoo.callbacks.predictions import PredictionWriter
from routerzoo.callbacks.report import RunReport
from routerzoo.callbacks.routing_monitor import RoutingMonitor
from routerzoo.callbacks.routing_pictures import RoutingPictures
from routerzoo.callbacks.stability import StabilityMonitor

__all__ = [
    "FineTune",
    "FiniteLoss",
    "KSchedule",
    "PredictionWriter",
    "RoutingAnatomy",
    "RoutingMonitor",
    "RoutingPictures",
    "RunReport",
    "StabilityMonitor",
]
