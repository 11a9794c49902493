"""`Sequences`: the tokens of a batch, sequence by sequence, for routers that look at several tokens together."""
# Shape suffixes: T tokens, R real tokens (not padding), G sequences, S tokens of the longest one.

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sequences(NamedTuple):
    """Tokens laid out in a rectangle, one row a sequence, in their order; padding is not among them.

    Args:
        token_R: the real tokens.
        place_R: where each is in the flattened rectangle.
        real_GS: which places of the rectangle hold a token.
    """

    token_R: Tensor
    place_R: Tensor
    real_GS: Tensor

    @property
    def lengths_G(self) -> Tensor:
        """Number of real tokens of each sequence, int64."""
        return self.real_GS.sum(1)

    @property
    def token_GS(self) -> Tensor:
        """The token at each place; -1 where there is none."""
        token = self.token_R.new_full((self.real_GS.numel(),), -1)
        return token.index_copy(0, self.place_R, self.token_R).view_as(self.real_GS)

    def to_padded(self, values_T: Tensor, fill: float = 0.0) -> Tensor:
        """Lay out `[T, ...]` as `[G, S, ...]`, with a value where there is no token."""
        groups, length = self.real_GS.shape
        flat = values_T.new_full((groups * length, *values_T.shape[1:]), fill)
        flat = flat.index_copy(0, self.place_R, values_T.index_select(0, self.token_R))
        return flat.view(groups, length, *values_T.shape[1:])

    def to_flat(self, values_GS: Tensor, num_tokens: int, fill: float = 0.0) -> Tensor:
        """Bring `[G, S, ...]` back into the order of tokens, `[T, ...]`, with a value for padding."""
        flat = values_GS.flatten(0, 1)
        values_T = flat.new_full((num_tokens, *flat.shape[1:]), fill)
        return values_T.index_copy(0, self.token_R, flat.index_select(0, self.place_R))


def group_by_sequence(
    num_tokens: int, sequence_ids: Tensor | None, padding_mask: Tensor | None, device: torch.device
) -> Sequences:
    """Return the tokens of each sequence.

    It reads the number and the length of sequences back from the device, which `torch.compile(fullgraph=True)` cannot:
    a router that calls it declares `compiles = False`.

    Args:
        num_tokens: tokens of the batch.
        sequence_ids: [tokens] int64, in any order; None takes all tokens for one sequence.
        padding_mask: [tokens] bool, True for tokens to leave out.
        device: where the tokens are.
    """
    token_R = torch.arange(num_tokens, device=device)
    if padding_mask is not None:
        token_R = token_R[~padding_mask]
    if len(token_R) == 0:
        return Sequences(token_R, token_R, torch.zeros(0, 0, dtype=torch.bool, device=device))
    if sequence_ids is None:
        return Sequences(token_R, torch.arange(len(token_R), device=device), token_R.new_ones(1, len(token_R)).bool())
    sorted_R, order_R = sequence_ids.index_select(0, token_R).sort(stable=True)
    token_R = token_R.index_select(0, order_R)
    _, group_R, lengths_G = torch.unique_consecutive(sorted_R, return_inverse=True, return_counts=True)
    begin_G = lengths_G.cumsum(0) - lengths_G
    length = int(lengths_G.max())
    within_R = torch.arange(len(token_R), device=device) - begin_G.index_select(0, group_R)
    real_GS = torch.arange(length, device=device).unsqueeze(0) < lengths_G.unsqueeze(1)
    return Sequences(token_R, group_R * length + within_R, real_GS)


def add_by_index(values: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Return `[num_rows, ...]`, the sums of the values with each index, in the same order every time.

    `index_add` on a GPU adds in whatever order threads come; accumulating by `index_put` sorts first.
    """
    zeros = values.new_zeros(num_rows, *values.shape[1:])
    if values.device.type == "cuda":
        return zeros.index_put((index,), values, accumulate=True)
    return zeros.index_add(0, index, values)
