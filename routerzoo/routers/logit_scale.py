"""Matching the scale of routers' initial logits, so that a comparison is not one of initializations.

A router whose logits start larger starts more certain: at width 256 and 16 experts HyperRouter's have a standard
deviation of 1.2 and a normalized entropy of 0.79, a frozen N(0, 0.02) gate's 0.32 and 0.98, before any training.
"""
# Shape suffixes: T tokens, D model width, E experts.

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from routerzoo.router import Router
from routerzoo.routing import RoutingContext

PROBE_TOKENS = 4096


def initial_logit_std(router: Router) -> float | None:
    """Return the standard deviation of a router's logits over the experts of a token, where hidden states are N(0, 1).

    As they are behind a normalization layer. A shift of all logits of a token does not count: no softmax sees it. None
    where the router has no logits. The random state is left alone. Routers that continue from earlier layers cannot be
    measured alone: see `initial_logit_stds`.
    """
    return initial_logit_stds([router])[0]


def initial_logit_stds(routers: Iterable[Router]) -> list[float | None]:
    """Return the `initial_logit_std` of the routers of a model, in the order of its layers, in one pass."""
    return [std for _, std in _measured(routers)]


def match_logit_std(routers: Router | Iterable[Router], std: float) -> None:
    """Scale routers that have not trained so that their logits start with this standard deviation.

    Args:
        routers: the routers of a model, in the order of its layers: some continue from earlier ones, or use their gate.
        std: the standard deviation, above 0.

    Raises:
        ValueError: a standard deviation that is not above 0, or out of a router's reach.
        NotImplementedError: a router cannot scale its logits.
    """
    if not std > 0:
        raise ValueError(f"the standard deviation of the initial logits must be above 0, got {std}")
    for router, found in _measured([routers] if isinstance(routers, Router) else routers):
        if found:  # neither without logits nor with a single expert
            router.scale_initial_logits(std / found)


@torch.no_grad()
def _measured(routers: Iterable[Router]) -> Iterator[tuple[Router, float | None]]:
    """Yield each router with its `initial_logit_std`; what is done to it then, later ones see."""
    context, tokens = RoutingContext(step=0, total_steps=1), torch.arange(PROBE_TOKENS)
    for router in routers:
        # The same tokens for all layers, as they see one residual stream.
        spec, generator = router.spec, torch.Generator().manual_seed(0)
        x_TD = torch.randn(PROBE_TOKENS, spec.d_model, generator=generator)
        device = next((t.device for t in (*router.parameters(), *router.buffers())), torch.device("cpu"))
        fields = {
            "token_ids": torch.randint(0, spec.vocab_size or 1, [PROBE_TOKENS], generator=generator).to(device),
            "task_ids": torch.randint(0, spec.num_tasks or 1, [PROBE_TOKENS], generator=generator).to(device),
            "positions": (tokens % (spec.num_positions or 64)).to(device),
            "sequence_ids": (tokens // (spec.num_positions or 64)).to(device),
        }
        training = router.training
        router.eval()
        logits_TE = router(x_TD.to(device), context.replace(**fields)).logits_TE
        router.train(training)
        yield router, None if logits_TE is None else float(logits_TE.var(dim=1, correction=0).mean().sqrt())
