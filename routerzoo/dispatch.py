"""How tokens reach experts and come back."""
# Shape suffixes: T tokens, K choices per token, E experts, D model width, N assignments (rows sorted by expert),
# G groups of tokens, S tokens of a group, P slots of an expert.

from __future__ import annotations

import torch
from torch import Tensor

from routerzoo.experts import Experts
from routerzoo.routing import Assignments, Routing


def apply_experts(x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """Send each token to its experts and add up what they return, weighted.

    Dropless: every assignment that the routing names is computed, and none that it does not.

    Args:
        x_TD: hidden states.
        routing: a router's answer, in any form.
        experts: the bank that computes.

    Returns:
        `[tokens, d_model]`; zeros for a token without expert.
    """
    if routing.dense:
        return _through_slots(x_TD, routing, experts)
    return _through_assignments(x_TD, routing.assignments(), experts)


def _through_assignments(x_TD: Tensor, assignments: Assignments, experts: Experts) -> Tensor:
    token_N, expert_N, weight_N, top_k, may_pad = assignments
    num_experts = experts.spec.num_experts
    filter_rows = may_pad and x_TD.device.type == "cpu" and not torch.compiler.is_compiling()
    if filter_rows:
        keep = (expert_N >= 0).nonzero().squeeze(1)  # on a GPU this would wait for the device
        if len(keep) < len(expert_N):
            token_N, expert_N, weight_N, top_k = token_N[keep], expert_N[keep], weight_N[keep], None
        may_pad = False
    # Padding sorts behind the last expert, where no backend looks.
    key_N = expert_N.remainder(num_experts + 1) if may_pad else expert_N
    sorted_N, order_N = key_N.sort(stable=True)
    bounds_E = torch.arange(num_experts, device=sorted_N.device, dtype=sorted_N.dtype)
    ends_E = torch.searchsorted(sorted_N, bounds_E, right=True, out_int32=True)
    source_N = token_N.index_select(0, order_N)
    x_ND = x_TD.index_select(0, source_N)
    real_N1 = (sorted_N < num_experts).unsqueeze(1) if may_pad else None
    if real_N1 is not None:
        x_ND = torch.where(real_N1, x_ND, 0)  # stops what the unspecified rows send back
    y_ND: Tensor = experts(x_ND, ends_E)
    if real_N1 is not None:
        y_ND = torch.where(real_N1, y_ND, 0)
    y_ND = y_ND * weight_N.index_select(0, order_N).to(y_ND.dtype).unsqueeze(1)
    if top_k is not None and x_TD.device.type == "cuda":
        # Adding by index is not deterministic there; undoing the sort and summing is.
        return y_ND.index_select(0, order_N.argsort()).view(-1, top_k, y_ND.shape[1]).sum(1)
    return y_ND.new_zeros(len(x_TD), y_ND.shape[1]).index_add(0, source_N, y_ND)


def _through_slots(x_TD: Tensor, routing: Routing, experts: Experts) -> Tensor:
    dispatch_GSEP, combine_GSEP = routing.dispatch_GSEP, routing.combine_GSEP
    assert dispatch_GSEP is not None
    assert combine_GSEP is not None  # `Routing` has one whole form
    groups, tokens, num_experts, slots = dispatch_GSEP.shape
    x_GSD = x_TD.view(groups, tokens, -1)
    x_EGPD = torch.einsum("gsep,gsd->egpd", dispatch_GSEP, x_GSD)
    rows = groups * slots
    ends_E = torch.arange(1, num_experts + 1, device=x_TD.device, dtype=torch.int32) * rows
    y_ND: Tensor = experts(x_EGPD.reshape(num_experts * rows, -1), ends_E)
    y_EGPD = y_ND.view(num_experts, groups, slots, -1)
    return torch.einsum("gsep,egpd->gsd", combine_GSEP.to(y_EGPD.dtype), y_EGPD).reshape(len(x_TD), -1)
