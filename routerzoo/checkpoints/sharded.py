"""Checkpoints of sharded models: a folder into which each rank writes its part.

The folder holds `meta.pt`, everything that is no tensor of the model or the optimizer, and torch's distributed
checkpoint of the tensors: `state_dict.<name>` and `optimizer.<parameter>.<state>`. Any number of ranks can read what
any other has written, one process too.
"""

from __future__ import annotations

import pickle
import re
import shutil
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.optim import Optimizer

from routerzoo.errors import UserError
from routerzoo.optim import EXECUTION
from routerzoo.runs.atomic import TEMPORARY, atomic_replace, recover

META = "meta.pt"
STATE, OPTIMIZER, CHECKSUMS = "state_dict", "optimizer", "checksums"


def is_folder(path: Path) -> bool:
    """Whether this is such a checkpoint."""
    return recover(path) and (path / META).is_file()


def read_meta(path: Path) -> dict[str, Any]:
    """Read what a folder holds beside tensors, without letting it run code.

    Raises:
        UserError: it is broken, or needs code to be read.
    """
    try:
        with zipfile.ZipFile(path / META) as archive:
            if archive.testzip() is not None:
                raise ValueError(f"{META} has changed since it was written")
        meta = torch.load(path / META, map_location="cpu", weights_only=True)
        _refuse_code(path / ".metadata")
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path} is not a checkpoint that can be read: {reason_of(error)}") from error
    if not isinstance(meta, dict) or STATE not in meta or CHECKSUMS not in meta:
        raise UserError(f"{path} is not a checkpoint of a sharded model: {META} lacks a {STATE}")
    return meta


_METADATA = "torch.distributed.checkpoint.metadata"
_CONTENTS = {
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}
"""What a table of contents names. Not whole modules, which have other modules and their functions for attributes."""


class _Plain(pickle.Unpickler):
    """Reads a checkpoint's table of contents, whose classes are torch's own, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CONTENTS:
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"its table of contents names {module}.{name}, which is no part of one")


def _refuse_code(path: Path) -> None:
    # torch reads this file with plain pickle.
    with path.open("rb") as file:
        _Plain(file).load()


class _Writer(FileSystemWriter):
    """Torch's, but its table of contents names no path, whose class has another name from one Python to the next."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


def save(path: Path, meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a folder, on all ranks together. One that exists is replaced once the new one is complete."""
    part = path.with_name(path.name + TEMPORARY)
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier()
    save_tensors(tensors, storage_writer=_Writer(part))
    # Each process reads what it has written; the first one the table of contents.
    own = [*part.glob(f"__{dist.get_rank()}_*"), *([part / ".metadata"] if first else [])]
    checksums: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(checksums, {file.name: _checksum(file) for file in own})
    if first:
        torch.save({**meta, CHECKSUMS: {name: sum_ for sums in checksums for name, sum_ in sums.items()}}, part / META)
        atomic_replace(part, path)
    dist.barrier()


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def verify(path: Path, checksums: dict[str, int], rank: int = 0, ranks: int = 1) -> None:
    """Compare a folder's files with what was written; each rank its share of them.

    Raises:
        UserError: one is missing, or has changed.
    """
    for name in sorted(checksums)[rank::ranks]:
        file = path / Path(name).name
        if not file.is_file():
            raise UserError(f"the checkpoint {path} is incomplete: {name} is missing")
        if _checksum(file) != checksums[name]:
            raise UserError(f"the checkpoint {path} is damaged: {name} has changed since it was written")


def load(path: Path, tensors: dict[str, Any]) -> None:
    """Read tensors into given memory, on all ranks together, each its part.

    Raises:
        UserError: one is missing, of another shape, or cannot be read.
    """
    try:
        load_tensors(tensors, storage_reader=FileSystemReader(path))
    except (CheckpointException, RuntimeError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} does not hold this model: {reason_of(error)}") from error


def sizes(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return size and type of every tensor in a folder that `read_meta` has found harmless."""
    found = FileSystemReader(path).read_metadata().state_dict_metadata
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in found.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_whole(path: Path) -> dict[str, Any]:
    """Read a folder into one process, as the checkpoint that one process would have written.

    The optimizer's state is by name of parameter; see `by_number`.

    Raises:
        UserError: it is broken, or needs code to be read.
    """
    checkpoint = read_meta(path)
    verify(path, checkpoint.pop(CHECKSUMS))
    try:
        tensors: dict[str, Any] = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in sizes(path).items()}
        with warnings.catch_warnings():
            # One process reads on purpose.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            load_tensors(tensors, storage_reader=FileSystemReader(path), no_dist=True)
    except Exception as error:
        raise UserError(f"{path} is not a checkpoint that can be read: {reason_of(error)}") from error
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == STATE:
            checkpoint[STATE][rest] = tensor
        else:
            parameter, _, state = rest.rpartition(".")
            checkpoint["optimizer_states"][0]["state"].setdefault(parameter, {})[state] = tensor
    return checkpoint


def named_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """Return an optimizer's state by name of parameter, so that it can be read into one with other groups."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    state = {names[parameter]: dict(values) for parameter, values in optimizer.state.items() if values}
    groups = [{**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups]
    return {"state": state, "param_groups": groups}


def named(state: dict[str, Any], groups: list[dict[str, Any]], model: nn.Module) -> dict[str, Any]:
    """Turn a state by number, as one process saves it, into one by name.

    Args:
        state: of an optimizer with the parameters of `groups`, in their order.
        groups: see `parameter_groups`.
        model: that they are of.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[parameter] for group in groups for parameter in group["params"]]
    return {
        "state": {order[number]: values for number, values in state["state"].items()},
        "param_groups": [{**g, "params": [order[number] for number in g["params"]]} for g in state["param_groups"]],
    }


def by_number(state: dict[str, Any], groups: list[dict[str, Any]], model: nn.Module) -> dict[str, Any]:
    """Turn a state by name into that of an optimizer with the parameters of `groups`, in their order."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    options = {name: group for group in state["param_groups"] for name in group["params"]}
    order = [names[parameter] for group in groups for parameter in group["params"]]
    numbers = {name: number for number, name in enumerate(order)}
    renumbered = []
    for group in groups:
        members = [names[parameter] for parameter in group["params"]]
        known: dict[str, Any] = next((options[name] for name in members if name in options), {})
        options_here = {key: value for key, value in known.items() if key not in EXECUTION}
        here = {key: group[key] for key in EXECUTION if key in group}
        renumbered.append({**options_here, **here, "params": [numbers[name] for name in members]})
    return {"state": {numbers[n]: v for n, v in state["state"].items() if n in numbers}, "param_groups": renumbered}


def reason_of(error: BaseException) -> str:
    """Return why something cannot be read, in a line, without torch's advice to let it run code."""
    if foreign := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
        return f"it holds {foreign[1]}, which no checkpoint of a run has; reading that could run any code"
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
