"""Matching the scale of routers' initial logits, so that a comparison is not one of initializations.

A router whose logits start larger starts more certain: at width 256 and 16 experts HyperRouter's have a standard
deviation of 1.2 and a normalized entropy of 0.79, a frozen N(0, 0.02) gate's 0.32 and 0.98, before any training.
"""
# Shape suffixes: T tokens, D model width, E experts.

from __future__ import annotations

import torch

from routerzoo.router import Router
from routerzoo.routing import RoutingContext

PROBE_TOKENS = 4096


def initial_logit_std(router: Router) -> float | None:
    """Return the standard deviation of a router's logits over the experts of a token, where hidden states are N(0, 1).

    As they are behind a normalization layer. A shift of all logits of a token does not count: no softmax sees it. None
    where the router has no logits. The random state is left alone.
    """
    generator = torch.Generator().manual_seed(0)
    spec, tokens = router.spec, torch.arange(PROBE_TOKENS)
    x_TD = torch.randn(PROBE_TOKENS, spec.d_model, generator=generator)
    device = next((t.device for t in (*router.parameters(), *router.buffers())), torch.device("cpu"))
    context = RoutingContext(
        token_ids=torch.randint(0, spec.vocab_size or 1, [PROBE_TOKENS], generator=generator).to(device),
        positions=(tokens % (spec.num_positions or 64)).to(device),
        sequence_ids=(tokens // (spec.num_positions or 64)).to(device),
        step=0,
        total_steps=1,
    )
    training = router.training
    router.eval()
    with torch.no_grad():
        logits_TE = router(x_TD.to(device), context).logits_TE
    router.train(training)
    return None if logits_TE is None else float(logits_TE.var(dim=1, correction=0).mean().sqrt())


def match_logit_std(router: Router, std: float) -> None:
    """Scale a router that has not trained so that its logits start with this standard deviation.

    Raises:
        ValueError: a standard deviation that is not above 0, or out of the router's reach.
        NotImplementedError: the router cannot scale its logits.
    """
    if not std > 0:
        raise ValueError(f"the standard deviation of the initial logits must be above 0, got {std}")
    found = initial_logit_std(router)
    if found:  # neither without logits nor with a single expert
        router.scale_initial_logits(std / found)
