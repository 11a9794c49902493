"""What is read off a routing of any form: first choices, experts per token, and how they go with the domain."""
# Shape suffixes: T tokens, N assignments, E experts, C domains, G groups, S tokens of a group, P slots.

from __future__ import annotations

import torch
from torch import Tensor

from routerzoo.routing import Routing


def first_choices(routing: Routing, num_tokens: int) -> Tensor:
    """Return the expert with each token's largest weight, int64 `[T]`; -1 for a token without one.

    Of equal weights the first one named counts. In a soft routing it is the expert whose slots the token's output has
    most of.
    """
    if routing.experts_TK is not None and routing.weights_TK is not None:
        weights_TK = routing.weights_TK.abs().masked_fill(routing.experts_TK < 0, -1.0)
        return routing.experts_TK.gather(1, weights_TK.argmax(1, keepdim=True)).squeeze(1)
    if routing.combine_GSEP is not None:
        return routing.combine_GSEP.sum(-1).flatten(0, 1).argmax(-1)
    if routing.merge_GE is not None:
        weights_TE = routing.merged_weights()
        return torch.where(weights_TE.sum(1) > 0, weights_TE.argmax(1), -1)
    pairs = routing.assignments()
    # Sorted by weight, so that of a token's assignments the heaviest is written last.
    order_N = pairs.weight_N.abs().argsort(stable=True)
    order_N = order_N[pairs.expert_N[order_N] >= 0]
    best_T = torch.full((num_tokens,), -1)
    best_T[pairs.token_N[order_N]] = pairs.expert_N[order_N]
    return best_T


def chosen_experts(routing: Routing, num_tokens: int) -> Tensor:
    """Return how many experts each token goes to, float32 `[T]`.

    Raises:
        ValueError: a routing that mixes tokens, or experts.
    """
    pairs = routing.assignments()
    return torch.zeros(num_tokens).index_add_(0, pairs.token_N, (pairs.expert_N >= 0).float())


def normalized_mutual_information(domain_T: Tensor, expert_T: Tensor, num_experts: int) -> float:
    """Return the mutual information of domain and expert over the domain's entropy.

    Args:
        domain_T: int64; -1 for tokens that are left out.
        expert_T: likewise.
        num_experts: experts of the layer.

    Returns:
        0 to 1; NaN where there is one domain, or none.
    """
    known_T = (domain_T >= 0) & (expert_T >= 0)
    domain_N, expert_N = domain_T[known_T], expert_T[known_T]
    if len(domain_N) == 0:
        return float("nan")
    counts = torch.bincount(domain_N * num_experts + expert_N, minlength=(int(domain_N.max()) + 1) * num_experts)
    joint_CE = counts.view(-1, num_experts).double() / len(domain_N)
    domain_C, expert_E = joint_CE.sum(1), joint_CE.sum(0)
    independent_CE = domain_C.unsqueeze(1) * expert_E
    information = torch.special.xlogy(joint_CE, joint_CE / independent_CE.clamp_min(1e-300)).sum()
    entropy = -torch.special.xlogy(domain_C, domain_C).sum()
    return float(information / entropy) if entropy > 0 else float("nan")


def correlation(one_T: Tensor, other_T: Tensor) -> float:
    """Return Pearson's correlation; 0 where the first does not vary, NaN where the second does not."""
    one_T, other_T = (values.double() - values.double().mean() for values in (one_T, other_T))
    if other_T.norm() == 0:
        return float("nan")
    return float(one_T @ other_T / (one_T.norm() * other_T.norm())) if one_T.norm() > 0 else 0.0
