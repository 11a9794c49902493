"""TaskRouter: all tokens of a task go to the same experts (Ye et al. 2022, https://arxiv.org/abs/2205.12701)."""
# Shape suffixes: T tokens, D model width, E experts, Q tasks, R width of a task's embedding.

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routerzoo import LayerSpec, LogitRouter, RoutingContext, register_router
from routerzoo.functional.gate import at_least_float32
from routerzoo.router import UnmetRequirementError


@register_router
@final
class TaskRouter(LogitRouter):
    """A task's embedding, through a small network, chooses the experts of all its tokens; hidden states do not count.

    `logits = W_2 relu(W_1 e_task)`, softmax over the k largest. Tokens of a known task can then be served by a part of
    the model. Inspired by "eliciting transferability", whose experts are whole layers, whose embeddings come from the
    tasks' texts or Fisher information, and which trains in two stages with a falling temperature; here embeddings are
    learned. In the language task a corpus is a task: give `TextData` several.

    Args:
        spec: sizes of the layer the router sits in, with `num_tasks`.
        top_k: experts per token.
        task_dim: width R of a task's embedding.
        init_std: standard deviation of the initial weights of the last map.

    Raises:
        UnmetRequirementError: the model does not distinguish tasks.
        ValueError: a width below 1.
    """

    paper = "Ye et al. 2022, arXiv:2205.12701"
    inspired_by = True
    requires = frozenset({"task_ids"})
    gate = "up"

    def __init__(self, spec: LayerSpec, *, top_k: int = 2, task_dim: int = 64, init_std: float = 0.02) -> None:
        if task_dim < 1:
            raise ValueError(f"task_dim must be at least 1, got {task_dim}")
        super().__init__(spec, top_k=top_k)
        if spec.num_tasks is None:
            raise UnmetRequirementError(type(self).__name__, frozenset({"num_tasks"}))
        self.task_embedding = nn.Parameter(torch.randn(spec.num_tasks, task_dim))
        self.hidden = nn.Parameter(torch.randn(task_dim, task_dim) * (2 / task_dim) ** 0.5)
        self.up = nn.Parameter(torch.randn(spec.num_experts, task_dim) * init_std)

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """Return each token's task's `W_2 relu(W_1 e)`."""
        assert context.task_ids is not None  # `forward` checked what `requires` names.
        logits_QE = F.linear(F.relu(F.linear(self.task_embedding, self.hidden)), self.up)
        # A hidden state that is NaN must not be routed as if nothing were wrong.
        nothing_T1 = 0.0 * at_least_float32(x_TD).sum(-1, keepdim=True)
        return logits_QE.index_select(0, context.task_ids) + nothing_T1
