"""Metrics of routing quality, as torchmetrics."""

from routerzoo.metrics.confidence import GateConfidence
from routerzoo.metrics.load import ExpertLoad

__all__ = ["ExpertLoad", "GateConfidence"]
