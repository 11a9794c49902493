"""Group-limited selection: a token's experts come from few groups, such as machines (DeepSeek-V2 and V3)."""
# Shape suffixes: T tokens, E experts, G groups of experts, M experts of a group.

from __future__ import annotations

import torch
from torch import Tensor


def mask_groups(scores_TE: Tensor, num_groups: int, top_groups: int) -> Tensor:
    """Return the scores, minus infinity for the experts of all but the best groups.

    A group is as good as the sum of its two best scores.

    Args:
        scores_TE: what experts are selected by.
        num_groups: groups that the experts are divided into, in their order.
        top_groups: groups that a token keeps.
    """
    if top_groups == num_groups:
        return scores_TE
    scores_TGM = scores_TE.view(-1, num_groups, scores_TE.shape[1] // num_groups)
    groups_TG = scores_TGM.topk(min(2, scores_TGM.shape[2]), dim=-1).values.sum(-1)
    best_TG = torch.zeros_like(groups_TG, dtype=torch.bool)
    best_TG = best_TG.scatter(1, groups_TG.topk(top_groups, dim=-1).indices, True)
    return scores_TGM.masked_fill(~best_TG.unsqueeze(2), -torch.inf).flatten(1)


def checked_groups(num_experts: int, num_groups: int, top_groups: int | None) -> int:
    """Return how many groups a token keeps; by default all.

    Raises:
        ValueError: groups that do not divide the experts, or more groups to keep than there are.
    """
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups must divide num_experts = {num_experts}, got {num_groups}")
    top_groups = num_groups if top_groups is None else top_groups
    if not 1 <= top_groups <= num_groups:
        raise ValueError(f"top_groups must be between 1 and num_groups = {num_groups}, got {top_groups}")
    return top_groups
