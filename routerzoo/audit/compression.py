"""`compress`: prune or merge experts by what an audit measured, and say what loss that costs."""
# Shape suffixes: E experts, T tokens, D model width, H hidden width, F features of a hidden unit.

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from routerzoo.audit.observation import evaluating, mean_loss
from routerzoo.audit.result import Audit, LayerAudit
from routerzoo.audit.subject import Subject
from routerzoo.errors import UserError
from routerzoo.moe.experts import Experts, TwoLayerExperts
from routerzoo.moe.layer import MoE, inner_router, moe_layers
from routerzoo.router import LogitRouter, Router
from routerzoo.routing import RoutingContext

Method = Literal["prune", "merge"]
Criterion = Literal["load", "output"]
CONFIG_NAMES = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""What configs of transformers call the number of experts."""


class Compression(NamedTuple):
    """What was done, and what it costs.

    Args:
        loss_before: mean loss of a prediction with all experts, in nats; None for a model without a loss.
        loss_after: with those that are left.
        parameters_before: of the whole model.
        parameters_after: of what is left.
        kept: by layer, the experts that are left, by their former index.
        merged_into: by layer, for each expert that is gone, the one that it was merged into; empty where pruned.
    """

    loss_before: float | None
    loss_after: float | None
    parameters_before: int
    parameters_after: int
    kept: list[list[int]]
    merged_into: list[dict[int, int]]


@torch.no_grad()
def compress(
    subject: Subject, audit: Audit, num_experts: int, *, method: Method = "prune", by: Criterion = "output"
) -> Compression:
    """Leave so many experts in each MoE layer of a model, in place.

    `prune` removes the experts of the lowest scores, and their rows of the gate. `merge` (as M-SMoE, Li et al. 2024,
    https://arxiv.org/abs/2310.01334) averages each of them into the expert that is left and most often selected
    together with it (without co-activation, the one of the most similar gate row), by load, after its hidden units
    were brought into that expert's order; the gate keeps the row of the expert that is left. The number is the same
    in all layers, so that the model can be saved and built again.

    Args:
        subject: the audited model, with data to measure the loss on; another part of the data than the audit's says
            more.
        audit: of that model.
        num_experts: how many are left.
        method: prune or merge.
        by: the score: `load`, how often an expert is selected, or `output`, the sum of its outputs' norms.

    Raises:
        UserError: fewer experts than the router selects, or none to leave out; a router or experts that cannot be cut.
            The model is then as it was.
    """
    layers = list(moe_layers(subject.net))
    if method not in ("prune", "merge") or by not in ("load", "output"):
        raise UserError(f"method must be prune or merge, and by load or output, got {method!r} and {by!r}")
    sizes, audited = [layer.num_experts for layer in layers], [layer.num_experts for layer in audit.layers]
    if sizes != audited:
        raise UserError(f"the audit is of layers of {audited} experts, the model's have {sizes}: audit it again")
    for measured in audit.layers:
        _check_number(measured.index, measured.num_experts, measured.top_k, num_experts)
    check(subject.net, num_experts, method)
    kept = [_kept(measured, num_experts, by) for measured in audit.layers]
    routers = [_cut_router(layer, ids, index) for index, (layer, ids) in enumerate(zip(layers, kept, strict=True))]
    before = _loss(subject)
    parameters_before = sum(p.numel() for p in subject.net.parameters())
    merged_into = []
    for layer, router, ids, measured in zip(layers, routers, kept, audit.layers, strict=True):
        partners = _partners(measured, ids, inner_router(layer)) if method == "merge" else {}
        if partners:
            _merge(layer.experts, partners, measured.relative_load)
        _cut_experts(layer, router, ids)
        merged_into.append(partners)
    _tell(subject.net, num_experts)
    after = sum(p.numel() for p in subject.net.parameters())
    return Compression(before, _loss(subject), parameters_before, after, kept, merged_into)


def check(net: nn.Module, num_experts: int, method: Method) -> None:
    """Check that so many experts can be left in each MoE layer of a model.

    Raises:
        UserError: they cannot.
    """
    for index, layer in enumerate(moe_layers(net)):
        _check_number(index, layer.num_experts, getattr(inner_router(layer), "top_k", 1), num_experts)
        _cut_router(layer, range(num_experts), index)
        _check_experts(layer, index, method)


def _check_number(index: int, num_experts: int, top_k: int, left: int) -> None:
    if not isinstance(left, int):
        raise UserError(f"num_experts is one number for all layers, so that the model can be built again, got {left!r}")
    if not max(top_k, 1) <= left < num_experts:
        raise UserError(
            f"num_experts must be at least k = {max(top_k, 1)} and below the {num_experts} of MoE layer {index}, got "
            f"{left}"
        )


def _kept(layer: LayerAudit, num_experts: int, by: Criterion) -> list[int]:
    scores = list(layer.relative_load)
    if by == "output":
        if layer.relative_output_norms is None:
            raise UserError(f"outputs of MoE layer {layer.index} were not seen: take by='load'")
        scores = [load * (norm or 0.0) for load, norm in zip(scores, layer.relative_output_norms, strict=True)]
    order = sorted(range(layer.num_experts), key=lambda expert: -scores[expert])
    return sorted(order[:num_experts])


def _cut_router(layer: MoE, kept: Sequence[int], index: int) -> Router:
    """Return a copy of a router that selects among some experts alone, by the logits that these have now."""
    router, num_experts = inner_router(layer), layer.num_experts
    name = type(router).__name__
    if not isinstance(router, LogitRouter) or router is not layer.router:
        raise UserError(f"MoE layer {index}: {name} is no LogitRouter by itself, whose experts could be left out")
    if getattr(router, "num_groups", 1) not in (None, 1):
        raise UserError(f"MoE layer {index}: {name} selects groups of experts, which must stay whole")
    cut = copy.deepcopy(router)
    ids_K = torch.tensor(kept)
    for tensors in (dict(cut.named_parameters()), dict(cut.named_buffers())):
        for path, tensor in tensors.items():
            if tensor.ndim and tensor.shape[0] == num_experts:
                owner, _, attribute = path.rpartition(".")
                part = tensor.detach().index_select(0, ids_K.to(tensor.device))
                if isinstance(tensor, nn.Parameter):
                    part = nn.Parameter(part, tensor.requires_grad)
                setattr(cut.get_submodule(owner), attribute, part)
    cut.spec = replace(router.spec, num_experts=len(kept))
    cut.max_top_k = min(router.max_top_k, len(kept))
    device = next((t.device for t in router.parameters()), torch.device("cpu"))
    x_TD = torch.randn(16, router.spec.d_model, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        whole_TE, part_TE = (r.eval().logits(x_TD, RoutingContext()) for r in (copy.deepcopy(router), cut))
        equal = torch.allclose(part_TE, whole_TE[:, ids_K.to(device)], rtol=1e-4, atol=1e-5)
    except Exception:  # whatever a router needs beside hidden states, or a shape that does not fit
        equal = False
    if not equal:
        raise UserError(f"MoE layer {index}: the gate of {name} cannot be cut expert by expert")
    return cut.train(router.training)


def _check_experts(layer: MoE, index: int, method: Method) -> None:
    experts = layer.experts
    stacked = all(p.ndim and p.shape[0] == layer.num_experts for p in experts.parameters())
    if layer.mesh is not None or not stacked or any(type(p) is not nn.Parameter for p in experts.parameters()):
        raise UserError(f"MoE layer {index}: the weights of its experts are not stacked in one place")
    if method == "merge" and not isinstance(experts, TwoLayerExperts):
        raise UserError(
            f"MoE layer {index}: the order of hidden units of {type(experts).__name__} is not known: take "
            "method='prune'"
        )


def _cut_experts(layer: MoE, router: Router, kept: Sequence[int]) -> None:
    # A parameter at a time, so that experts are never held twice.
    for name, parameter in list(layer.experts.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        part = parameter.detach().index_select(0, torch.tensor(kept, device=parameter.device))
        setattr(layer.experts.get_submodule(owner), attribute, nn.Parameter(part, parameter.requires_grad))
    layer.router, layer.num_experts = router, len(kept)
    layer.spec = replace(layer.spec, num_experts=len(kept))
    layer.experts.spec = replace(layer.experts.spec, num_experts=len(kept))


def _partners(layer: LayerAudit, kept: Sequence[int], router: Any) -> dict[int, int]:
    """Return which of the kept experts each of the others is merged into."""
    similar_EE = None if layer.together_EE is None else layer.together_EE.clone()
    if similar_EE is None or layer.top_k < 2:
        rows_ED = attrgetter(router.gate_name)(router).detach().float().flatten(1)
        similar_EE = torch.nn.functional.normalize(rows_ED, dim=1).cpu()
        similar_EE = similar_EE @ similar_EE.T
    gone = [expert for expert in range(layer.num_experts) if expert not in kept]
    ids_K = torch.tensor(kept)
    return {expert: int(ids_K[similar_EE[expert, ids_K].argmax()]) for expert in gone}


def _merge(experts: Experts, partners: dict[int, int], load: Sequence[float]) -> None:
    assert isinstance(experts, TwoLayerExperts)  # as checked
    for target in sorted(set(partners.values())):
        members = [expert for expert, into in partners.items() if into == target]
        total = load[target] + sum(load[expert] for expert in members)
        if total == 0:  # nobody selects any of them
            continue
        network = experts.network()
        halves = network.up.shape[1] // network.down.shape[2]
        orders = {expert: _order(network, expert, target, halves) for expert in members}
        for tensor, axis in ((network.up, 0), (network.up_bias, 0), (network.down, 1), (network.down_bias, None)):
            if tensor is None:
                continue
            mean = tensor[target].float() * (load[target] / total)
            for expert, order_H in orders.items():
                mean += _permuted(tensor[expert].float(), axis, order_H, halves) * (load[expert] / total)
            tensor[target] = mean.to(tensor.dtype)


def _order(network: Any, expert: int, target: int, halves: int) -> Tensor:
    """Return the hidden units of an expert in the order of those of another that they resemble most."""
    one_HF, other_HF = (_units(network, index, halves) for index in (target, expert))
    rows, columns = linear_sum_assignment((one_HF @ other_HF.T).cpu().numpy(), maximize=True)
    assert len(rows) == len(columns)
    return torch.from_numpy(columns).to(network.up.device)


def _units(network: Any, expert: int, halves: int) -> Tensor:
    hidden_dim = network.down.shape[2]
    up_HF = network.up[expert].float().view(halves, hidden_dim, -1).transpose(0, 1).flatten(1)
    return torch.cat([up_HF, network.down[expert].float().T], dim=1)


def _permuted(tensor: Tensor, axis: int | None, order_H: Tensor, halves: int) -> Tensor:
    if axis is None:
        return tensor
    if axis == 1:
        return tensor.index_select(1, order_H)
    return tensor.view(halves, len(order_H), -1)[:, order_H].reshape(tensor.shape)


def _loss(subject: Subject) -> float | None:
    with evaluating(subject.net), torch.inference_mode():
        losses = [subject.losses(batch) for batch in subject.batches]
    return None if losses[0] is None else mean_loss(losses)


def _tell(net: Any, num_experts: int) -> None:
    """Let what a model is built from again know how many experts are left."""
    config = getattr(net, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        changes = (getattr(config, "routing", None) or {}).get("changes", [])
        for holder in (config.get_text_config(), config):
            for name in CONFIG_NAMES:
                if isinstance(getattr(holder, name, None), int):
                    setattr(holder, name, num_experts)
        for change in changes:
            if "num_experts" in change:
                change["num_experts"] = num_experts
    hparams = getattr(net, "hparams", {})
    if "num_experts" in hparams:
        hparams["num_experts"] = num_experts
