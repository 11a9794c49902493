"""Who was chosen for what."""
# Shape suffixes: T tokens, E experts, L labels (token ids or classes), B sequences or images, S tokens of one.

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from routerzoo.data.images import ImageBatch
from routerzoo.data.tokens import TextBatch
from routerzoo.errors import UserError
from routerzoo.moe.layer import moe_layers
from routerzoo.routing import Routing
from routerzoo.tasks.base import MoETask


class Observation(NamedTuple):
    """A batch, and the weight of each expert for each of its tokens.

    Args:
        batch: the batch, on the CPU.
        weights: by MoE layer, `[B, S, E]`.
        labels_BS: token ids of text, classes of images (the same for all tokens of one).
    """

    batch: TextBatch | ImageBatch
    weights: dict[int, Tensor]
    labels_BS: Tensor

    def experts(self, layer: int) -> Tensor:
        """Return the expert with the largest weight for each token, `[B, S]`; -1 where there is none."""
        largest = self.weights[layer].max(-1)
        return largest.indices.masked_fill(largest.values <= 0, -1)


@torch.no_grad()
def observe(task: MoETask, batch: Any) -> Observation:
    """Run a batch through a task's model in evaluation, and see who is chosen.

    Raises:
        UserError: a model without MoE layers, or a batch of another kind than text or images.
    """
    layers = list(moe_layers(task.net))
    if not layers:
        raise UserError("there is no routing to look at: the model has no MoE layer")
    training = task.training
    task.eval()
    try:
        with task.override_top_k():
            if isinstance(batch, TextBatch):
                options = {} if task.net.num_tasks is None else {"task_ids_B": batch.task_ids_B}
                _, context = task.net(batch.ids_BS, **options)
                num_sequences = len(batch.ids_BS)
            elif isinstance(batch, ImageBatch):
                _, context = task.net(batch.images_BCHW)
                num_sequences = len(batch.images_BCHW)
            else:
                raise UserError(f"routing is looked at in text and images, not in a {type(batch).__name__}")
    finally:
        task.train(training)
    weights = {}
    for layer in layers:
        routing = context.routings[layer.spec.layer]
        weights_TE = expert_weights(routing, layer.spec.num_experts, len(context.positions))
        weights[layer.spec.layer] = weights_TE.view(num_sequences, -1, layer.spec.num_experts).float().cpu()
    length = next(iter(weights.values())).shape[1]
    labels = batch.ids_BS if isinstance(batch, TextBatch) else batch.labels_B.unsqueeze(1).expand(-1, length)
    kept = type(batch)(*(value.cpu() if isinstance(value, Tensor) else value for value in batch))
    return Observation(kept, weights, labels.cpu())


def expert_weights(routing: Routing, num_experts: int, num_tokens: int) -> Tensor:
    """Return the weight of each expert in each token's output, `[T, E]`, whatever form the routing has."""
    if routing.merge_GE is not None:
        return routing.merged_weights()
    if routing.combine_GSEP is not None:
        return routing.combine_GSEP.sum(-1).flatten(0, 1)
    pairs = routing.assignments()
    bins = pairs.token_N * (num_experts + 1) + pairs.expert_N.remainder(num_experts + 1)
    weights = pairs.weight_N.new_zeros(num_tokens * (num_experts + 1)).index_add(0, bins, pairs.weight_N)
    return weights.view(num_tokens, num_experts + 1)[:, :num_experts]


def claims(observations: Iterable[Observation], num_labels: int) -> dict[int, Tensor]:
    """Count how many tokens of each label go to each expert first, by MoE layer: `[E, L]`."""
    counts: dict[int, Tensor] = {}
    for observation in observations:
        for layer, weights_BSE in observation.weights.items():
            experts_BS = observation.experts(layer)
            chosen_BS = experts_BS >= 0
            num_experts = weights_BSE.shape[-1]
            bins = experts_BS[chosen_BS] * num_labels + observation.labels_BS[chosen_BS]
            counted = torch.bincount(bins, minlength=num_experts * num_labels).view(num_experts, num_labels)
            counts[layer] = counts[layer] + counted if layer in counts else counted
    return counts
