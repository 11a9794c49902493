"""How many processes a run is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def num_processes(trainer: Mapping[str, Any], gpus: int = 0) -> int:
    """Return the processes that a run on one machine is, each with a device of its own.

    Args:
        trainer: the config's section.
        gpus: that the run may see, of which `auto` and -1 take all.

    Example:
        >>> num_processes({"devices": 2}), num_processes({"devices": "0,3"}), num_processes({"devices": "auto"}, gpus=4)
        (2, 2, 4)
    """
    devices = trainer.get("devices", "auto")
    if devices in ("auto", -1, "-1"):
        return max(gpus, 1) if trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda") else 1
    if isinstance(devices, str):
        return len(devices.strip(",").split(",")) if "," in devices else max(int(devices), 1)
    return max(devices, 1) if isinstance(devices, int) else len(devices)


def gpus_needed(trainer: Mapping[str, Any]) -> int:
    """Return how many GPUs a run's config asks for; 1 where it takes what there is, 0 where it takes none."""
    if trainer.get("accelerator", "auto") not in ("auto", "gpu", "cuda"):
        return 0
    return num_processes(trainer, gpus=1)
