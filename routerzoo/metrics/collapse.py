"""`RepresentationCollapse`: spread of hidden states within classes relative to between them."""
# Shape suffixes: T tokens, D model width, C classes.

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from routerzoo.metrics.base import RoutingMetric


@final
class RepresentationCollapse(RoutingMetric):
    """Spread within classes relative to the spread between them, `Tr(S_W pinv(S_B))` (X-MoE, equation 10).

    **Smaller is more collapsed.** S_W and S_B are the covariances within and between classes of a router's inputs; they
    add up to the total covariance. Classes are weighted by their number of tokens; the paper does not say how it
    weights them. The value depends on what the classes are (X-MoE: the experts that tokens are routed to), and on the
    width. (https://arxiv.org/abs/2204.09179; neural collapse: Papyan et al. 2020.)

    Args:
        num_classes: number of classes.
        d_model: width of the hidden states.
        options: further arguments of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = RepresentationCollapse(num_classes=2, d_model=1)
        >>> metric.update(torch.tensor([[0.0], [2.0], [10.0], [12.0]]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()  # 1 within, 25 between
        tensor(0.0400)
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    unit = "smaller is more collapsed"
    tokens_C: Tensor
    sums_CD: Tensor
    products_DD: Tensor

    def __init__(self, num_classes: int, d_model: int, **options: Any) -> None:
        super().__init__(**options)
        self.num_classes, self.d_model = num_classes, d_model
        for name, shape in (("tokens_C", [num_classes]), ("sums_CD", [num_classes, d_model])):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("products_DD", torch.zeros(d_model, d_model, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x_TD: Tensor, classes_T: Tensor) -> None:
        """Add hidden states. Those of a class below 0 are left out.

        Raises:
            ValueError: another width, another number of classes than of tokens, or a class of `num_classes` or above
                (on a CPU; elsewhere that would wait for the device).
        """
        if x_TD.ndim != 2 or x_TD.shape[1] != self.d_model or classes_T.shape != x_TD.shape[:1]:
            raise ValueError(
                f"expected hidden states [tokens, {self.d_model}] and a class for each, got {list(x_TD.shape)} and "
                f"{list(classes_T.shape)}"
            )
        if classes_T.device.type == "cpu" and classes_T.numel() and int(classes_T.max()) >= self.num_classes:
            raise ValueError(f"classes must be below num_classes = {self.num_classes}, got {int(classes_T.max())}")
        dtype = self.sums_CD.dtype
        x_TD, classes_T = x_TD[classes_T >= 0].detach().to(dtype), classes_T[classes_T >= 0]
        self.tokens_C = self.tokens_C.index_add(0, classes_T, torch.ones_like(classes_T, dtype=dtype))
        self.sums_CD = self.sums_CD.index_add(0, classes_T, x_TD)
        self._add(products_DD=x_TD.T @ x_TD)

    def compute(self) -> Tensor:
        """Return the ratio; NaN without any token."""
        device = self.tokens_C.device
        # Differences of large sums, in a decomposition that devices without float64 lack too.
        tokens_C, sums_CD, products_DD = (s.cpu().double() for s in (self.tokens_C, self.sums_CD, self.products_DD))
        total = tokens_C.sum()
        if total == 0:
            return torch.tensor(torch.nan, device=device)
        mean_CD = sums_CD / tokens_C.unsqueeze(1).clamp_min(1)
        mean_D = sums_CD.sum(0) / total
        centered_CD = (mean_CD - mean_D) * (tokens_C / total).sqrt().unsqueeze(1)
        between_DD = centered_CD.T @ centered_CD
        within_DD = products_DD / total - torch.outer(mean_D, mean_D) - between_DD
        ratio = torch.trace(within_DD @ torch.linalg.pinv(between_DD, rtol=1e-10, hermitian=True))
        return ratio.float().to(device)

    def _numbers(self, result: Tensor) -> dict[str, Tensor]:
        return {"within / between": result}
