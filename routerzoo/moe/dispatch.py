"""How tokens reach experts and come back."""
# Shape suffixes: T tokens, K choices per token, E experts, D model width, N assignments (rows sorted by expert),
# G groups of tokens, S tokens of a group, P slots of an expert.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from routerzoo.distributed.expert_parallel import compute
from routerzoo.errors import UserError
from routerzoo.functional.transforms import in_transform
from routerzoo.moe.experts import TwoLayerExperts
from routerzoo.moe.low_memory import Assigned, means_for
from routerzoo.moe.permute import permutation_of, permute, unpermute
from routerzoo.moe.rows import sort_assignments
from routerzoo.routing import Assignments, Routing

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def apply_experts(
    x_TD: Tensor,
    routing: Routing,
    experts: nn.Module,
    num_experts: int,
    mesh: DeviceMesh | None = None,
    low_memory: bool | None = None,
    weights_on_input: bool = False,
) -> Tensor:
    """Send each token to its experts and add up what they return, weighted.

    Dropless: every assignment that the routing names is computed, and none that it does not.

    Args:
        x_TD: hidden states.
        routing: a router's decision, in any form.
        experts: the bank that computes; anything that is called as `routerzoo.Experts` is.
        num_experts: number of experts.
        mesh: the ranks that share the experts; None where this one has all.
        low_memory: keep hidden states and pre-activations alone for the backward pass; by default on a GPU.
        weights_on_input: weight what an expert gets, not what it returns.

    Returns:
        `[tokens, d_model]`; zeros for a token without expert.

    Raises:
        ValueError: weights on inputs of a router that does not name experts.
    """
    if weights_on_input:
        if routing.merge_GE is not None or routing.dense:
            raise ValueError("weights_on_input takes a router that names experts, not one that mixes tokens or experts")
        return _sparse(x_TD, routing.assignments(), experts, num_experts, mesh, weights_on_input=True)
    if routing.merge_GE is not None:
        return _merged(x_TD, routing, experts, mesh)
    if routing.dense:
        return _soft(x_TD, routing, experts, mesh)
    if isinstance(experts, TwoLayerExperts) and mesh is None and (torch.onnx.is_in_onnx_export() or in_transform()):
        return _every_expert(x_TD, routing.assignments(), experts)
    if mesh is None and isinstance(experts, TwoLayerExperts) and _is_one_operator(x_TD, experts, low_memory):
        means = means_for(x_TD, experts.network())
        if means is not None:
            y_TD: Tensor = experts(x_TD, Assigned(*sort_assignments(routing, len(x_TD), num_experts), means))
            return y_TD
    return _sparse(x_TD, routing.assignments(), experts, num_experts, mesh)


def _is_one_operator(x_TD: Tensor, experts: TwoLayerExperts, low_memory: bool | None) -> bool:
    if low_memory is None:
        low_memory = x_TD.device.type == "cuda"
    if not low_memory or experts.backend != "auto" or torch.compiler.is_exporting():  # an export takes torch's own
        return False
    return _are_plain(experts, x_TD)  # sharded weights know torch's own operations


def _are_plain(experts: nn.Module, x_TD: Tensor) -> bool:
    # What an export works on is plain whatever its type. Offloaded weights are on the meta device between two calls.
    if torch.compiler.is_exporting():
        return True
    return all(type(w) in (Tensor, nn.Parameter) and w.is_meta == x_TD.is_meta for w in experts.parameters())


def dense_forward(experts: nn.Module, x_TD: Tensor, num_experts: int) -> Tensor:
    """Return the sum of all experts' outputs for every token, `[T, D]`: a dense feed-forward network."""
    # Sharded and offloaded weights are gathered by the hooks of the module's call.
    if isinstance(experts, TwoLayerExperts) and experts.backend == "auto" and _are_plain(experts, x_TD):
        y_TD: Tensor = experts.as_one(x_TD)
        return y_TD
    num_tokens = x_TD.shape[0]
    ends_E = torch.arange(1, num_experts + 1, device=x_TD.device, dtype=torch.int32) * num_tokens
    y_ND: Tensor = experts(x_TD.repeat(num_experts, 1) if num_experts > 1 else x_TD, ends_E)
    return y_ND.view(num_experts, num_tokens, -1).sum(0) if num_experts > 1 else y_ND


def _sparse(
    x_TD: Tensor,
    assignments: Assignments,
    experts: nn.Module,
    num_experts: int,
    mesh: DeviceMesh | None,
    *,
    weights_on_input: bool = False,
) -> Tensor:
    token_N, expert_N, weight_N, top_k, may_drop = assignments
    if top_k is None:
        token_N, by_token_N = token_N.sort(stable=True)
        expert_N, weight_N = expert_N.index_select(0, by_token_N), weight_N.index_select(0, by_token_N)
    filter_rows = may_drop and x_TD.device.type == "cpu" and not torch.compiler.is_compiling()
    if filter_rows:
        keep = (expert_N >= 0).nonzero().squeeze(1)  # on a GPU this would wait for the device
        if keep.shape[0] < expert_N.shape[0]:
            token_N, expert_N, weight_N, top_k = token_N[keep], expert_N[keep], weight_N[keep], None
        may_drop = False
    # Padding sorts behind the last expert, where no backend looks.
    key_N = expert_N.remainder(num_experts + 1) if may_drop else expert_N
    sorted_N, order_N = key_N.sort(stable=True)
    bounds_E = torch.arange(num_experts, device=sorted_N.device, dtype=sorted_N.dtype)
    ends_E = torch.searchsorted(sorted_N, bounds_E, right=True, out_int32=True)
    permutation = permutation_of(token_N, order_N, x_TD.shape[0], top_k)
    x_ND = permute(x_TD, permutation)
    if weights_on_input:
        x_ND, weight_N = x_ND * weight_N.index_select(0, order_N).unsqueeze(1), torch.ones_like(weight_N)
    real_N1 = (sorted_N < num_experts).unsqueeze(1) if may_drop else None
    if real_N1 is not None:
        x_ND = torch.where(real_N1, x_ND, 0)  # stops what the unspecified rows send back
    y_ND = compute(experts, x_ND, ends_E, mesh)
    if real_N1 is not None:
        y_ND = torch.where(real_N1, y_ND, 0)
    return unpermute(y_ND, weight_N, permutation)


def _every_expert(x_TD: Tensor, assignments: Assignments, experts: TwoLayerExperts) -> Tensor:
    """Compute every expert on every token, 0 times where it is not chosen.

    ONNX has no grouped product, and `torch.func.vmap` can read no number of rows.
    """
    token_N, expert_N, weight_N, _, _ = assignments
    num_experts = experts.network().down.shape[0]
    weights = weight_N.new_zeros(x_TD.shape[0] * num_experts)
    places_N = token_N * num_experts + expert_N.clamp_min(0)
    weights_TE = weights.scatter_add(0, places_N, weight_N.masked_fill(expert_N < 0, 0.0)).view(-1, num_experts)
    y_ETD = torch.stack([experts.one(expert, x_TD) for expert in range(num_experts)])
    return (y_ETD * weights_TE.T.unsqueeze(2)).sum(0)


def _soft(x_TD: Tensor, routing: Routing, experts: nn.Module, mesh: DeviceMesh | None) -> Tensor:
    dispatch_GSEP, combine_GSEP = routing.dispatch_GSEP, routing.combine_GSEP
    assert dispatch_GSEP is not None
    assert combine_GSEP is not None  # `Routing` has one whole form
    groups, tokens, num_experts, slots = dispatch_GSEP.shape
    x_GSD = x_TD.view(groups, tokens, x_TD.shape[1])
    x_EGPD = torch.einsum("gsep,gsd->egpd", dispatch_GSEP, x_GSD)
    rows = groups * slots
    ends_E = torch.arange(1, num_experts + 1, device=x_TD.device, dtype=torch.int32) * rows
    y_ND = compute(experts, x_EGPD.reshape(num_experts * rows, x_TD.shape[1]), ends_E, mesh)
    y_EGPD = y_ND.view(num_experts, groups, slots, y_ND.shape[1])
    return torch.einsum("gsep,egpd->gsd", combine_GSEP.to(y_EGPD.dtype), y_EGPD).flatten(0, 1)


def _merged(x_TD: Tensor, routing: Routing, experts: nn.Module, mesh: DeviceMesh | None) -> Tensor:
    merge_GE, group_T = routing.merge_GE, routing.group_T
    assert merge_GE is not None
    assert group_T is not None  # `Routing` has one whole form
    if mesh is not None:
        raise UserError("a router that merges experts needs all of them on every rank: leave expert_parallel out")
    num_groups, num_experts = merge_GE.shape
    if num_groups == 0:
        return x_TD * 0.0
    merged = {}
    for name, stacked in experts.named_parameters():
        if stacked.shape[0] != num_experts:
            raise ValueError(
                f"experts are merged along the first dimension of their parameters; that of {name} is "
                f"{stacked.shape[0]}, not {num_experts}"
            )
        mixed = merge_GE.to(stacked.dtype) @ stacked.flatten(1)
        merged[name] = mixed.view(num_groups, *stacked.shape[1:])
    # Tokens without a group sort behind the last one, where no backend looks.
    sorted_T, order_T = group_T.remainder(num_groups + 1).sort(stable=True)
    bounds_G = torch.arange(num_groups, device=sorted_T.device)
    ends_G = torch.searchsorted(sorted_T, bounds_G, right=True, out_int32=True)
    real_T1 = (sorted_T < num_groups).unsqueeze(1)
    rows_TD = torch.where(real_T1, x_TD.index_select(0, order_T), 0)
    y_TD: Tensor = torch.func.functional_call(experts, merged, (rows_TD, ends_G))
    y_TD = torch.where(real_T1, y_TD, 0)
    return y_TD.new_zeros(y_TD.shape).index_copy(0, order_T, y_TD)
