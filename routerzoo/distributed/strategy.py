"""`ShardedStrategy`: FSDP2 and expert parallelism in Lightning's trainer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, final

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from routerzoo.checkpoints import sharded
from routerzoo.checkpoints.single import read_checkpoint
from routerzoo.errors import UserError
from routerzoo.optim import parameter_groups
from routerzoo.router import LoadedTopKWarning


@final
class ShardedStrategy(ModelParallelStrategy):
    """Shards the weights and the optimizer's state over processes, each of which trains on its own data.

    The rest is Lightning's `ModelParallelStrategy`, without tensor parallelism. Checkpoints are folders, written
    atomically, that any number of processes can read; checkpoints of one process can be read too.

    Args:
        expert_parallel: so many processes share the experts of each MoE layer, and exchange tokens.
        process_group_backend: torch's, by default `nccl` on GPUs and `gloo` on CPUs.
        timeout_minutes: how long processes wait for each other.
    """

    def __init__(
        self, expert_parallel: int = 1, process_group_backend: str | None = None, timeout_minutes: float = 30.0
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            process_group_backend=process_group_backend,
            timeout=timedelta(minutes=timeout_minutes),
        )
        self.expert_parallel = expert_parallel

    def setup_environment(self) -> None:
        """Give every process data of its own."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return this process's part of the model."""
        assert self.lightning_module is not None
        return dict(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return this process's part of the optimizer's state, by name of parameter."""
        assert self.lightning_module is not None
        return sharded.named_state(getattr(optimizer, "_optimizer", optimizer), self.lightning_module)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a folder, on all processes together."""
        if len(checkpoint.get("optimizer_states", [])) > 1:
            raise UserError("a checkpoint of a sharded model takes one optimizer, not several")
        path = Path(self.broadcast(filepath))
        tensors = {f"{sharded.STATE}.{name}": value for name, value in checkpoint[sharded.STATE].items()}
        meta = {**checkpoint, sharded.STATE: {}}
        if checkpoint.get("optimizer_states"):
            optimizer = checkpoint["optimizer_states"][0]
            for name, values in optimizer["state"].items():
                tensors.update({f"{sharded.OPTIMIZER}.{name}.{key}": _tensor(v) for key, v in values.items()})
            meta["optimizer_states"] = [{"state": {}, "param_groups": optimizer["param_groups"]}]
        sharded.save(path, meta, tensors)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a folder, or a file of one process, into the model and the optimizer."""
        path = Path(self.broadcast(checkpoint_path))
        model, module = self.model, self.lightning_module
        assert model is not None
        assert module is not None
        if not sharded.is_folder(path):
            checkpoint = read_checkpoint(path)
            _load_model(model, _shard(checkpoint[sharded.STATE], model.state_dict()))
            checkpoint[sharded.STATE] = {}
            if self.optimizers and checkpoint.get("optimizer_states"):
                saved = sharded.named(checkpoint["optimizer_states"][0], parameter_groups(module), module)
                self._load_optimizer(saved)
            return checkpoint
        meta = sharded.read_meta(path)
        sharded.verify(path, meta.pop(sharded.CHECKSUMS), self.global_rank, self.world_size)
        found = {name: torch.empty_like(value) for name, value in model.state_dict().items()}
        sharded.load(path, {f"{sharded.STATE}.{name}": value for name, value in found.items()})
        _load_model(model, found)
        if self.optimizers and meta.get("optimizer_states"):
            saved = {
                "state": self._optimizer_tensors(path),
                "param_groups": meta["optimizer_states"][0]["param_groups"],
            }
            self._load_optimizer(saved)
        return meta

    def _optimizer_tensors(self, path: Path) -> dict[str, dict[str, Tensor]]:
        """Read the optimizer's state, sharded as the parameters are."""
        assert self.lightning_module is not None
        parameters = dict(self.lightning_module.named_parameters())
        wanted: dict[str, Tensor] = {}
        for entry, (size, dtype) in sharded.sizes(path).items():
            kind, _, rest = entry.partition(".")
            parameter = parameters.get(rest.rpartition(".")[0])
            if kind != sharded.OPTIMIZER or parameter is None:
                continue
            like = parameter.detach() if size == parameter.shape else torch.empty(size)
            wanted[entry] = torch.zeros_like(like, dtype=dtype)
        sharded.load(path, wanted)
        state: dict[str, dict[str, Tensor]] = {}
        for entry, value in wanted.items():
            name, _, key = entry.partition(".")[2].rpartition(".")
            state.setdefault(name, {})[key] = value
        return state

    def _load_optimizer(self, saved: Mapping[str, Any]) -> None:
        optimizer, module = self.optimizers[0], self.lightning_module
        assert module is not None
        parameters = dict(module.named_parameters())
        shards = {}
        for name, values in saved["state"].items():
            like = parameters[name]
            shards[name] = _shard(values, {key: like for key, value in values.items() if value.shape == like.shape})
        optimizer.load_state_dict(sharded.by_number({**saved, "state": shards}, optimizer.param_groups, module))


# Its name, for `--trainer.strategy sharded`.
StrategyRegistry.register("sharded", ShardedStrategy, description="FSDP2, optionally with expert parallelism")


def _load_model(model: nn.Module, state: Mapping[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoadedTopKWarning)  # a schedule had set k
        model.load_state_dict(state)


def _shard(whole: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Take this process's part of whole tensors whose counterparts are sharded."""
    shards = {}
    for name, value in whole.items():
        model = like.get(name)
        if isinstance(model, DTensor) and not isinstance(value, DTensor):
            value = distribute_tensor(value.to(model.device), model.device_mesh, model.placements, src_data_rank=None)
        shards[name] = value
    return shards


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value)
