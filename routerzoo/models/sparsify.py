"""`sparsify`: dense feed-forward networks of any model become MoE layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from routerzoo.models.blocks import MoEBlocks, moe_block_indices
from routerzoo.models.missing_weights import initialize_missing_weights
from routerzoo.moe.experts import ACTIVATIONS, Activation, MLPExperts, SwiGLUExperts, gate_up_down
from routerzoo.moe.grouped_linear import Backend
from routerzoo.moe.layer import ExpertsFactory, MoE, RouterFactory, moe_layers
from routerzoo.routing import LayerSpec

M = TypeVar("M", bound=nn.Module)

# Names of the linear layers (first into the hidden units, last out of them) that make a feed-forward network.
_MLP = ("fc1", "fc2")
_GATED = [("fc1_g", "fc1_x", "fc2"), ("gate_proj", "up_proj", "down_proj")]


def is_feed_forward(module: nn.Module) -> bool:
    """Whether a module is a feed-forward network as timm or transformers write it."""
    return any(all(isinstance(getattr(module, name, None), nn.Linear) for name in names) for names in (_MLP, *_GATED))


def sparsify(
    model: M,
    *,
    num_experts: int,
    router: str | RouterFactory = "LinearRouter",
    experts: str | ExpertsFactory | None = None,
    blocks: MoEBlocks = "every-other",
    upcycle: bool = False,
    num_shared_experts: int = 0,
    match: Callable[[nn.Module], bool] = is_feed_forward,
    provides: frozenset[str] = frozenset(),
    vocab_size: int | None = None,
    num_positions: int | None = None,
    decoder: bool = False,
    backend: Backend = "auto",
) -> M:
    """Replace dense feed-forward networks of a model by MoE layers, in place.

    Args:
        model: any module with feed-forward networks as submodules.
        num_experts: experts per layer.
        router: name of a router, or a function that builds one from a `LayerSpec`.
        experts: a function that builds the experts from a `LayerSpec`. By default those of the same shape, activation
            and biases as the dense network.
        blocks: which of the feed-forward networks found, in the order of the model.
        upcycle: start every expert from the dense network's weights (Komatsuzaki et al. 2023,
            https://arxiv.org/abs/2212.05055). Where the combine weights sum to 1, the model's output stays the same.
        num_shared_experts: experts per layer that see every token.
        match: tells what is a feed-forward network.
        provides: the context fields that you will provide with `routerzoo.provide_context`, for routers that
            require any.
        vocab_size: number of token ids, where you provide them.
        num_positions: longest sequence.
        decoder: refuse routers that are not causal.
        backend: see `routerzoo.grouped_linear`.

    Returns:
        The model.

    Raises:
        ValueError: no feed-forward network found, or blocks that do not exist.
        UnmetRequirementError: the router requires a field that is not provided.

    Example:
        >>> import timm
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=4)
        >>> model = sparsify(model, num_experts=4, router="HyperRouter")
        >>> [layer.spec.layer for layer in moe_layers(model)]
        [0, 1]
    """
    found = [name for name, module in model.named_modules() if match(module)]
    if not found:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        raise ValueError(
            f"no feed-forward network found in {type(model).__name__}, which consists of {', '.join(kinds)}; "
            "pass match=, a function that tells one"
        )
    chosen = moe_block_indices(blocks, len(found))
    numbered = sum(1 for _ in moe_layers(model))
    for layer, index in enumerate(chosen, start=numbered):
        dense = model.get_submodule(found[index])
        d_model, hidden_dim = _widths(dense)
        spec = LayerSpec(
            d_model,
            num_experts,
            layer=layer,
            num_layers=numbered + len(chosen),
            vocab_size=vocab_size,
            num_positions=num_positions,
            hidden_dim=hidden_dim,
            provides=provides,
            decoder=decoder,
        )
        moe = MoE(
            spec,
            router,
            experts if experts is not None else _same_experts(dense),
            num_shared_experts=num_shared_experts,
            backend=backend,
        )
        if upcycle:
            moe.experts.upcycle_from(dense)
        weight = next(dense.parameters())
        parent, _, name = found[index].rpartition(".")
        setattr(
            model.get_submodule(parent), name, moe.to(device=weight.device, dtype=weight.dtype).train(dense.training)
        )
    initialize_missing_weights(model)
    return model


def _widths(dense: nn.Module) -> tuple[int, int]:
    """Return the model width and the hidden width of a feed-forward network."""
    linears = [module for module in dense.modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError(f"{type(dense).__name__} has no linear layer to take its width from")
    return linears[0].in_features, linears[-1].in_features


def _same_experts(dense: nn.Module) -> ExpertsFactory:
    function = getattr(dense, "act", getattr(dense, "act_fn", None))
    try:
        gate, _, _ = gate_up_down(dense)
    except NotImplementedError:
        first = getattr(dense, "fc1", None)
        bias = first is None or first.bias is not None
        return partial(MLPExperts, activation=_activation(function, "gelu"), bias=bias)
    return partial(SwiGLUExperts, activation=_activation(function, "silu"), bias=gate.bias is not None)


def _activation(function: Any, default: Activation) -> Activation:
    if not callable(function):
        return default
    probe = torch.linspace(-3, 3, 13)
    for name, known in ACTIVATIONS.items():
        if torch.allclose(function(probe), known(probe), atol=1e-5):
            return name
    raise ValueError(f"no experts with the activation {function} are built in; pass experts=")
