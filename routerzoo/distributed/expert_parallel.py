"""Expert parallelism: experts are sharded over ranks, and tokens are sent to them by all-to-all."""
# Shape suffixes: N rows sorted by expert, M rows that came from all ranks, E experts, L experts of a rank, R ranks,
# D model width.

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from routerzoo.distributed.collectives import counts_from_ranks, exchange_rows
from routerzoo.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from routerzoo.moe.layer import MoE


def shard_experts(layer: MoE, mesh: DeviceMesh) -> None:
    """Shard a layer's experts over ranks, which exchange tokens from then on.

    Every rank must call the layer at the same time, with as many tokens as it likes, also none. Gradients of experts
    are those of the mean of the ranks' losses, as everywhere in data parallelism. The weights become DTensors, sharded
    over the experts; what a checkpoint calls them stays.

    Args:
        layer: with the same weights on each rank (those of the first rank are taken).
        mesh: of one dimension, the ranks that share the experts.

    Raises:
        UserError: a number of experts that the ranks do not divide, or experts whose parameters are not stacked.
    """
    from torch.distributed.tensor import Shard, distribute_tensor  # takes a second to import

    experts, ranks = layer.experts, mesh.size()
    num_experts = layer.spec.num_experts
    if num_experts % ranks:
        raise UserError(f"expert_parallel = {ranks} must divide num_experts = {num_experts}")
    for name, parameter in list(experts.named_parameters()):
        if parameter.shape[0] != num_experts:
            raise UserError(
                f"experts are sharded along the first dimension of their parameters; that of {name} is "
                f"{parameter.shape[0]}, not {num_experts}: {type(experts).__name__} cannot be expert-parallel"
            )
        owner = experts.get_submodule(name.rpartition(".")[0])
        sharded = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)]), parameter.requires_grad)
        owner.register_parameter(name.rpartition(".")[2], sharded)
    layer.mesh = mesh


def compute(experts: nn.Module, x_ND: Tensor, ends_E: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """Compute each row with its expert, wherever that is; see `routerzoo.Experts.forward`."""
    if mesh is None:
        y_ND: Tensor = experts(x_ND, ends_E)
        return y_ND
    return _on_all_ranks(experts, x_ND, ends_E, mesh)


def _on_all_ranks(experts: nn.Module, x_ND: Tensor, ends_E: Tensor, mesh: DeviceMesh) -> Tensor:
    group, ranks = mesh.get_group(), mesh.size()
    counts_RL = torch.diff(ends_E.long(), prepend=ends_E.new_zeros(1).long()).view(ranks, -1)
    received_RL = counts_from_ranks(counts_RL, group)
    # The only number that is read back: how much room to make for what comes.
    sent, received = torch.stack([counts_RL.sum(1), received_RL.sum(1)]).tolist()
    rows_MD = exchange_rows(x_ND[: sum(sent)], sent, received, group)
    # They come by rank and, of each rank, by expert; experts take theirs in one piece.
    expert_L = torch.arange(received_RL.shape[1], device=x_ND.device)
    expert_M = torch.repeat_interleave(expert_L.repeat(ranks), received_RL.flatten(), output_size=sum(received))
    order_M = expert_M.argsort(stable=True)
    ends_L = received_RL.sum(0).cumsum(0).to(ends_E.dtype)
    own = {name: _local(parameter, ranks) for name, parameter in experts.named_parameters()}
    computed_MD: Tensor = torch.func.functional_call(experts, own, (rows_MD.index_select(0, order_M), ends_L))
    back_MD = computed_MD.new_zeros(computed_MD.shape).index_copy(0, order_M, computed_MD)
    y_ND = exchange_rows(back_MD, received, sent, group)
    # Rows that belong to no expert stayed here.
    return nn.functional.pad(y_ND, (0, 0, 0, len(x_ND) - len(y_ND)))


def _local(parameter: Any, ranks: int) -> Tensor:
    own: Tensor = _ShareGradient.apply(parameter.to_local(), ranks)
    return own


class _ShareGradient(torch.autograd.Function):
    """Divides an expert's gradient, to which the losses of all ranks add, by the number of ranks."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.ranks, None
