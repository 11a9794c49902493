"""Initial values: modules that can be initialized again, random numbers of their own, and orthogonal matrices."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn


class Reinitializable(nn.Module):
    """A module that draws its initial values again by building itself again, with the arguments that it was built with.

    So that what was built on the meta device, or loaded from a checkpoint that lacks it, is initialized as the
    constructor does it, without a second copy of that code in each class.
    """

    _built_with: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:  # noqa: D102
        module = super().__new__(cls)
        module.__dict__["_built_with"] = (args, kwargs)
        return module

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw parameters and buffers as the constructor did, on the device where they are.

        What transformers marks as loaded from a checkpoint stays as it is.

        Raises:
            ValueError: its tensors are no longer those that the constructor made, as under a parametrization.
        """
        args, kwargs = self._built_with
        own = _tensors(self)
        device = next((tensor.device for tensor in own.values()), torch.device("cpu"))
        with torch.device(device):
            fresh = _tensors(type(self)(*args, **kwargs))
        if missing := fresh.keys() - own.keys():
            raise ValueError(
                f"{type(self).__name__} has no {', '.join(sorted(missing))} any more, so that it cannot be initialized "
                "again: call reset_parameters before parametrizations and adapters are added"
            )
        for name, tensor in fresh.items():
            if not getattr(own[name], "_is_hf_initialized", False):  # transformers has loaded this one
                own[name].copy_(_placed_as(own[name], tensor))


@contextmanager
def own_generator(device: torch.device | None = None) -> Iterator[None]:
    """Draw from a generator of its own, which one number of torch's generator seeds.

    What follows outside gets the same numbers, however many are drawn inside.

    Args:
        device: where numbers are drawn, beside the CPU; by default torch's default device.
    """
    device = torch.get_default_device() if device is None else device
    drawn = torch.randint(2**62, (), device="cpu")
    seed = int(drawn) if type(drawn) is Tensor else 0  # a fake tensor has no value
    devices = []
    if device.type == "cuda" and torch.cuda.is_available():
        devices = [torch.cuda.current_device() if device.index is None else device.index]
    with torch.random.fork_rng(devices):
        # Not `torch.manual_seed`, which would seed all other devices too.
        torch.default_generator.manual_seed(seed)
        for place in devices:
            torch.cuda.default_generators[place].manual_seed(seed)
        yield


def orthogonal(rows: int, columns: int, gain: float = 1.0) -> Tensor:
    """Draw a matrix whose rows are orthonormal, or its columns where there are more rows, times a gain.

    It is drawn in at least float32, since no decomposition takes 16 bits, and returned in torch's default dtype.
    """
    dtype = torch.get_default_dtype()
    drawn = torch.empty(rows, columns, dtype=torch.promote_types(dtype, torch.float32))
    return nn.init.orthogonal_(drawn, gain=gain).to(dtype)


def _placed_as(own: Any, fresh: Tensor) -> Tensor:
    """Shard what was drawn as the module's own tensor is sharded; the values are those of the first process."""
    if not hasattr(own, "device_mesh"):
        return fresh
    from torch.distributed.tensor import distribute_tensor  # takes a second to import

    return distribute_tensor(fresh, own.device_mesh, own.placements)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(itertools.chain(module.named_parameters(), module.named_buffers()))
