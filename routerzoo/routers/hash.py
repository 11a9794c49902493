"""HashRouter: a fixed table from token id to expert (Roller et al., NeurIPS 2021, https://arxiv.org/abs/2106.04426)."""
# Shape suffixes: T tokens, D model width, E experts, K choices per token, V token ids.

from __future__ import annotations

from typing import Literal, final

import numpy as np
import torch
from torch import Tensor

from routerzoo.registry import register_router
from routerzoo.router import Router, UnmetRequirementError
from routerzoo.routing import LayerSpec, Routing, RoutingContext


@register_router
@final
class HashRouter(Router):
    """Hash layer: a token's id alone decides its expert; nothing is learned.

    `y_t = FFN_{H[x_t]}(h_t)`, weight 1. `table="random"` draws each id's experts at random; `"balanced"` assigns the
    ids in order of their frequency in the training split, each to the expert with the least load so far. (A token more
    frequent than 1/E overloads its expert under any table.)

    The table is a buffer, drawn from its own generator, so that a checkpoint carries it and the global random state is
    untouched. The authors' code draws it lazily after reseeding Python's global generator and leaves it out of the
    checkpoint.

    Extensions of the paper, which is top-1 and about text: for k > 1 an id has k different experts of weight 1/k. In
    vision the token ids are the patch's position or a hash of its pixels; see `routerzoo.models.patch_ids`.

    Args:
        spec: sizes of the layer the router sits in, with `vocab_size` and `layer`.
        top_k: experts per token.
        table: how ids are spread over experts.
        seed: seed of the table; by default torch's (`seed_everything`, `torch.manual_seed`). Each layer draws its own.
    """

    paper = "Roller et al., NeurIPS 2021, arXiv:2106.04426"
    requires = frozenset({"token_ids"})
    trainable = False
    normalized = True
    trains_at_top_1 = False
    table: Tensor

    def __init__(
        self,
        spec: LayerSpec,
        *,
        top_k: int = 1,
        table: Literal["random", "balanced"] = "random",
        seed: int | None = None,
    ) -> None:
        super().__init__(spec, top_k=top_k)
        if spec.vocab_size is None:
            raise UnmetRequirementError(type(self).__name__, frozenset({"vocab_size"}))
        if table not in ("random", "balanced"):
            raise ValueError(f"table must be random or balanced, got {table!r}")
        self.balanced = self.wants_token_counts = table == "balanced"
        seed = torch.initial_seed() if seed is None else seed
        generator = torch.Generator(device="cpu").manual_seed((seed * 1_000_003 + self.required_layer()) % 2**63)
        # A row is a whole permutation of the experts, so that k may grow.
        order = torch.rand(spec.vocab_size, spec.num_experts, generator=generator, device="cpu").argsort(-1)
        self.register_buffer("table", order)

    def scale_initial_logits(self, factor: float) -> None:
        """Do nothing: there are no logits."""

    def route(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        """Look the tokens up."""
        assert context.token_ids is not None  # `forward` checked what `requires` names.
        experts_TK = self.table[context.token_ids, : self.top_k]
        return Routing(experts_TK, x_TD.new_full(experts_TK.shape, 1 / self.top_k), may_drop=False)

    def fit_token_counts(self, token_counts_V: Tensor) -> None:
        """Balance the table for these frequencies, if it is to be balanced."""
        if self.balanced:
            balanced = balance_table(self.table.cpu().numpy(), token_counts_V.cpu().numpy(), self.top_k)
            self.table.copy_(torch.from_numpy(balanced))


def balance_table(table_VE: np.ndarray, counts_V: np.ndarray, top_k: int) -> np.ndarray:
    """Reorder each row so that the first `top_k` experts spread the load greedily, most frequent ids first.

    Args:
        table_VE: a permutation of the experts per id; it breaks ties and orders what follows the first `top_k`.
        counts_V: how often each id occurs.
        top_k: columns to balance.

    Raises:
        ValueError: counts for another number of ids.
    """
    if counts_V.shape != table_VE.shape[:1]:
        raise ValueError(f"counts are for {len(counts_V)} token ids, the table has {len(table_VE)}")
    load_E = np.zeros(table_VE.shape[1])
    balanced_VE = table_VE.copy()
    for token in np.argsort(-counts_V, kind="stable"):
        row_E = table_VE[token]
        row_E = row_E[np.argsort(load_E[row_E], kind="stable")]
        chosen_K = row_E[:top_k]
        load_E[chosen_K] += counts_V[token]
        balanced_VE[token] = np.concatenate([chosen_K, table_VE[token][~np.isin(table_VE[token], chosen_K)]])
    return balanced_VE
