"""Metrics of routing quality, as torchmetrics."""

from routerzoo.metrics.co_activation import CoActivation
from routerzoo.metrics.collapse import RepresentationCollapse
from routerzoo.metrics.confidence import GateConfidence
from routerzoo.metrics.consistency import InterRunConsistency
from routerzoo.metrics.expert_norms import ExpertNorms
from routerzoo.metrics.load import ExpertLoad
from routerzoo.metrics.sets import expert_sets
from routerzoo.metrics.specialization import Specialization
from routerzoo.metrics.stability import LastFluctuation, RouterSaturation, RoutingFluctuation

__all__ = [
    "CoActivation",
    "ExpertLoad",
    "ExpertNorms",
    "GateConfidence",
    "InterRunConsistency",
    "LastFluctuation",
    "RepresentationCollapse",
    "RouterSaturation",
    "RoutingFluctuation",
    "Specialization",
    "expert_sets",
]
