"""8-bit weights of experts, and what a quantizer must leave alone."""
# Shape suffixes: E experts, O output width, I input width.

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from routerzoo.moe.layer import moe_layers


def modules_to_skip(model: nn.Module) -> list[str]:
    """Return the names of what decides where tokens go: routers, and the gates of shared experts.

    Rounding them changes which experts are chosen, and they are small. The list is what quantizers of transformers call
    `modules_to_not_convert` or `llm_int8_skip_modules`; for `torchao.quantize_`, let `filter_fn` refuse these names and
    those below them.

    Args:
        model: any model with MoE layers.
    """
    return sorted(_skipped(model))


def _skipped(model: nn.Module) -> Iterator[str]:
    gates = {part for layer in moe_layers(model) for part in (layer.router, layer.shared_gate) if part is not None}
    for name, module in model.named_modules():
        # In a released model the shared expert, with its gate, stays outside of our layer.
        if module in gates or name.endswith(".shared_expert_gate"):
            yield name


class _Int8(nn.Module):
    """Weights as integers from -127 to 127, and a scale for each row."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, codes_EOI: Tensor, scales_EO1: Tensor) -> Tensor:
        return (codes_EOI * scales_EO1).to(self.dtype)

    def right_inverse(self, weight_EOI: Tensor) -> tuple[Tensor, Tensor]:
        wide_EOI = weight_EOI.float()
        # A row of zeros has any scale.
        scales_EO1 = (wide_EOI.abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        return (wide_EOI / scales_EO1).round().to(torch.int8), scales_EO1


@torch.no_grad()
def quantize_experts(model: nn.Module) -> None:
    """Keep the weights of all experts in 8 bits, with a scale for each row, in place; for inference.

    Weights are rounded symmetrically, by at most half of 1/127 of the largest in their row, and widened while a layer
    computes. Routers stay as they are. The weights are frozen; save the model before, since neither
    `from_pretrained` nor a task knows the integers.

    Args:
        model: any model with MoE layers.

    Raises:
        ValueError: no MoE layer, or experts that are on the meta device, sharded, adapted or quantized already.
    """
    layers = list(moe_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MoE layer whose experts could be quantized")
    banks = [bank for layer in layers for bank in (layer.experts, layer.shared_experts) if bank is not None]
    for bank in banks:
        strange = [
            name for name, p in bank.named_parameters() if p.is_meta or type(p) is not nn.Parameter or "." in name
        ]
        if strange:
            raise ValueError(
                f"{strange[0]} of {type(bank).__name__} is offloaded, sharded, adapted or quantized already: load it "
                "whole and merge adapters first"
            )
    for bank in banks:
        for name, weight in list(bank.named_parameters()):
            weight.requires_grad_(False)
            if weight.ndim == 3:
                parametrize.register_parametrization(bank, name, _Int8(weight.dtype), unsafe=True)
