"""TaskRouter: all tokens of a task go to the same experts (Ye et al. 2022, https://arxiv.org/abs/2205.12701)."""
# Shape suffixes: T tokens, D model width, E experts, K choices per token, Q tasks, R width of a task's embedding,
# H hidden units.

from __future__ import annotations

from typing import Literal, final, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routerzoo import LayerSpec, LogitRouter, RoutingContext, register_router
from routerzoo.functional import gather_weights
from routerzoo.functional.gate import at_least_float32
from routerzoo.router import UnmetRequirementError

Selection = Literal["softmax", "gumbel", "straight-through"]


@register_router
@final
class TaskRouter(LogitRouter):
    """A task's embedding, through a small network, chooses the experts of all its tokens; hidden states do not count.

    `logits = (W_2 gelu(W_1 e_task + b_1) + b_2) / temperature`, a network for each layer, softmax over the k largest.
    Tokens of a known task can then be served by a part of the model. In the language task a corpus is a task: give
    `TextData` several.

    Network and selections are those of the authors' release (INK-USC/CrossTaskMoE, `linear_layer_specific` and
    `Selection`), at temperature 5 and with all weights N(0, 0.02), as BART initializes them. Its softmax is over all
    experts: `top_k = num_experts`. With `gumbel`, training adds Gumbel noise to the logits, one draw a task, where the
    release draws for each sequence, and in evaluation too. With `straight-through` the best expert of those has weight
    1 and the others 0, with the gradient of the softmax over all experts; at k = num_experts it is the release's, at
    k = 1 an expert that was not selected has no part in the gradient.

    Elsewhere it differs: the release's experts are whole layers, its tasks' vectors come from their texts or from
    Fisher information, where here they are learned, and it trains in two stages.

    Args:
        spec: sizes of the layer the router sits in, with `num_tasks`.
        top_k: experts per token.
        selection: how logits become weights.
        temperature: of the softmax.
        task_dim: width R of a task's embedding.
        hidden_dim: width H of the network.
        init_std: standard deviation of the network's initial weights.

    Raises:
        UnmetRequirementError: the model does not distinguish tasks.
        ValueError: a width below 1, a temperature that is not positive, or a selection of another name.
    """

    paper = "Ye et al. 2022, arXiv:2205.12701"
    requires = frozenset({"task_ids"})
    gate_name = "up"

    def __init__(
        self,
        spec: LayerSpec,
        *,
        top_k: int = 2,
        selection: Selection = "softmax",
        temperature: float = 5.0,
        task_dim: int = 64,
        hidden_dim: int = 64,
        init_std: float = 0.02,
    ) -> None:
        if selection not in get_args(Selection):
            raise ValueError(f"selection must be one of {', '.join(get_args(Selection))}, got {selection!r}")
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        for name, width in (("task_dim", task_dim), ("hidden_dim", hidden_dim)):
            if width < 1:
                raise ValueError(f"{name} must be at least 1, got {width}")
        super().__init__(spec, top_k=top_k)
        if spec.num_tasks is None:
            raise UnmetRequirementError(type(self).__name__, frozenset({"num_tasks"}))
        self.selection, self.temperature = selection, temperature
        self.trains_at_top_1 = selection == "straight-through"
        self.task_embedding = nn.Parameter(torch.randn(spec.num_tasks, task_dim))
        self.hidden = nn.Parameter(torch.randn(hidden_dim, task_dim) * init_std)
        self.hidden_bias = nn.Parameter(torch.zeros(hidden_dim))
        self.up = nn.Parameter(torch.randn(spec.num_experts, hidden_dim) * init_std)
        self.up_bias = nn.Parameter(torch.zeros(spec.num_experts))

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return what the network says of each token's task."""
        assert context.task_ids is not None  # `forward` checked what `requires` names.
        hidden_QH = F.gelu(F.linear(self.task_embedding, self.hidden, self.hidden_bias))
        logits_QE = F.linear(hidden_QH, self.up, self.up_bias)
        if self.training and self.selection != "softmax":
            logits_QE = logits_QE - torch.empty_like(logits_QE).exponential_().log()
        # A hidden state that is NaN must not be routed as if nothing were wrong.
        nothing_T1 = 0.0 * at_least_float32(x_TD).sum(-1, keepdim=True)
        return (logits_QE / self.temperature).index_select(0, context.task_ids) + nothing_T1

    def combine_weights(self, logits_TE: Tensor, experts_TK: Tensor, *, may_drop: bool = True) -> Tensor:
        """Return the softmax over the experts' logits, or 1 for the best one."""
        if self.selection != "straight-through":
            return super().combine_weights(logits_TE, experts_TK, may_drop=may_drop)
        soft_TE = logits_TE.softmax(-1)
        best_TE = torch.zeros_like(soft_TE).scatter(1, logits_TE.argmax(-1, keepdim=True), 1.0)
        return gather_weights(best_TE + soft_TE - soft_TE.detach(), experts_TK, may_drop=may_drop)
