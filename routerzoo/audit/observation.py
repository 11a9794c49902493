"""`LayerObserver`: the metrics of one MoE layer over the audited data."""
# Shape suffixes: T tokens, K choices per token, B sequences, S tokens of one, V vocabulary, E experts.

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from routerzoo.audit.subject import Losses, Subject
from routerzoo.errors import UserError
from routerzoo.metrics import CoActivation, ExpertLoad, ExpertNorms, GateConfidence, Specialization
from routerzoo.metrics.expert_norms import OutputHook
from routerzoo.moe.layer import MoE, moe_layers
from routerzoo.routing import LayerRouting, RoutingContext

FEWEST = 10
"""Labels with fewer tokens say nothing of specialization."""
MOST_TOKEN_IDS = 2000
"""Token ids whose specialization is measured, the most frequent ones; counts of 150,000 would take gigabytes."""
MOST_RECORDED = 1 << 16
"""Tokens whose experts are compared between checkpoints."""


class TokenLabels:
    """Token ids that are frequent enough to be labels.

    Args:
        subject: with the data.
    """

    def __init__(self, subject: Subject) -> None:
        counts: Counter[int] = Counter()
        for batch in subject.batches:
            ids = subject.token_ids(batch)
            if ids is not None:
                found, times = torch.unique(ids, return_counts=True)
                counts.update(dict(zip(found.tolist(), times.tolist(), strict=True)))
        frequent = [index for index, count in counts.most_common(MOST_TOKEN_IDS) if count >= FEWEST]
        self.ids = sorted(frequent)
        self._sorted: Tensor | None = None

    def of(self, ids_T: Tensor) -> Tensor:
        """Return the label of each token id; -1 for none."""
        if self._sorted is None or self._sorted.device != ids_T.device:
            self._sorted = torch.tensor(self.ids, device=ids_T.device)
        place_T = torch.searchsorted(self._sorted, ids_T).clamp_max(len(self.ids) - 1)
        return torch.where(self._sorted[place_T] == ids_T, place_T, -1)


class LayerObserver:
    """Counts what a layer publishes.

    Args:
        layer: the layer.
        labels: of tokens.
        num_groups: number of documents, corpora or classes; 0 where unknown.
    """

    def __init__(self, layer: MoE, labels: TokenLabels, num_groups: int) -> None:
        count, device = layer.num_experts, next((t.device for t in layer.router.parameters()), torch.device("cpu"))
        self.layer, self.labels = layer, labels
        self.load, self.gate = ExpertLoad(count).to(device), GateConfidence(count).to(device)
        self.together, self.output_norms = CoActivation(count).to(device), ExpertNorms(count).to(device)
        self.by_token = Specialization(count, len(labels.ids), min_count=FEWEST).to(device) if labels.ids else None
        self.by_group = Specialization(count, num_groups, min_count=FEWEST).to(device) if num_groups else None
        self.experts: list[Tensor] = []
        self.recorded = self.tokens = 0
        self.mixes = False
        self.top_k = 0

    def count(self, layer: nn.Module, args: object, y: Tensor) -> None:
        """Add the tokens of a call, a forward hook."""
        self.tokens += y.numel() // y.shape[-1]

    def update(self, published: LayerRouting, ids_T: Tensor | None, groups_T: Tensor | None, record: bool) -> None:
        """Add a routing."""
        routing = published.routing
        self.load.update(routing)
        self.gate.update(routing)
        if routing.dense:
            self.mixes = True
            return
        self.together.update(routing)
        if self.by_token is not None and ids_T is not None:
            self.by_token.update(routing, self.labels.of(ids_T))
        if self.by_group is not None and groups_T is not None:
            self.by_group.update(routing, groups_T)
        if routing.experts_TK is not None:
            self.top_k = max(self.top_k, routing.experts_TK.shape[1])
            if record and self.recorded < MOST_RECORDED:
                self.experts.append(routing.experts_TK.to(torch.int16).cpu())
                self.recorded += len(routing.experts_TK)


@torch.inference_mode()
def observe(subject: Subject, record: bool = False) -> tuple[list[LayerObserver], Losses | None]:
    """Run a subject on its data once, and return what each layer does, and the losses of all batches together.

    Args:
        subject: model and data.
        record: keep the experts of the first tokens, to compare them with another checkpoint's.

    Raises:
        UserError: a layer that the model does not call.
    """
    labels = TokenLabels(subject)
    num_groups = max((int(g.max()) + 1 for b in subject.batches if (g := subject.groups(b)) is not None), default=0)
    observers = {layer: LayerObserver(layer, labels, num_groups) for layer in moe_layers(subject.net)}
    groups_B: Tensor | None = None
    ids_T: Tensor | None = None

    def take(published: LayerRouting, context: RoutingContext) -> None:
        layer: Any = published.layer
        groups_T = None
        if groups_B is not None and (rows_T := rows_of(subject, published, context, len(groups_B))) is not None:
            groups_T = groups_B.to(rows_T.device)[rows_T]
        if context.padding_mask is not None:
            observers[layer].tokens -= int(context.padding_mask.sum())
        observers[layer].update(published, ids_T, groups_T, record)

    totals: list[Losses] = []
    with evaluating(subject.net), ExitStack() as stack:
        for layer, observer in observers.items():
            stack.callback(layer.register_routing_hook(take).remove)
            stack.callback(layer.register_forward_hook(observer.count).remove)
            stack.callback(OutputHook(layer.experts, lambda metric=observer.output_norms: metric).remove)  # type: ignore[misc]
        for batch in subject.batches:
            ids, groups_B = subject.token_ids(batch), subject.groups(batch)
            ids_T = None if ids is None else ids.flatten()
            losses = subject.losses(batch)
            if losses is not None:
                totals.append(losses)
    for index, (layer, observer) in enumerate(observers.items()):
        if not observer.load.update_called:
            raise UserError(f"{subject.name} does not call its MoE layer {index} on {subject.data}")
        assert layer is observer.layer
    return list(observers.values()), _together(totals)


def rows_of(subject: Subject, published: LayerRouting, context: RoutingContext, num_rows: int) -> Tensor | None:
    """Return the sequence or image of a batch that each token is of, int64 `[T]`; None where nothing says it."""
    ids_T, routing = context.sequence_ids, published.routing
    if ids_T is not None and int(ids_T.max()) < num_rows:
        return ids_T
    # Documents that share a row have ids that are counted over the batch; images of transformers have none.
    tokens = ids_T if ids_T is not None else routing.experts_TK if routing.experts_TK is not None else routing.logits_TE
    if tokens is None or len(tokens) % num_rows or (ids_T is None and not subject.batch_first):
        return None
    return torch.arange(num_rows, device=tokens.device).repeat_interleave(len(tokens) // num_rows)


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluate a model for a while, in the form in which the outputs of single experts can be seen."""
    training, layers = net.training, list(moe_layers(net))
    before = [(layer, layer.low_memory, layer.warns_of_batch_dependence) for layer in layers]
    for layer in layers:
        layer.low_memory, layer.warns_of_batch_dependence = False, False  # an audit serves no users
    net.eval()
    try:
        yield
    finally:
        for layer, low_memory, warns in before:
            layer.low_memory, layer.warns_of_batch_dependence = low_memory, warns
        net.train(training)


def _together(totals: Sequence[Losses]) -> Losses | None:
    if not totals:
        return None
    return Losses(torch.cat([t.sums_B for t in totals]), torch.cat([t.counts_B for t in totals]))


def mean_loss(losses: Iterable[Losses | None]) -> float:
    """Return the mean loss of one prediction."""
    given = [one for one in losses if one is not None]
    total = sum(float(one.sums_B.double().sum()) for one in given)
    return total / max(sum(float(one.counts_B.sum()) for one in given), 1.0)
