"""Every metric, with batches to update it with and what they give, in plain numpy."""
# Batches hold arrays: expert ids [T, 2], logits [T, 4], hidden states [T, 3] and labels [T].

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from routerzoo import Routing, metrics

E, V, D = 4, 5, 3
"""Experts, labels, width."""


def batch(seed, tokens):
    rng = np.random.default_rng(seed)
    experts, after = (np.stack([rng.permutation(E)[:2] for _ in range(tokens)]) for _ in range(2))
    experts[rng.random(experts.shape) < 0.2] = -1
    logits, x = rng.normal(size=(tokens, E)), rng.normal(size=(tokens, D)) + 1
    return experts, after, logits.astype("f4"), x.astype("f4"), rng.integers(V, size=tokens)


BATCHES = [batch(seed, tokens) for seed, tokens in enumerate((12, 30, 7, 20))]


def routing(experts, logits=None):
    experts_TK = torch.from_numpy(experts)
    return Routing(experts_TK, torch.ones(experts_TK.shape), None if logits is None else torch.from_numpy(logits))


def joined(batches):
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]


def sets(experts):
    return np.stack([np.isin(np.arange(E), row) for row in experts])


def expert_load(batches):
    experts, *_ = joined(batches)
    load = np.bincount(experts[experts >= 0], minlength=E).astype(float)
    relative, share = load / load.mean(), load / load.sum()
    entropy = -sum(s * np.log(s) for s in share if s > 0) / np.log(E)
    return {
        "load_max": relative.max(),
        "load_min": relative.min(),
        "load_max_violation": relative.max() - 1,
        "load_cv": load.std() / load.mean(),
        "load_entropy": entropy,
        "dead_experts": (load == 0).sum(),
    }


def gate_confidence(batches):
    experts, _, logits, *_ = joined(batches)
    chosen = (experts >= 0).sum(1)
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    first, second = np.sort(probs, 1)[:, ::-1][:, :2].T
    entropy = -(probs * np.log(probs)).sum(1) / np.log(E)
    real = chosen > 0
    return {
        "gate_entropy": entropy[real].mean(),
        "gate_margin": (first - second)[real].mean(),
        "active_experts": chosen[real].mean(),
    }


def by_expert(batch):
    """Rows sorted by an expert, the label's, and where each expert's end; the last expert has none."""
    experts = batch[4] % (E - 1)
    order = np.argsort(experts, kind="stable")
    return torch.from_numpy(batch[3][order]), torch.from_numpy(np.bincount(experts, minlength=E).cumsum())


def expert_norms(batches):
    *_, x, labels = joined(batches)
    norms = np.array([np.linalg.norm(x[labels % (E - 1) == expert], axis=1).mean() for expert in range(E - 1)])
    return {"largest": norms.max() / np.median(norms), "smallest": norms.min() / np.median(norms)}


def co_activation(batches):
    chosen = sets(joined(batches)[0]).astype(float)
    pairs = chosen.T @ chosen
    return pairs / np.maximum(np.diag(pairs), 1)[:, None]


def pairs_of_sets(batches):
    before, after = (sets(experts) for experts in joined(batches)[:2])
    return [(set(np.flatnonzero(a)), set(np.flatnonzero(b))) for a, b in zip(before, after, strict=True)]


def fluctuation(batches):
    pairs = pairs_of_sets(batches)
    return {
        "fluctuation": np.mean([1 - len(a & b) / max(len(a), len(b)) for a, b in pairs]),
        "changed_tokens": np.mean([a != b for a, b in pairs]),
    }


def saturation(batches):
    pairs = pairs_of_sets(batches)
    return {
        "saturation": np.mean([len(a & b) / len(b) for a, b in pairs]),
        "chance": np.mean([len(a) / E for a, _ in pairs]),
    }


def settled(batches):
    history = [sets(experts) for experts in batches]
    same = [[(earlier == history[-1]).all(1) for earlier in history[record:]] for record in range(len(history))]
    return {"steps": 10 * np.arange(len(history)), "settled": [np.all(rest, axis=0).mean() for rest in same]}


def specialization(batches):
    experts, *_, labels = joined(batches)
    chosen = sets(experts)
    labels, chosen = labels[chosen.any(1)], chosen[chosen.any(1)]
    share = np.full((V, E), np.nan)
    for label in set(labels):
        share[label] = chosen[labels == label].mean(0)
    known = share[~np.isnan(share).any(1)]
    return {"share_VE": share, "specialization": known.max(1).mean(), "chance": known.mean()}


def collapse(batches):
    *_, x, labels = joined(batches)
    x = x.astype(float)
    within = sum(np.cov(x[labels == c].T, bias=True) * (labels == c).mean() for c in set(labels))
    return np.trace(within @ np.linalg.pinv(np.cov(x.T, bias=True) - within, rcond=1e-10, hermitian=True))


def consistency(runs):
    correlations = np.corrcoef(np.stack(runs)).reshape(len(runs), len(runs))
    others = correlations[~np.eye(len(runs), dtype=bool)]
    between = others.mean() if len(others) else np.nan
    return {"consistency": correlations.mean(), "between_runs": between, "correlations_MM": correlations}


def drifting(step):
    """Return expert ids of 30 tokens, some of which differ from step to step."""
    changed = np.random.default_rng(step).random((30, 1)) < 0.3
    return np.where(changed, (BATCHES[1][0] + 1) % E, BATCHES[1][0])


@dataclass
class Case:
    """A metric.

    Args:
        build: builds it, from options of `torchmetrics.Metric`.
        update: arguments of `update` for the i-th batch.
        expected: the result of batches, in numpy.
        batches: the batches.
        cumulative: `forward` gives the result so far, not that of the batch; processes then split tokens.
    """

    build: Callable[..., Any]
    update: Callable[[int, Any], tuple[Any, ...]]
    expected: Callable[[list[Any]], Any]
    batches: Any = tuple(BATCHES)
    cumulative: bool = False

    def updated(self, metric, places):
        for place in places:
            metric.update(*self.update(place, self.batches[place]))
        return metric

    def whole(self, **options):
        return self.updated(self.build(**options), range(len(self.batches)))


CASES = {
    "ExpertLoad": Case(lambda **o: metrics.ExpertLoad(E, **o), lambda i, b: (routing(b[0], b[2]),), expert_load),
    "ExpertNorms": Case(lambda **o: metrics.ExpertNorms(E, **o), lambda i, b: by_expert(b), expert_norms),
    "GateConfidence": Case(
        lambda **o: metrics.GateConfidence(E, **o), lambda i, b: (routing(b[0], b[2]),), gate_confidence
    ),
    "CoActivation": Case(lambda **o: metrics.CoActivation(E, **o), lambda i, b: (routing(b[0]),), co_activation),
    "RoutingFluctuation": Case(
        lambda **o: metrics.RoutingFluctuation(E, **o), lambda i, b: (routing(b[0]), routing(b[1])), fluctuation
    ),
    "RouterSaturation": Case(
        lambda **o: metrics.RouterSaturation(E, **o), lambda i, b: (routing(b[0]), routing(b[1])), saturation
    ),
    "LastFluctuation": Case(
        lambda **o: metrics.LastFluctuation(E, **o),
        lambda i, b: (10 * i, routing(b)),
        settled,
        [
            np.where(np.random.default_rng(i).random((30, 1)) < 0.3, (BATCHES[1][0] + 1) % E, BATCHES[1][0])
            for i in range(4)
        ],
        cumulative=True,
    ),
    "Specialization": Case(
        lambda **o: metrics.Specialization(E, V, min_count=1, **o),
        lambda i, b: (routing(b[0]), torch.from_numpy(b[4])),
        specialization,
    ),
    "RepresentationCollapse": Case(
        lambda **o: metrics.RepresentationCollapse(V, D, **o),
        lambda i, b: (torch.from_numpy(b[3]), torch.from_numpy(b[4])),
        collapse,
    ),
    "InterRunConsistency": Case(
        lambda **o: metrics.InterRunConsistency(**o),
        lambda i, load: (torch.from_numpy(load),),
        consistency,
        [np.random.default_rng(run).integers(1, 100_000, size=8) for run in range(4)],
    ),
}
