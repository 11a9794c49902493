"""`Specialization`: how the tokens of each label are distributed over experts."""
# Shape suffixes: T tokens, E experts, V labels (token ids, classes, domains).

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from routerzoo.metrics.base import RoutingMetric
from routerzoo.metrics.sets import expert_sets
from routerzoo.routing import Routing


@final
class Specialization(RoutingMetric):
    """How the tokens of each label are distributed over experts (OLMoE, equations 7 and 8, arXiv:2409.02060).

    The label of a token is its id, the next id or the predicted one (vocabulary specialization); the class of its image
    or the domain of its text (domain specialization).

    - `share_VE` is the share of a label's tokens that an expert is selected for, `N_ve / N_v`; NaN below `min_count`
      tokens. A row sums to k.
    - `specialization` is the mean over labels of their largest share.
    - `chance` is the expected share where routing ignores labels, `k / E`. (With few tokens of a label, its largest
      share lies above that by chance alone; hence `min_count`.)

    Args:
        num_experts: experts of the layer.
        num_labels: size of the vocabulary, or number of classes.
        min_count: labels with fewer tokens are left out; OLMoE uses 10.
        options: further arguments of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = Specialization(num_experts=2, num_labels=3, min_count=1)
        >>> metric.update(Routing(torch.tensor([[0], [0], [1], [1]]), torch.ones(4, 1)), torch.tensor([0, 0, 1, 0]))
        >>> metric.compute()["specialization"]
        tensor(0.8333)
    """

    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    shown = ("specialization", "chance")
    unit = "share of a label's tokens"
    counts_VE: Tensor
    tokens_V: Tensor

    def __init__(self, num_experts: int, num_labels: int, *, min_count: int = 10, **options: Any) -> None:
        super().__init__(**options)
        self.num_experts, self.num_labels, self.min_count = num_experts, num_labels, min_count
        self.add_state("counts_VE", torch.zeros(num_labels, num_experts, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens_V", torch.zeros(num_labels, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, routing: Routing, labels_T: Tensor) -> None:
        """Count a routing's tokens by label. Tokens without an expert, and those of a label below 0, are left out.

        Raises:
            ValueError: another number of labels than of tokens, a label of `num_labels` or above, or a routing over
                another number of experts.
        """
        chosen_TE = expert_sets(routing, self.num_experts)
        if labels_T.shape != chosen_TE.shape[:1]:
            raise ValueError(f"there are {len(chosen_TE)} tokens and labels {list(labels_T.shape)}")
        if labels_T.numel() and int(labels_T.max()) >= self.num_labels:
            raise ValueError(f"labels must be below num_labels = {self.num_labels}, got {int(labels_T.max())}")
        kept_T = chosen_TE.any(1) & (labels_T >= 0)
        labels_T, chosen_TE = labels_T[kept_T], chosen_TE[kept_T]
        dtype = self.counts_VE.dtype
        self.counts_VE = self.counts_VE.index_add(0, labels_T, chosen_TE.to(dtype))
        self.tokens_V = self.tokens_V.index_add(0, labels_T, torch.ones_like(labels_T, dtype=dtype))

    def compute(self) -> dict[str, Tensor]:
        """Return `share_VE`, `specialization` and `chance`; the last two NaN where no label has enough tokens."""
        share_VE = self.counts_VE / self.tokens_V.unsqueeze(1).clamp_min(1)
        enough_V = self.tokens_V >= max(self.min_count, 1)
        counted_VE = share_VE[enough_V]
        return {
            "share_VE": share_VE.masked_fill(~enough_V.unsqueeze(1), torch.nan).float(),
            "specialization": counted_VE.max(1).values.mean().float(),  # NaN where nothing is counted
            "chance": counted_VE.mean().float(),
        }

    def plot(self, val: Any = None, ax: Any = None, *, names: list[str] | None = None, most: int = 40) -> Any:
        """Draw the shares of the most specialized labels, or the curves of several results.

        Args:
            val: a result of `forward` or `compute`, or a list of these; by default the current result.
            ax: axes to draw into.
            names: of the labels.
            most: labels to show.

        Returns:
            Figure and axes.
        """
        from routerzoo.metrics.figures import heat_map

        if isinstance(val, (list, tuple)):
            return super().plot(val, ax)
        share_VE = (self.compute() if val is None else val)["share_VE"].reshape(self.num_labels, self.num_experts)
        largest_V = share_VE.nan_to_num(-1).max(1).values
        order = largest_V.argsort(descending=True, stable=True)
        shown = [label for label in order.tolist() if largest_V[label] >= 0][:most]
        labels = [names[label] if names is not None else str(label) for label in shown]
        return heat_map(share_VE[shown], ax, xlabel="expert", ylabel="label", row_names=labels)
