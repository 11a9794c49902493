"""Wrappers around any router: a capacity for each expert, replay of recorded choices, steering of logits."""

from routerzoo_policies.capacity import CapacityRouter
from routerzoo_policies.engines import (
    encode_routed_experts,
    read_routed_experts,
    routed_experts,
    routings_from_engine,
)
from routerzoo_policies.recording import Recording, record
from routerzoo_policies.replay import ReplayRouter, replay
from routerzoo_policies.steering import SteeredRouter, steer

__all__ = [
    "CapacityRouter",
    "Recording",
    "ReplayRouter",
    "SteeredRouter",
    "encode_routed_experts",
    "read_routed_experts",
    "record",
    "replay",
    "routed_experts",
    "routings_from_engine",
    "steer",
]
