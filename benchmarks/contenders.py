"""What `layer.py` measures: our layer with each backend, two floors, and peers.

Each builder returns a module that maps `[tokens, d]` to `[tokens, d]`, in the dtype asked for. A peer that is not
installed, or that cannot do a setting, raises `Unavailable` with the reason.
"""
# Shape suffixes: T tokens, D model width, H hidden width, E experts, K choices per token, C tokens of an expert.

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routerzoo import LinearRouter, MLPExperts, MoE, SwiGLUExperts

# transformers' batched_mm gathers an expert's weights for every token.
LARGEST_COPY_GIB = 2.0


class Unavailable(Exception):
    """This contender cannot run here."""


@dataclass(frozen=True)
class Setting:
    """One point of the grid.

    Args:
        tokens: T.
        d_model: D.
        num_experts: E.
        top_k: K.
        experts: `mlp` (4 D hidden units, GELU) or `swiglu` (8/3 D, as many operations).
        dtype: of weights and hidden states.
        device: where it runs.
        hidden_dim: hidden units of an expert, instead of those.
    """

    tokens: int
    d_model: int
    num_experts: int
    top_k: int
    experts: str
    dtype: str
    device: str
    hidden_dim: int | None = None

    @property
    def hidden(self) -> int:
        """Hidden units of an expert."""
        if self.hidden_dim is not None:
            return self.hidden_dim
        return 4 * self.d_model if self.experts == "mlp" else -(-8 * self.d_model // 24) * 8


class DenseFloor(nn.Module):
    """T * K tokens through one dense network: no router, no dispatch."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        d, h, self.setting = setting.d_model, setting.hidden, setting
        self.up = nn.Linear(d, h if setting.experts == "mlp" else 2 * h, bias=False)
        self.down = nn.Linear(h, d, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Repeat the tokens K times; the sum back is part of the work of no layer."""
        rows = x_TD.repeat(self.setting.top_k, 1)
        y: Tensor = self.down(_activated(self.up(rows), self.setting))
        return y[: len(x_TD)] if self.setting.top_k == 1 else y.view(self.setting.top_k, *x_TD.shape).sum(0)


class ExpertFloor(nn.Module):
    """E experts with exactly T * K / E tokens each, as one batched product: no router, no dispatch."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        experts, d, h, self.setting = setting.num_experts, setting.d_model, setting.hidden, setting
        self.up = nn.Parameter(torch.randn(experts, d, h if setting.experts == "mlp" else 2 * h) * d**-0.5)
        self.down = nn.Parameter(torch.randn(experts, h, d) * h**-0.5)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Take the tokens as they come."""
        rows_ECD = x_TD.repeat(self.setting.top_k, 1).view(self.setting.num_experts, -1, x_TD.shape[1])
        y_ECD = torch.bmm(_activated(torch.bmm(rows_ECD, self.up), self.setting), self.down)
        y = y_ECD.view(self.setting.top_k, *x_TD.shape)
        return y[0] if self.setting.top_k == 1 else y.sum(0)


def _activated(hidden: Tensor, setting: Setting) -> Tensor:
    if setting.experts == "mlp":
        return F.gelu(hidden)
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up


def ours(setting: Setting, backend: str = "auto", router: Any = None, low_memory: bool | None = None) -> MoE:
    """Our layer, without losses: the peers' are measured without theirs, or have none."""
    bank = MLPExperts if setting.experts == "mlp" else SwiGLUExperts
    experts = partial(bank, hidden_dim=setting.hidden, bias=False)
    router = router or partial(LinearRouter, top_k=setting.top_k)
    sizes = {"d_model": setting.d_model, "num_experts": setting.num_experts}
    return MoE(router=router, experts=experts, backend=backend, low_memory=low_memory, **sizes)  # type: ignore[arg-type]


def compiled(setting: Setting) -> nn.Module:
    """Our layer, compiled into one graph."""
    if setting.device != "cuda":
        raise Unavailable("for GPUs")
    layer: nn.Module = torch.compile(ours(setting), fullgraph=True)  # type: ignore[assignment]
    return layer


class CudaGraph(nn.Module):
    """Our layer, forward and backward recorded once and replayed: nothing in it may wait for the device."""

    def __init__(self, setting: Setting) -> None:
        if setting.device != "cuda":
            raise Unavailable("for GPUs")
        super().__init__()
        self.layer = ours(setting)
        self.replay: Callable[[Tensor], Tensor] | None = None

    def forward(self, x_TD: Tensor) -> Tensor:
        """Record on the first call."""
        if self.replay is None:
            self.replay = torch.cuda.make_graphed_callables(self.layer, (x_TD.detach().clone().requires_grad_(),))
        return self.replay(x_TD)


def mixtral(setting: Setting, implementation: str) -> nn.Module:
    """The Mixtral block of transformers."""
    if setting.experts != "swiglu":
        raise Unavailable("has gated experts only")
    copies = setting.tokens * setting.top_k * 3 * setting.d_model * setting.hidden * 4 / 2**30
    if implementation == "batched_mm" and copies > LARGEST_COPY_GIB:
        raise Unavailable(f"would copy {copies:.0f} GiB of weights")
    try:
        from transformers.models.mixtral.configuration_mixtral import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError as error:
        raise Unavailable("transformers is not installed") from error
    config = MixtralConfig(
        hidden_size=setting.d_model,
        intermediate_size=setting.hidden,
        num_local_experts=setting.num_experts,
        num_experts_per_tok=setting.top_k,
    )
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return _Batched(block)


class Liger(nn.Module):
    """liger-kernel's fused experts behind our router: its weights are laid out as ours."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        from liger_kernel.ops import LigerFusedMoEFunction

        self.layer, self.function = ours(setting), LigerFusedMoEFunction

    def forward(self, x_TD: Tensor) -> Tensor:
        """Route, and let it do the rest."""
        routing, experts = self.layer.router(x_TD), self.layer.experts
        y: Tensor = self.function.apply(
            x_TD, experts.gate_up, experts.down, routing.experts_TK.int(), routing.weights_TK
        )
        return y


def liger(setting: Setting) -> nn.Module:
    """The fused layer of liger-kernel."""
    if setting.experts != "swiglu" or setting.device != "cuda":
        raise Unavailable("has gated experts on GPUs only")
    try:
        return Liger(setting)
    except ImportError as error:
        raise Unavailable(f"liger-kernel is not usable: {error}") from error


def titan(setting: Setting) -> nn.Module:
    """Torchtitan's layer, which computes in bfloat16 whatever it is given."""
    if setting.experts != "swiglu":
        raise Unavailable("has gated experts only")
    try:
        from torchtitan.models.common.linear import Linear
        from torchtitan.models.common.moe import GroupedExperts, RoutedExperts, TokenChoiceTopKRouter
        from torchtitan.models.common.moe import MoE as TitanMoE
        from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher
    except ImportError as error:
        raise Unavailable(f"torchtitan is not usable: {error}") from error
    sizes = {"num_experts": setting.num_experts}
    config = TitanMoE.Config(
        num_experts=setting.num_experts,
        routed_experts=RoutedExperts.Config(
            inner_experts=GroupedExperts.Config(dim=setting.d_model, hidden_dim=setting.hidden, **sizes),
            token_dispatcher=LocalTokenDispatcher.Config(top_k=setting.top_k, **sizes),
        ),
        router=TokenChoiceTopKRouter.Config(
            gate=Linear.Config(in_features=setting.d_model, out_features=setting.num_experts, bias=False),
            top_k=setting.top_k,
            score_func="softmax",
            route_norm=True,
            **sizes,
        ),
        load_balance_coeff=None,
    )
    layer = config.build()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    return _Batched(layer)


def st_moe(setting: Setting) -> nn.Module:
    """st-moe-pytorch, with room for every token; it drops none then, and pads."""
    if setting.experts != "mlp" or setting.top_k < 2:
        raise Unavailable("has ungated experts and k of at least 2 only")
    try:
        from st_moe_pytorch import MoE as StMoE
    except ImportError as error:
        raise Unavailable("st-moe-pytorch is not installed") from error
    layer = StMoE(
        dim=setting.d_model,
        num_experts=setting.num_experts,
        gating_top_n=setting.top_k,
        # Its capacity leaves k out, so that this is 1.25 for each of the k choices.
        capacity_factor_train=1.25 * setting.top_k,
        threshold_train=0.0,
    )
    return _First(_Batched(layer))


def deepspeed(setting: Setting) -> nn.Module:
    """DeepSpeed's layer without dropping tokens."""
    with contextlib.redirect_stdout(io.StringIO()):
        os.environ.setdefault("DS_ACCELERATOR", "cpu" if setting.device == "cpu" else "cuda")
        try:
            from deepspeed.moe.layer import MoE as DeepSpeedMoE
            from deepspeed.utils import logger
        except ImportError as error:
            raise Unavailable(f"deepspeed is not usable: {error}") from error
        logger.setLevel(logging.ERROR)
    d, h = setting.d_model, setting.hidden

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(d, 2 * h, bias=False), nn.Linear(h, d, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down(_activated(self.up(x), setting))
            return y

    mlp = nn.Sequential(nn.Linear(d, h, bias=False), nn.GELU(), nn.Linear(h, d, bias=False))
    layer = DeepSpeedMoE(
        d,
        mlp if setting.experts == "mlp" else Gated(),
        num_experts=setting.num_experts,
        k=setting.top_k,
        drop_tokens=False,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    return _First(layer)


class _Batched(nn.Module):
    """Gives a layer one sequence, where it wants `[batch, sequence, d]`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_TD: Tensor) -> Any:
        y = self.layer(x_TD.unsqueeze(0))
        return y.squeeze(0) if isinstance(y, Tensor) else (y[0].squeeze(0), *y[1:])


class _First(nn.Module):
    """Takes the output alone of a layer that gives losses too."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_TD: Tensor) -> Tensor:
        y: Tensor = self.layer(x_TD)[0]
        return y


FLOORS: dict[str, Callable[[Setting], nn.Module]] = {"active floor": DenseFloor, "expert floor": ExpertFloor}
OURS: dict[str, Callable[[Setting], nn.Module]] = {
    "routerzoo": ours,
    "routerzoo grouped": partial(ours, backend="grouped"),
    "routerzoo loop": partial(ours, backend="loop"),
    "routerzoo low memory": partial(ours, low_memory=True),
    "routerzoo compiled": compiled,
    "routerzoo CUDA graph": CudaGraph,
}
PEERS: dict[str, Callable[[Setting], nn.Module]] = {
    "transformers grouped_mm": partial(mixtral, implementation="grouped_mm"),
    "transformers eager": partial(mixtral, implementation="eager"),
    "transformers batched_mm": partial(mixtral, implementation="batched_mm"),
    "liger": liger,
    "torchtitan (bf16)": titan,
    "st-moe-pytorch": st_moe,
    "deepspeed dropless": deepspeed,
}
