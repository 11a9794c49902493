"""What happens over training, beside the training itself."""

from routerzoo.callbacks.k_schedule import KSchedule
from routerzoo.callbacks.predictions import PredictionWriter
from routerzoo.callbacks.report import RunReport
from routerzoo.callbacks.routing_monitor import RoutingMonitor

__all__ = ["KSchedule", "PredictionWriter", "RoutingMonitor", "RunReport"]
