"""The context of a forward pass, from the inputs of a model of transformers."""
# Shape suffixes: B sequences, S tokens of a sequence in this pass.

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from routerzoo.moe.layer import inner_router, moe_layers
from routerzoo.routing import RoutingContext


class ContextOfInputs:
    """Builds a `RoutingContext` from what a model of transformers is called with, for a `ContextHook`.

    Token ids, positions, sequences and padding, of models of text; nothing of others, nor of encoder-decoders, whose
    layers see two texts. While a cache is in use, a pass sees the newest tokens alone, none of which is padding.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = list(inspect.signature(model.forward).parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> RoutingContext:
        """Build the context.

        Raises:
            ValueError: a router that looks at other tokens of a sequence, while a cache holds them back; a model that
                hands tokens on in chunks.
        """
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        ids_BS, embedded = given.get("input_ids"), given.get("inputs_embeds")
        tokens: Tensor | None = embedded if ids_BS is None else ids_BS
        config: Any = self.model.config
        if tokens is None or config.get_text_config().is_encoder_decoder:
            return RoutingContext(compute_aux_losses=self.model.training)
        if getattr(config, "chunk_size_feed_forward", 0):
            raise ValueError("MoE layers see all tokens at once: set chunk_size_feed_forward of the config to 0")
        num_sequences, length = tokens.shape[:2]
        mask, cache = given.get("attention_mask"), given.get("cache", given.get("past_key_values"))
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        past = mask.shape[1] - length if mask is not None else 0 if cache is None else int(cache.get_seq_length())
        if past > 0:
            self._check_tokenwise()
        positions_BS = given.get("position_ids")
        if positions_BS is None or positions_BS.ndim != 2:
            counted = torch.arange(past, past + length, device=tokens.device).expand(num_sequences, -1)
            positions_BS = counted if mask is None else (mask.long().cumsum(-1) - 1).clamp_min(0)[:, past:]
        return RoutingContext(
            token_ids=ids_BS,
            positions=positions_BS.expand(num_sequences, -1),
            sequence_ids=torch.arange(num_sequences, device=tokens.device).unsqueeze(1).expand(-1, length),
            padding_mask=None if mask is None or past > 0 else mask == 0,
            compute_aux_losses=self.model.training,
        )

    def _check_tokenwise(self) -> None:
        for layer in moe_layers(self.model):
            router = inner_router(layer)
            if not router.properties.tokenwise:
                raise ValueError(
                    f"{type(router).__name__} looks at other tokens of a sequence, which a cache holds back: generate "
                    "with use_cache=False"
                )
