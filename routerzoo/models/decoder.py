"""`Decoder`: a decoder-only Transformer with MoE feed-forward layers."""
# Shape suffixes: B sequences, S tokens of a sequence, D model width, H heads, F width of a head, V vocabulary.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from routerzoo.models.blocks import MoEBlocks, moe_block_indices
from routerzoo.moe.dispatch import dense_forward
from routerzoo.moe.experts import MLPExperts
from routerzoo.moe.grouped_linear import Backend
from routerzoo.moe.layer import ExpertsFactory, MoE, RouterFactory, inner_router, moe_layers
from routerzoo.routing import LayerSpec, RoutingContext

PROVIDED_CONTEXT = frozenset({"token_ids", "positions", "sequence_ids", "attention", "step", "total_steps"})


class KeyValues(NamedTuple):
    """Keys and values of the tokens that a block has seen, `[B, H, S, F]`."""

    keys: Tensor
    values: Tensor


class Rotation(NamedTuple):
    """Cosine and sine of each position's angles, `[S, F / 2]`."""

    cos: Tensor
    sin: Tensor


@final
class Attention(nn.Module):
    """Causal multi-head attention with rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864).

    Args:
        d_model: width of the hidden states.
        num_heads: number of heads.
        dropout: probability of dropping an attention weight in training.
    """

    def __init__(self, d_model: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        if d_model % (2 * num_heads):
            raise ValueError(
                f"d_model must be an even multiple of num_heads, so that positions rotate pairs of channels; "
                f"got d_model={d_model}, num_heads={num_heads}"
            )
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self,
        x_BSD: Tensor,
        rotation: Rotation,
        past: KeyValues | None,
        *,
        with_weights: bool = False,
        seen_B1SS: Tensor | None = None,
    ) -> tuple[Tensor, KeyValues, Tensor | None]:
        """Attend to this and earlier tokens.

        Args:
            x_BSD: hidden states.
            rotation: of the tokens' positions.
            past: keys and values of earlier tokens.
            with_weights: return the attention weights.
            seen_B1SS: True where a token may see another, instead of all that are not later.

        Returns:
            The output; the keys and values so far; and, where asked for, the attention weights before dropout,
            `[tokens, heads, keys]`.
        """
        qkv = self.qkv(x_BSD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        query, key = _rotate(query, rotation), _rotate(key, rotation)
        if past is not None:
            key, value = torch.cat([past.keys, key], dim=2), torch.cat([past.values, value], dim=2)
        # Without a past the mask is the usual triangle; a single new token sees everything.
        mask = seen_B1SS
        if past is not None and query.shape[2] > 1:
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device)
            mask = mask.tril(key.shape[2] - query.shape[2])
        y_BHSF = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=past is None and seen_B1SS is None,
        )
        weights = _attention_weights(query, key, seen_B1SS) if with_weights else None
        return self.out(y_BHSF.transpose(1, 2).flatten(2)), KeyValues(key, value), weights


def _attention_weights(query: Tensor, key: Tensor, seen: Tensor | None) -> Tensor:
    """Return the causal attention weights, float32 `[tokens, heads, keys]`, which the fused kernel keeps to itself."""
    scores = (query.float() @ key.float().mT) * query.shape[-1] ** -0.5
    if seen is None:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=key.device).tril(key.shape[2] - query.shape[2])
    weights: Tensor = scores.masked_fill(~seen, -torch.inf).softmax(-1).transpose(1, 2).flatten(0, 1)
    return weights


def _rotation(positions_S: Tensor, width: int, base: float) -> Rotation:
    # Not a buffer: `.bfloat16()` would round the frequencies.
    frequencies = base ** (-torch.arange(0, width, 2, device=positions_S.device, dtype=torch.float32) / width)
    angles_SF = torch.outer(positions_S.float(), frequencies)
    return Rotation(angles_SF.cos(), angles_SF.sin())


def _rotate(x_BHSF: Tensor, rotation: Rotation) -> Tensor:
    cos, sin = rotation.cos.to(x_BHSF.dtype), rotation.sin.to(x_BHSF.dtype)
    first, second = x_BHSF.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@final
class DenseFeedForward(nn.Module):
    """The feed-forward network of a block without MoE: as many experts as `width`, all of them always on.

    A dense network of `width` = k experts has the active parameters of a MoE layer that chooses k.

    Args:
        spec: sizes of the model's layers.
        experts: builds the experts.
        width: number of experts that the network is as wide as.
    """

    def __init__(self, spec: LayerSpec, experts: ExpertsFactory, width: int) -> None:
        super().__init__()
        self.width = width
        self.experts = experts(replace(spec, num_experts=width))

    def forward(self, x_BSD: Tensor, context: RoutingContext) -> Tensor:
        """Compute the sum of all experts."""
        return dense_forward(self.experts, x_BSD.flatten(0, -2), self.width).view(x_BSD.shape)


@final
class Block(nn.Module):
    """Pre-norm Transformer block: attention, then a feed-forward network, each around a residual path."""

    def __init__(
        self, d_model: int, attention: Attention, feed_forward: MoE | DenseFeedForward, dropout: float
    ) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(d_model, eps=1e-6)
        self.attention = attention
        self.feed_forward_norm = nn.RMSNorm(d_model, eps=1e-6)
        self.feed_forward = feed_forward
        self.dropout = dropout

    @property
    def reads_attention(self) -> bool:
        """Whether the router wants to see the attention weights."""
        return isinstance(self.feed_forward, MoE) and "attention" in inner_router(self.feed_forward).requires

    def forward(
        self,
        x_BSD: Tensor,
        rotation: Rotation,
        context: RoutingContext,
        past: KeyValues | None,
        seen_B1SS: Tensor | None = None,
    ) -> tuple[Tensor, KeyValues]:
        """Return the new hidden states and the attention's keys and values."""
        y_BSD, present, attention = self.attention(
            self.attention_norm(x_BSD), rotation, past, with_weights=self.reads_attention, seen_B1SS=seen_B1SS
        )
        if attention is not None:
            context = context.replace(attention=attention)
        x_BSD = x_BSD + F.dropout(y_BSD, self.dropout, self.training)
        y_BSD = self.feed_forward(self.feed_forward_norm(x_BSD), context)
        return x_BSD + F.dropout(y_BSD, self.dropout, self.training), present


@final
class Decoder(nn.Module):
    """Decoder-only Transformer language model.

    Pre-norm (RMSNorm), rotary positions, torch's scaled-dot-product attention; MoE feed-forward layers in chosen
    blocks. Its routers are given token ids, positions, sequence ids, the attention before them and the step; where
    `num_tasks` is set, the task of each sequence too.

    Args:
        vocab_size: number of token ids.
        router: builds the router of each MoE layer.
        experts: builds the experts of each MoE layer.
        num_experts: experts per MoE layer.
        num_shared_experts: experts per MoE layer that see every token.
        d_model: width of the hidden states.
        num_blocks: number of blocks.
        num_heads: attention heads.
        moe_blocks: which blocks have a MoE layer; see `routerzoo.models.blocks.moe_block_indices`.
        dense_width: width of the other blocks' feed-forward network, in experts.
        max_length: longest sequence.
        dropout: probability of dropping an attention weight, or a channel of a residual branch, in training.
        tie_weights: use the token embedding as the output layer.
        rotary_base: base of the rotary wavelengths.
        num_tasks: number of tasks that sequences come from, for routers that look at them.
        activation_checkpointing: keep only the blocks' inputs and compute the rest again in the backward pass.
        backend: see `routerzoo.grouped_linear`.
        allow_non_causal: accept routers that look at later tokens.

    Raises:
        UnmetRequirementError: a router requires what a decoder does not provide.
        NonCausalRouterError: a router is not causal.
        ValueError: sizes out of range.
    """

    def __init__(
        self,
        vocab_size: int,
        router: RouterFactory,
        experts: ExpertsFactory = MLPExperts,
        *,
        num_experts: int = 16,
        num_shared_experts: int = 0,
        d_model: int = 256,
        num_blocks: int = 4,
        num_heads: int = 8,
        moe_blocks: MoEBlocks = "all",
        dense_width: int = 1,
        max_length: int = 512,
        dropout: float = 0.0,
        tie_weights: bool = True,
        rotary_base: float = 10_000.0,
        num_tasks: int | None = None,
        activation_checkpointing: bool = False,
        backend: Backend = "auto",
        allow_non_causal: bool = False,
    ) -> None:
        super().__init__()
        for name, size in (("num_blocks", num_blocks), ("dense_width", dense_width), ("num_heads", num_heads)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.max_length, self.dropout = max_length, dropout
        self.head_width, self.rotary_base = d_model // num_heads, rotary_base
        self.activation_checkpointing = activation_checkpointing
        self.num_tasks = num_tasks
        chosen = moe_block_indices(moe_blocks, num_blocks)
        spec = LayerSpec(
            d_model,
            num_experts,
            num_layers=max(len(chosen), 1),
            vocab_size=vocab_size,
            num_positions=max_length,
            num_tasks=num_tasks,
            provides=PROVIDED_CONTEXT | ({"task_ids"} if num_tasks is not None else set()),
            decoder=True,
        )
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList()
        for index in range(num_blocks):
            feed_forward: MoE | DenseFeedForward
            if index in chosen:
                feed_forward = MoE(
                    replace(spec, layer=chosen.index(index)),
                    router,
                    experts,
                    num_shared_experts=num_shared_experts,
                    backend=backend,
                    allow_non_causal=allow_non_causal,
                )
            else:
                feed_forward = DenseFeedForward(spec, experts, dense_width)
            attention = Attention(d_model, num_heads, dropout)
            self.blocks.append(Block(d_model, attention, feed_forward, dropout))
        self.norm = nn.RMSNorm(d_model, eps=1e-6)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        # Routers have initial values of their own.
        own = {part for layer in moe_layers(self) for part in layer.router.modules()}
        for linear in (module for module in self.modules() if isinstance(module, nn.Linear) and module not in own):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.normal_(self.embedding.weight, std=0.02)
        for attention in (module for module in self.modules() if isinstance(module, Attention)):
            # Keeps the residual stream's variance from growing with depth (GPT-2).
            nn.init.normal_(attention.out.weight, std=0.02 * (2 * num_blocks) ** -0.5)
        if tie_weights:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        ids_BS: Tensor,
        *,
        padding_mask_BS: Tensor | None = None,
        task_ids_B: Tensor | None = None,
        step: int | None = None,
        total_steps: int | None = None,
        process_group: ProcessGroup | None = None,
        context: RoutingContext | None = None,
        sequence_ids_BS: Tensor | None = None,
        attend_across: bool = True,
    ) -> tuple[Tensor, RoutingContext]:
        """Return next-token logits `[B, S, V]`, and the context with the routing of every MoE layer.

        Args:
            ids_BS: token ids.
            padding_mask_BS: True where a token is padding; experts skip it.
            task_ids_B: the task of each sequence; by default the first one's.
            step: optimizer steps taken, where known.
            total_steps: optimizer steps that the run will take, where known.
            process_group: processes that train on parts of this batch; see `RoutingContext`.
            context: what routers may look at, one entry for each token, instead of what follows from the other
                arguments: for sequences packed from several tasks, say.
            sequence_ids_BS: the document of each token, where a row is packed from several, counted over the batch.
                Routers see it, and positions from the beginning of each.
            attend_across: whether attention crosses the boundaries of documents.
        """
        progress = (step, total_steps, process_group)
        x_BSD, context, _ = self._run(
            ids_BS,
            None,
            padding_mask_BS,
            task_ids_B,
            progress,
            context=context,
            sequence_ids_BS=sequence_ids_BS,
            attend_across=attend_across,
        )
        return self.head(x_BSD), context

    def hidden(
        self,
        ids_BS: Tensor,
        *,
        padding_mask_BS: Tensor | None = None,
        step: int | None = None,
        total_steps: int | None = None,
        process_group: ProcessGroup | None = None,
    ) -> tuple[Tensor, RoutingContext]:
        """Return what the output layer would read, `[B, S, D]`, and the context; arguments as in `forward`."""
        progress = (step, total_steps, process_group)
        x_BSD, context, _ = self._run(ids_BS, None, padding_mask_BS, None, progress)
        return x_BSD, context

    def _run(
        self,
        ids_BS: Tensor,
        past: list[KeyValues] | None,
        padding_mask_BS: Tensor | None = None,
        task_ids_B: Tensor | None = None,
        progress: tuple[int | None, int | None, ProcessGroup | None] = (None, None, None),
        seen: int = 0,
        cache: dict[Any, Any] | None = None,
        context: RoutingContext | None = None,
        sequence_ids_BS: Tensor | None = None,
        attend_across: bool = True,
    ) -> tuple[Tensor, RoutingContext, list[KeyValues]]:
        batch, length = ids_BS.shape
        positions_S = torch.arange(seen, seen + length, device=ids_BS.device)
        seen_B1SS = None
        # Attention only uses differences of positions; a router may have a table of them.
        positions_BS = positions_S.clamp_max(self.max_length - 1).expand(batch, length)
        if sequence_ids_BS is None:
            sequence_ids_BS = torch.arange(batch, device=ids_BS.device).unsqueeze(1).expand(batch, length)
        else:
            begins_BS = F.pad(sequence_ids_BS.diff(dim=1) != 0, (1, 0), value=True)
            positions_BS = positions_BS - (positions_BS * begins_BS).cummax(dim=1).values
            if not attend_across:
                same_BSS = sequence_ids_BS.unsqueeze(2) == sequence_ids_BS.unsqueeze(1)
                seen_B1SS = same_BSS.tril().unsqueeze(1)
        if self.num_tasks is not None and task_ids_B is None:
            task_ids_B = ids_BS.new_zeros(batch)
        context = context or RoutingContext(
            token_ids=ids_BS.reshape(-1),
            positions=positions_BS.reshape(-1),
            sequence_ids=sequence_ids_BS.reshape(-1),
            padding_mask=None if padding_mask_BS is None else padding_mask_BS.reshape(-1),
            task_ids=None if task_ids_B is None else task_ids_B.repeat_interleave(length, output_size=batch * length),
            step=progress[0],
            total_steps=progress[1],
            process_group=progress[2],
            cache=cache,
        )
        x_BSD = F.dropout(self.embedding(ids_BS), self.dropout, self.training)
        rotation = _rotation(positions_S, self.head_width, self.rotary_base)
        present: list[KeyValues] = []
        for index, block in enumerate(self.blocks):
            earlier = None if past is None else past[index]
            if self.activation_checkpointing and self.training:
                x_BSD, key_values = checkpoint(block, x_BSD, rotation, context, earlier, seen_B1SS, use_reentrant=False)
            else:
                x_BSD, key_values = block(x_BSD, rotation, context, earlier, seen_B1SS)
            present.append(key_values)
        return self.norm(x_BSD), context, present

    @torch.no_grad()
    def stream(
        self,
        ids_BS: Tensor,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        task_ids_B: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yield sampled next tokens, `[B]` each, without end.

        Keys and values of earlier tokens are kept, so that each step computes one token. Where a router looks at other
        tokens than its own (it is not `tokenwise`), all are computed again in each step. Beyond `max_length` tokens the
        oldest are forgotten.

        Args:
            ids_BS: the prompts, of one length, at least one token each.
            temperature: divides the logits; 0 takes the most likely token.
            top_p: samples from the most likely tokens that hold this share of the probability.
            generator: source of randomness.
            task_ids_B: the task of each prompt; by default the first one's.

        Raises:
            ValueError: an empty prompt, or an option out of range.
        """
        if ids_BS.shape[1] == 0:
            raise ValueError("a prompt needs at least one token")
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f"temperature must be >= 0 and top_p in (0, 1], got {temperature} and {top_p}")
        ids_BS, past, seen = ids_BS[:, -self.max_length :], None, 0
        one_by_one = all(inner_router(layer).properties.tokenwise for layer in moe_layers(self))
        cache: dict[Any, Any] = {}
        while True:
            x_BSD, _, present = self._run(ids_BS, past, task_ids_B=task_ids_B, seen=seen, cache=cache)
            next_B = _sample(self.head(x_BSD[:, -1]).float(), temperature, top_p, generator)
            yield next_B
            if one_by_one:
                seen += ids_BS.shape[1]
                forget = max(present[0].keys.shape[2] - self.max_length + 1, 0)
                past = [KeyValues(keys[:, :, forget:], values[:, :, forget:]) for keys, values in present]
                ids_BS = next_B.unsqueeze(1)
            else:
                ids_BS = torch.cat([ids_BS, next_B.unsqueeze(1)], dim=1)[:, -self.max_length :]


def _sample(logits_BV: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits_BV.argmax(-1)
    probs_BV, order_BV = (logits_BV / temperature).softmax(-1).sort(-1, descending=True)
    # The token that crosses the threshold still counts.
    probs_BV = probs_BV.masked_fill(probs_BV.cumsum(-1) - probs_BV >= top_p, 0.0)
    return order_BV.gather(1, torch.multinomial(probs_BV, 1, generator=generator)).squeeze(1)
