"""A language model of our own tasks as a model of transformers."""
# Shape suffixes: W experts that a dense network is as wide as, Z hidden units and their gates, D model width.

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from routerzoo.errors import UserError
from routerzoo.hf.modeling import check_weights, config_class, model_class
from routerzoo.hf.recipe import described
from routerzoo.models.decoder import Decoder, DenseFeedForward
from routerzoo.moe.experts import SwiGLUExperts
from routerzoo.moe.layer import MoE, inner_router
from routerzoo.registry import router_arguments

_NAMES = {
    "attention_norm.": "input_layernorm.",
    "feed_forward_norm.": "post_attention_layernorm.",
    "attention.out.": "self_attn.o_proj.",
    "feed_forward.": "mlp.",
}


@torch.no_grad()
def from_decoder(source: nn.Module) -> Any:
    """Return a copy of a `Decoder` as a Llama with MoE layers, which saves, generates and goes out as others do.

    Its blocks are Llama's: RMSNorm, rotary positions, no biases. With `SwiGLUExperts` and a linear gate whose weights
    sum to 1 in all blocks, `to_transformers` makes it a Mixtral.

    Args:
        source: a `Decoder`, or the task around it, such as `LanguageModeling`; of a compiled one the original.

    Raises:
        UserError: another model, routers that need more than a model of transformers tells them, or dense blocks that
            Llama has not.
    """
    decoder = getattr(source, "net", source)
    if not isinstance(decoder, Decoder):
        raise UserError(
            f"from_decoder takes a Decoder, or LanguageModeling around one, got {type(decoder).__name__}: other models "
            "have no class in transformers"
        )
    check_weights(decoder)
    layers = {index: block.feed_forward for index, block in enumerate(decoder.blocks)}
    moe = {index: layer for index, layer in layers.items() if isinstance(layer, MoE)}
    dense = {index: layer for index, layer in layers.items() if isinstance(layer, DenseFeedForward)}
    if not moe:
        raise UserError("the model has no MoE layer: there is nothing of routerzoo's in it")
    first = next(iter(moe.values()))
    width = _dense_width(dense)
    config = config_class(LlamaConfig)(
        vocab_size=decoder.embedding.num_embeddings,
        hidden_size=decoder.embedding.embedding_dim,
        intermediate_size=width or 4 * decoder.embedding.embedding_dim,  # of networks that experts replace
        num_hidden_layers=len(layers),
        num_attention_heads=decoder.blocks[0].attention.num_heads,  # type: ignore[union-attr]
        max_position_embeddings=decoder.max_length,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": decoder.rotary_base},
        tie_word_embeddings=decoder.head.weight is decoder.embedding.weight,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        routing={"model_type": "llama", "changes": [_change(first, list(moe))]},
    )
    model = model_class(LlamaForCausalLM, type(config))(config)
    found = model.load_state_dict(dict(_renamed(decoder)), strict=False)
    lost = {*found.missing_keys, *found.unexpected_keys} - {"lm_head.weight"}  # tied weights are named once
    if lost:
        raise UserError(f"a Llama with MoE layers has no place for {min(lost)}")
    return model.to(device=decoder.embedding.weight.device, dtype=decoder.embedding.weight.dtype).train(source.training)


def _change(layer: MoE, blocks: list[int]) -> dict[str, Any]:
    """Return the change that gives a Llama these layers."""
    router, experts = inner_router(layer), layer.experts
    given = dict(router._built_with[1])
    if "top_k" in router_arguments(type(router)):
        given["top_k"] = router.top_k
    bank = {**experts._built_with[1], "hidden_dim": getattr(experts, "hidden_dim", None)}
    return {
        "change": "sparsify",
        "num_experts": layer.num_experts,
        "router": described(partial(type(router), **given)),
        "experts": described(partial(type(experts), **bank)),
        "blocks": blocks,
        "num_shared_experts": layer.num_shared_experts,
    }


def _dense_width(dense: dict[int, DenseFeedForward]) -> int | None:
    widths = []
    for index, layer in dense.items():
        experts = layer.experts
        if not isinstance(experts, SwiGLUExperts) or experts.gate_up_bias is not None or experts.activation != "silu":
            raise UserError(
                f"block {index} has a dense network that Llama has not: train with experts=SwiGLUExperts, or with "
                "moe_blocks='all'"
            )
        widths.append(layer.width * experts.hidden_dim)
    return widths[0] if widths else None


def _renamed(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    tops = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    for name, value in decoder.state_dict().items():
        if not name.startswith("blocks."):
            yield tops.get(name, "lm_head.weight"), value
            continue
        _, index, rest = name.split(".", 2)
        layer = f"model.layers.{index}."
        block: Any = decoder.blocks[int(index)]
        if rest == "attention.qkv.weight":
            for part, projection in zip(value.chunk(3), "qkv", strict=True):
                yield f"{layer}self_attn.{projection}_proj.weight", part
        elif isinstance(block.feed_forward, DenseFeedForward) and rest.startswith("feed_forward."):
            if rest.endswith("down"):
                yield f"{layer}mlp.down_proj.weight", value.transpose(0, 1).flatten(1)
            else:
                gate_WZD, up_WZD = value.chunk(2, dim=1)
                yield f"{layer}mlp.gate_proj.weight", gate_WZD.flatten(0, 1)
                yield f"{layer}mlp.up_proj.weight", up_WZD.flatten(0, 1)
        else:
            ours = next(prefix for prefix in _NAMES if rest.startswith(prefix))
            yield layer + _NAMES[ours] + rest.removeprefix(ours), value
