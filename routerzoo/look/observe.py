"""The experts of each token of a batch."""
# Shape suffixes: T tokens, E experts, L labels (token ids or classes), B sequences or images, S tokens of one; C calls
# of a layer.

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from routerzoo.data.images import ImageBatch
from routerzoo.data.tokens import TextBatch
from routerzoo.errors import UserError
from routerzoo.moe.layer import MoE, moe_layers
from routerzoo.routing import LayerRouting, Routing, RoutingContext
from routerzoo.tasks.base import MoETask


class Observation(NamedTuple):
    """A batch, and the weight of each expert for each of its tokens.

    Args:
        batch: the batch, on the CPU.
        weights: by index of the MoE layer, `[C * B, S, E]`: the batch as routed by the layer's first call, by its
            second, and so on. Most models call a layer once.
        labels_BS: token ids of text, classes of images (the same for all tokens of one).
    """

    batch: TextBatch | ImageBatch
    weights: dict[int, Tensor]
    labels_BS: Tensor

    def experts(self, layer: int) -> Tensor:
        """Return the expert with the largest weight for each token, `[C * B, S]`; -1 where there is none."""
        largest = self.weights[layer].max(-1)
        return largest.indices.masked_fill(largest.values <= 0, -1)


@torch.no_grad()
def observe(task: MoETask, batch: Any) -> Observation:
    """Evaluate a batch with a task's model, and return how its tokens are routed.

    Raises:
        UserError: a model without MoE layers, or a batch of neither text nor images.
    """
    layers = list(moe_layers(task.net))
    if not layers:
        raise UserError("there is no routing to show: the model has no MoE layer")
    if not isinstance(batch, (TextBatch, ImageBatch)):
        raise UserError(f"routing is shown for text and images, not for a {type(batch).__name__}")
    num_sequences = len(batch.ids_BS if isinstance(batch, TextBatch) else batch.images_BCHW)
    calls: dict[MoE, list[Tensor]] = {layer: [] for layer in layers}

    def record(published: LayerRouting, context: RoutingContext) -> None:
        layer = published.layer
        assert isinstance(layer, MoE)
        assert context.positions is not None  # the tasks' models provide them
        weights_TE = expert_weights(published.routing, layer.num_experts, len(context.positions))
        calls[layer].append(weights_TE.view(num_sequences, -1, layer.num_experts).float().cpu())

    training = task.training
    task.eval()
    try:
        with task.override_top_k(), ExitStack() as stack:
            for layer in layers:
                stack.callback(layer.register_routing_hook(record).remove)
            # Tasks look metrics up by name; what is counted here is thrown away.
            metrics = {name: metric.clone() for name, metric in task.evaluated[0].items()}  # type: ignore[operator]
            for metric in metrics.values():
                metric.reset()  # in the mode, inference or not, that it is updated in
            task.evaluate(batch, metrics)
    finally:
        task.train(training)
    weights = {index: torch.cat(calls[layer]) for index, layer in enumerate(layers)}
    length = weights[0].shape[1]
    labels = batch.ids_BS if isinstance(batch, TextBatch) else batch.labels_B.unsqueeze(1).expand(-1, length)
    return Observation(apply_to_collection(batch, Tensor, Tensor.cpu), weights, labels.cpu())


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
    """Count how many tokens of each label have each expert as their first choice, by MoE layer: `[E, L]`."""
    counts: dict[int, Tensor] = {}
    for observation in observations:
        for layer, weights in observation.weights.items():
            experts = observation.experts(layer)
            labels = observation.labels_BS.repeat(len(experts) // len(observation.labels_BS), 1)
            chosen, num_experts = experts >= 0, weights.shape[-1]
            bins = experts[chosen] * num_labels + labels[chosen]
            counted = torch.bincount(bins, minlength=num_experts * num_labels).view(num_experts, num_labels)
            counts[layer] = counts[layer] + counted if layer in counts else counted
    return counts
