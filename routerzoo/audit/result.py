"""`audit`: measure what a model's MoE layers do, and judge it."""
# Shape suffixes: E experts, V labels, T tokens, K choices per token.

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from routerzoo.audit.counterfactuals import BestExpert, best_experts, costs_of_changes
from routerzoo.audit.observation import FEWEST, LayerObserver, mean_loss, observe
from routerzoo.audit.subject import Subject
from routerzoo.audit.thresholds import FEWEST_ASSIGNMENTS, Finding, Thresholds, judge, unjudged
from routerzoo.errors import UserError
from routerzoo.metrics import RouterSaturation, Specialization
from routerzoo.metrics.expert_norms import norm_statistics, parameter_norms, relative_norms
from routerzoo.moe.layer import inner_router
from routerzoo.routing import Routing

Experts = list[Tensor | None]
"""Of each layer, the experts of the first tokens, int16 `[T, K]`; None where it names none."""


@dataclass
class LayerAudit:
    """What one MoE layer does. Norms and loads are over the median and the mean expert's.

    Args:
        index: of the layer among the model's MoE layers.
        name: of the module.
        router: class of the router.
        num_experts: experts.
        top_k: experts per token; 0 where that is not fixed.
        assignments: token-expert pairs that were counted.
        load: see `routerzoo.metrics.load.load_statistics`.
        relative_load: by expert.
        gate: see `GateConfidence`; only what is known.
        co_activation: the most co-activated pair, its share, and what chance gives.
        specialization: by token id and by group, with the chance level.
        parameter_norm: largest and smallest.
        relative_parameter_norms: by expert; None where the weights are not at hand.
        output_norm: largest and smallest.
        relative_output_norms: by expert; None for one without a token, or all of them.
        saturation: by earlier checkpoint.
        costs: what changes of all first choices add to the loss, in nats.
        best: what the best expert would gain.
        together_EE: co-activation.
        token_shares_VE: share of each token id's tokens by expert.
        group_shares_VE: the same by group.
    """

    index: int
    name: str
    router: str
    num_experts: int
    top_k: int
    assignments: int
    load: dict[str, float]
    relative_load: list[float]
    gate: dict[str, float]
    co_activation: dict[str, Any]
    specialization: dict[str, dict[str, float]]
    parameter_norm: dict[str, float]
    relative_parameter_norms: list[float] | None
    output_norm: dict[str, float]
    relative_output_norms: list[float | None] | None
    saturation: dict[str, dict[str, float]] = field(default_factory=dict)
    costs: dict[str, float] | None = None
    best: BestExpert | None = None
    together_EE: Tensor | None = field(default=None, repr=False)
    token_shares_VE: Tensor | None = field(default=None, repr=False)
    group_shares_VE: Tensor | None = field(default=None, repr=False)

    @property
    def load_is_judged(self) -> bool:
        """Whether there are enough assignments to tell a dead expert from chance."""
        return self.assignments >= FEWEST_ASSIGNMENTS * self.num_experts


@dataclass
class Audit:
    """The result of an audit.

    Args:
        model: what was audited.
        data: on what.
        tokens: how many tokens the layers saw, without padding.
        loss: mean loss of a prediction, in nats; None for a model without a loss.
        layers: what each does.
        thresholds: that they were judged by.
        findings: what is not healthy.
        left_out: what was not measured, and why.
        group_kind: what groups are.
        group_names: their names.
        token_names: of the token ids of `token_shares_VE`.
        seconds: that the forward passes took.
    """

    model: str
    data: str
    tokens: int
    loss: float | None
    layers: list[LayerAudit]
    thresholds: Thresholds
    findings: list[Finding]
    left_out: list[str]
    group_kind: str
    group_names: Sequence[str]
    token_names: list[str]
    seconds: float

    @property
    def healthy(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """Return it as what JSON knows; matrices by token id are left out, NaN and inf are strings."""
        layers = []
        for layer in self.layers:
            entry = {k: v for k, v in vars(layer).items() if not isinstance(v, Tensor) and not k.endswith("E")}
            entry["best"] = None if layer.best is None else layer.best._asdict()
            entry["co_activation_EE"] = None if layer.together_EE is None else layer.together_EE.tolist()
            entry["group_shares"] = None if layer.group_shares_VE is None else layer.group_shares_VE.tolist()
            layers.append(entry)
        content: dict[str, Any] = {
            "model": self.model,
            "data": self.data,
            "tokens": self.tokens,
            "loss": self.loss,
            "healthy": self.healthy,
            "findings": [{**finding._asdict(), "sentence": str(finding)} for finding in self.findings],
            "thresholds": asdict(self.thresholds),
            "left_out": self.left_out,
            "group_kind": self.group_kind,
            "group_names": list(self.group_names),
            "seconds": self.seconds,
            "layers": layers,
        }
        known: dict[str, Any] = _json(content)
        return known


def audit(
    subject: Subject,
    *,
    thresholds: Thresholds | None = None,
    earlier: Sequence[tuple[str, Experts]] = (),
    counterfactual_batches: int = 0,
    best_batches: int = 0,
) -> Audit:
    """Measure and judge.

    Args:
        subject: model and data.
        thresholds: what is healthy.
        earlier: names of earlier checkpoints, and what `record_experts` gave for them on the same data.
        counterfactual_batches: batches to change all first choices in: `1 + 3 L` passes of each, of L layers.
        best_batches: batches to try every expert in, for a token of each sequence: as many passes of each as there are
            experts in all layers, and two.

    Raises:
        UserError: a checkpoint of another model or of other data; a threshold of counterfactuals, and none of them.
    """
    limits = Thresholds() if thresholds is None else thresholds
    for name in ("min_drop_cost", "min_random_cost"):
        if getattr(limits, name) is not None and not counterfactual_batches:
            raise UserError(f"{name} judges counterfactuals, and there are none: give them at least 1 batch")
    start = time.perf_counter()
    observers, losses = observe(subject, record=bool(earlier))
    left_out = list(subject.left_out)
    layers = [_layer(index, observer, subject, left_out) for index, observer in enumerate(observers)]
    _saturate(layers, _experts(observers), earlier)
    if not earlier:
        left_out.append("saturation: it compares checkpoints, and only one was given (--earlier)")
    if losses is None:
        if not subject.left_out:
            left_out.append("loss and counterfactuals: the model has no loss on this data")
    else:
        passes = sum(layer.num_experts for layer in layers) + 2
        if counterfactual_batches:
            batches = subject.batches[:counterfactual_batches]
            _, costs, reasons = costs_of_changes(subject, batches)
            for layer, cost in zip(layers, costs, strict=True):
                layer.costs = {str(change): value for change, value in cost.items()}
            left_out += reasons
        else:
            left_out.append(
                "counterfactuals: each batch of --counterfactuals N takes "
                f"{1 + 3 * len(layers)} forward passes of this model"
            )
        if best_batches:
            found, reasons = best_experts(subject, subject.batches[:best_batches])
            for layer, best in zip(layers, found, strict=True):
                layer.best = best
            left_out += reasons
        else:
            left_out.append(f"the best expert: each batch of --best N takes {passes} forward passes of this model")
    for layer in layers:
        left_out += [
            f"MoE layer {layer.index}: {name} judges what was not measured" for name in unjudged(layer, limits)
        ]
        if not layer.load_is_judged:
            left_out.append(
                f"MoE layer {layer.index}: its load is not judged, {layer.assignments} assignments are fewer than "
                f"{FEWEST_ASSIGNMENTS} for each of {layer.num_experts} experts: give more --batches"
            )
    labels = observers[0].labels.ids
    return Audit(
        subject.name,
        subject.data,
        max(observer.tokens for observer in observers),
        None if losses is None else mean_loss([losses]),
        layers,
        limits,
        [finding for layer in layers for finding in judge(layer, limits)],
        left_out,
        subject.group_kind,
        subject.group_names,
        [subject.token_name(index) for index in labels],
        time.perf_counter() - start,
    )


def record_experts(subject: Subject) -> Experts:
    """Return the experts of the first tokens of a subject's data, for `audit(earlier=...)`."""
    return _experts(observe(subject, record=True)[0])


def _experts(observers: Sequence[LayerObserver]) -> Experts:
    return [torch.cat(observer.experts) if observer.experts else None for observer in observers]


def _saturate(layers: Sequence[LayerAudit], final: Experts, earlier: Sequence[tuple[str, Experts]]) -> None:
    for name, experts in earlier:
        if len(experts) != len(final):
            raise UserError(f"{name} has {len(experts)} MoE layers, the audited model {len(final)}: give its own")
        for layer, then, now in zip(layers, experts, final, strict=True):
            if then is None or now is None:
                continue
            if len(then) != len(now):
                raise UserError(f"{name} routes {len(then)} tokens, the audited model {len(now)}: give its own")
            if then.numel() and (largest := int(then.max())) >= layer.num_experts:
                raise UserError(
                    f"{name} routes to expert {largest} of MoE layer {layer.index}, the audited model has "
                    f"{layer.num_experts}: give its own"
                )
            metric = RouterSaturation(layer.num_experts)
            metric.update(_routing(then), _routing(now))
            layer.saturation[name] = {key: float(value) for key, value in metric.compute().items()}


def _routing(experts_TK: Tensor) -> Routing:
    experts_TK = experts_TK.long()
    return Routing(experts_TK, (experts_TK >= 0).float())


def _layer(index: int, observer: LayerObserver, subject: Subject, left_out: list[str]) -> LayerAudit:
    layer, count = observer.layer, observer.layer.num_experts
    name = next(name for name, module in subject.net.named_modules() if module is layer)
    router = type(inner_router(layer)).__name__
    counts_E = observer.load.counts_E.cpu()
    parameters_E = parameter_norms(layer.experts, count)
    outputs_E = observer.output_norms.norms_E.cpu()
    if parameters_E.isnan().all():
        left_out.append(f"MoE layer {index}, parameter norms: its weights are offloaded, sharded or quantized")
    if outputs_E.isnan().all():
        left_out.append(f"MoE layer {index}, output norms: its experts' outputs cannot be told apart")
    if observer.mixes:
        left_out.append(f"MoE layer {index}, gate, co-activation, specialization: {router} mixes tokens")
    gate = {name: float(value) for name, value in observer.gate.compute().items()} if observer.gate.tokens > 0 else {}
    together_EE, co_activation = None, {}
    if not observer.mixes and count > 1:
        together_EE = observer.together.compute().cpu().view(count, count)
        apart_EE = together_EE.clone().fill_diagonal_(0)
        place = int(apart_EE.argmax())
        chance = max(gate.get("active_experts", 1.0) - 1, 0) / (count - 1)
        co_activation = {"share": float(apart_EE.max()), "chance": chance, "pair": list(divmod(place, count))}
    specialization, shares = {}, {}
    kinds = (("token", observer.by_token), (subject.group_kind, observer.by_group))
    for kind, metric in kinds:
        if metric is not None and metric.update_called:
            result = metric.compute()
            if not result["specialization"].isnan():
                specialization[kind] = {key: float(result[key]) for key in ("specialization", "chance")}
                shares[kind] = result["share_VE"].cpu().view(metric.num_labels, count)
        if kind not in specialization and not index and not observer.mixes:
            left_out.append(f"specialization by {kind}: {_unknown(kind, metric)}")
    return LayerAudit(
        index=index,
        name=name,
        router=router,
        num_experts=count,
        top_k=observer.top_k,
        assignments=int(counts_E.sum()),
        load={key: float(value) for key, value in observer.load.compute().items()},
        relative_load=(counts_E / counts_E.mean().clamp_min(1e-12)).tolist(),
        gate={key: value for key, value in gate.items() if not math.isnan(value)},
        co_activation=co_activation,
        specialization=specialization,
        parameter_norm={key: float(value) for key, value in norm_statistics(parameters_E).items()},
        relative_parameter_norms=None if parameters_E.isnan().all() else relative_norms(parameters_E).tolist(),
        output_norm={key: float(value) for key, value in norm_statistics(outputs_E).items()},
        relative_output_norms=_known(outputs_E),
        together_EE=together_EE,
        token_shares_VE=shares.get("token"),
        group_shares_VE=shares.get(subject.group_kind),
    )


def _unknown(kind: str, metric: Specialization | None) -> str:
    if metric is not None and metric.update_called:
        return f"no {kind} has {FEWEST} tokens that the router sees"
    if kind == "token":
        return f"tokens have no ids, or none of these occurs {FEWEST} times"
    return f"neither data nor model say which {kind} a token is of"


def _known(norms_E: Tensor) -> list[float | None] | None:
    if norms_E.isnan().all():
        return None
    missing = norms_E.isnan().tolist()
    return [None if gone else value for gone, value in zip(missing, relative_norms(norms_E).tolist(), strict=True)]


def _json(value: Any) -> Any:
    """Return a value with what JSON has no name for as strings."""
    if isinstance(value, dict):
        return {str(key): _json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
