"""Models and contexts that every router runs in."""

import torch

from routerzoo import LayerSpec, RoutingContext
from routerzoo.routing import CONTEXT_FIELDS

PROVIDED = frozenset(CONTEXT_FIELDS)
SPEC = LayerSpec(16, 4, layer=0, num_layers=2, vocab_size=20, num_positions=16, num_tasks=2, provides=PROVIDED)


def context_of(sequences, length):
    """Return a context with every field, for sequences of one length."""
    tokens = torch.arange(sequences * length)
    return RoutingContext(
        token_ids=tokens % 20,
        positions=tokens % length,
        sequence_ids=tokens // length,
        task_ids=tokens // length % 2,
        attention=torch.full((sequences * length, 1, length), 1 / length),
        step=0,
        total_steps=40,
    )


CONTEXT = context_of(2, 6)
