"""`ViTMoE`: a timm vision transformer whose chosen blocks have MoE layers."""
# Shape suffixes: B images, C channels, N patches of an image, S tokens of an image (prefix tokens and patches), L
# classes.

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, final

import timm
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from routerzoo.models.blocks import MoEBlocks
from routerzoo.models.patch_ids import PatchIdKind, PatchIds, PositionIds, create_patch_ids
from routerzoo.models.sparsify import sparsify
from routerzoo.moe.context import provide_context
from routerzoo.moe.experts import MLPExperts
from routerzoo.moe.grouped_linear import Backend
from routerzoo.moe.layer import ExpertsFactory, MoE, RouterFactory, inner_router, moe_layers
from routerzoo.router import UnmetRequirementError
from routerzoo.routing import RoutingContext

PROVIDED_CONTEXT = frozenset({"positions", "sequence_ids", "attention", "step", "total_steps"})


@final
class ViTMoE(nn.Module):
    """Vision transformer from timm with MoE layers in place of the MLPs of chosen blocks.

    Its routers are given positions, sequence ids (the image of a token), the attention before them and the step; with
    `patch_ids` token ids too.
    Prefix tokens (class token, registers) have ids of their own behind those of the patches.

    Args:
        backbone: name of a timm vision transformer.
        num_classes: number of classes.
        router: builds the router of each MoE layer.
        experts: builds the experts of each MoE layer.
        num_experts: experts per MoE layer.
        num_shared_experts: experts per MoE layer that see every token.
        moe_blocks: which blocks have a MoE layer; see `routerzoo.models.blocks.moe_block_indices`.
        image_size: height and width of the images, pixels; by default the backbone's.
        patch_size: height and width of a patch, pixels, where the backbone's do not cut images into at least 4 x 4
            patches; `backbone_arguments` and a pretrained backbone go before it.
        in_channels: channels of the images.
        pretrained: start from timm's pretrained weights, and every expert from those of the MLP it replaces.
        backbone_arguments: further arguments of `timm.create_model`, such as `depth` or `embed_dim`. With
            `checkpoint_path`, a file of the dense model's weights, every expert starts from the file's MLP.
        patch_ids: what token ids are, for routers that route by them: `position`, `lsh` or `codebook`.
        num_patch_ids: number of patch ids for `lsh` (a power of 2) and `codebook`.
        activation_checkpointing: keep only the blocks' inputs and compute the rest again in the backward pass.
        backend: see `routerzoo.grouped_linear`.

    Raises:
        ValueError: not a vision transformer; an image size that the patch size does not divide; a backbone whose MLPs
            see other tokens than the prefix tokens and all patches.
        UnmetRequirementError: a router needs what the model does not provide.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        router: RouterFactory,
        experts: ExpertsFactory = MLPExperts,
        *,
        num_experts: int = 8,
        num_shared_experts: int = 0,
        moe_blocks: MoEBlocks = "every-other",
        image_size: int | None = None,
        patch_size: int | None = None,
        in_channels: int = 3,
        pretrained: bool = False,
        backbone_arguments: dict[str, Any] | None = None,
        patch_ids: PatchIdKind | None = None,
        num_patch_ids: int = 256,
        activation_checkpointing: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        arguments = {"num_classes": num_classes, "in_chans": in_channels, **(backbone_arguments or {})}
        if image_size is not None:
            arguments["img_size"] = image_size
        for name in ("patch_drop_rate", "dynamic_img_size"):
            if arguments.get(name):
                raise ValueError(f"MoE layers are given all patches of images of one size: leave {name} out")
        upcycle = pretrained or bool(arguments.get("checkpoint_path"))
        if patch_size is not None and image_size is not None and not upcycle and "patch_size" not in arguments:
            with torch.device("meta"):
                own: tuple[int, int] = tuple(_create_vit(backbone, False, arguments).patch_embed.patch_size)
            if any(image_size % side or image_size < 4 * side for side in own):
                arguments["patch_size"] = patch_size
        self.vit: Any = _create_vit(backbone, pretrained, arguments)
        patch_embed = self.vit.patch_embed
        self.grid_size: tuple[int, int] = tuple(patch_embed.grid_size)
        self.in_channels = in_channels
        self.image_size: tuple[int, int] = tuple(patch_embed.img_size)
        patch: tuple[int, int] = tuple(patch_embed.patch_size)
        if any(image % side for image, side in zip(self.image_size, patch, strict=True)):
            raise ValueError(
                f"patches of {patch[0]} x {patch[1]} pixels do not divide images of "
                f"{self.image_size[0]} x {self.image_size[1]}: choose another image_size, or patch_size in "
                "backbone_arguments"
            )
        self.num_prefix_tokens = int(self.vit.num_prefix_tokens)
        num_patches = self.grid_size[0] * self.grid_size[1]
        _check_tokens(self.vit, backbone, in_channels, self.image_size, num_patches + self.num_prefix_tokens)
        self.patch_ids: PatchIds | None = None
        vocab_size = None
        if patch_ids is not None:
            if tuple(image // side for image, side in zip(self.image_size, patch, strict=True)) != self.grid_size:
                raise ValueError(
                    f"patch_ids are those of patches of pixels, and the tokens of {backbone} come from convolutions: "
                    "take a plain vit_* backbone"
                )
            self.patch_ids = create_patch_ids(patch_ids, patch, in_channels, num_patches, num_patch_ids)
            vocab_size = self.patch_ids.vocab_size + self.num_prefix_tokens
        mlps = {block.mlp for block in self.vit.blocks}
        try:
            sparsify(
                self.vit,
                num_experts=num_experts,
                router=router,
                experts=experts,
                blocks=moe_blocks,
                upcycle=upcycle,
                num_shared_experts=num_shared_experts,
                match=lambda module: module in mlps,
                provides=PROVIDED_CONTEXT | ({"token_ids"} if patch_ids is not None else set()),
                vocab_size=vocab_size,
                num_positions=num_patches + self.num_prefix_tokens,
                backend=backend,
            )
        except UnmetRequirementError as error:
            if error.missing & {"token_ids", "vocab_size"}:
                hint = "set patch_ids to position, lsh or codebook, to say what the id of an image patch is"
                raise UnmetRequirementError(error.router, error.missing, hint) from None
            raise
        for block in self.vit.blocks:
            layer = _moe_of(block)
            if layer is not None and "attention" in inner_router(layer).requires:
                _show_attention(block, layer)
        if activation_checkpointing:
            if type(self.vit.blocks) is not nn.Sequential:
                raise ValueError(f"{backbone} does not run its blocks in sequence: leave activation_checkpointing out")
            self.vit.blocks = _CheckpointedBlocks(*self.vit.blocks)

    @property
    def vocab_size(self) -> int | None:
        """Number of token ids, prefix tokens included; None without patch ids."""
        return None if self.patch_ids is None else self.patch_ids.vocab_size + self.num_prefix_tokens

    def forward(
        self,
        images_BCHW: Tensor,
        *,
        step: int | None = None,
        total_steps: int | None = None,
        process_group: ProcessGroup | None = None,
    ) -> tuple[Tensor, RoutingContext]:
        """Return class logits `[B, L]`, and the context with the routing of every MoE layer.

        Args:
            images_BCHW: normalized images.
            step: optimizer steps taken, where known.
            total_steps: optimizer steps that the run will take, where known.
            process_group: processes that train on parts of this batch; see `RoutingContext`.
        """
        batch, _, height, width = images_BCHW.shape
        if (height, width) != self.image_size:
            raise ValueError(
                f"images are {height} x {width}, the model takes {self.image_size[0]} x {self.image_size[1]}"
            )
        tokens = self.num_prefix_tokens + self.grid_size[0] * self.grid_size[1]
        device = images_BCHW.device
        context = RoutingContext(
            token_ids=self.token_ids(images_BCHW),
            positions=torch.arange(tokens, device=device).repeat(batch),
            sequence_ids=torch.arange(batch, device=device).repeat_interleave(tokens, output_size=batch * tokens),
            step=step,
            total_steps=total_steps,
            process_group=process_group,
        )
        with provide_context(self.vit, context):
            logits_BL: Tensor = self.vit(images_BCHW)
        return logits_BL, context

    def resample_positions(self, state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        """Return another model's weights with its positions resampled to this one's grid of patches.

        Position embeddings are interpolated as timm does it. What routers hold for each position, where token ids are
        positions, is that of the nearest patch.

        Args:
            state: state dict of a model whose images had another size, but for that the same as this one.
            prefix: of this model's keys.
        """
        state, own, key = dict(state), self.state_dict(), "vit.pos_embed"
        saved = state.get(prefix + key)
        if saved is None or key not in own or saved.shape[1] == own[key].shape[1]:
            return state
        fixed = 0 if getattr(self.vit, "no_embed_class", False) else self.num_prefix_tokens
        side = math.isqrt(saved.shape[1] - fixed)
        if side**2 != saved.shape[1] - fixed:
            return state  # no square: that it does not fit is for the caller to say
        state[prefix + key] = resample_abs_pos_embed(saved, list(self.grid_size), [side, side], fixed)
        if isinstance(self.patch_ids, PositionIds):
            rows, columns = (torch.arange(n) * side // n for n in self.grid_size)
            patches = (rows.unsqueeze(1) * side + columns).flatten()
            nearest = torch.cat([patches, side**2 + torch.arange(self.num_prefix_tokens)])
            before = side**2 + self.num_prefix_tokens
            for name, value in own.items():
                held = state.get(prefix + name)
                by_position = ".router." in name and value.ndim > 0 and value.shape[0] == len(nearest)
                if held is not None and by_position and held.ndim > 0 and held.shape[0] == before:
                    state[prefix + name] = held.index_select(0, nearest.to(held.device))
        return state

    def token_ids(self, images_BCHW: Tensor) -> Tensor | None:
        """Return the id of every token, int64 `[B * S]`; None without patch ids."""
        if self.patch_ids is None:
            return None
        ids_BN: Tensor = self.patch_ids(images_BCHW)
        prefix = torch.arange(self.num_prefix_tokens, device=ids_BN.device) + self.patch_ids.vocab_size
        return torch.cat([prefix.expand(len(ids_BN), -1), ids_BN], dim=1).reshape(-1)


def _moe_of(block: Any) -> MoE | None:
    return next(moe_layers(block.mlp), None)


def _check_tokens(vit: Any, backbone: str, channels: int, size: tuple[int, int], described: int) -> None:
    """Refuse a backbone whose MLPs see other tokens than those that the context describes.

    Its forward pass is run without values.
    """
    shapes: list[torch.Size] = []
    handles = [
        block.mlp.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape)) for block in vit.blocks
    ]
    tensors = {name: tensor.to("meta") for name, tensor in (*vit.named_parameters(), *vit.named_buffers())}
    training = vit.training
    try:
        with torch.no_grad(), torch.device("meta"):
            torch.func.functional_call(vit.eval(), tensors, (torch.empty(2, channels, *size),))
    finally:
        vit.train(training)
        for handle in handles:
            handle.remove()
    if odd := [shape for shape in shapes if tuple(shape[:-1]) != (2, described)]:
        raise ValueError(
            f"{backbone} hands its MLPs tokens of the shape {list(odd[0][1:-1])} for an image, where prefix tokens and "
            f"patches are {described}: routers would be told of other tokens than they see; take a plain vit_* backbone"
        )


def _show_attention(block: Any, layer: MoE) -> None:
    """Hand the attention weights of a timm block to its MoE layer's router."""
    if not (hasattr(block.attn, "fused_attn") and isinstance(getattr(block.attn, "attn_drop", None), nn.Module)):
        raise ValueError(
            f"{type(inner_router(layer)).__name__} requires attention, which timm's {type(block.attn).__name__} "
            "does not show; take a plain vit_* backbone"
        )
    block.attn.fused_attn = False  # the fused kernel keeps the weights to itself
    block.attn.attn_drop = _AttentionTap(block.attn.attn_drop, layer)


class _AttentionTap(nn.Module):
    """Dropout of attention weights that shows them to a MoE layer first."""

    def __init__(self, dropout: nn.Module, layer: MoE) -> None:
        super().__init__()
        self.dropout = dropout
        self.layer = (layer,)  # in a tuple, so that the layer is not a part of this module

    def forward(self, weights_BHSS: Tensor) -> Tensor:
        """Drop weights."""
        layer = self.layer[0]
        assert layer._provided_context is not None  # the model provides one for each pass
        attention = weights_BHSS.float().transpose(1, 2).flatten(0, 1)
        layer._provided_context = layer._provided_context.replace(attention=attention)
        dropped: Tensor = self.dropout(weights_BHSS)
        return dropped


class _CheckpointedBlocks(nn.Sequential):
    """Blocks that keep only their inputs, and find the context of their pass again when they are recomputed."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Run the blocks."""
        if not (self.training and torch.is_grad_enabled()):
            for block in self:
                x_BSD = block(x_BSD)
            return x_BSD
        for block in self:
            layer = _moe_of(block)
            context = None if layer is None else layer._provided_context
            options: dict[str, Any] = {} if context is None else {"context_fn": partial(_contexts, block, context)}
            x_BSD = checkpoint(block, x_BSD, use_reentrant=False, **options)
        return x_BSD


def _contexts(
    block: nn.Module, context: RoutingContext
) -> tuple[AbstractContextManager[None], AbstractContextManager[RoutingContext]]:
    return nullcontext(), provide_context(block, context)


def _create_vit(backbone: str, pretrained: bool, arguments: dict[str, Any]) -> Any:
    if not timm.is_model(backbone):
        known = timm.list_models(f"*{backbone.split('_')[0]}*")[:5]
        raise ValueError(
            f'timm has no model {backbone!r}; it has {", ".join(known) or "others"}; see timm.list_models("vit_*")'
        )
    try:
        vit: Any = timm.create_model(backbone, pretrained=pretrained, **arguments)
    except TypeError as error:
        raise ValueError(f"timm cannot build {backbone} with {arguments}: {error}") from error
    patches = all(hasattr(getattr(vit, "patch_embed", None), name) for name in ("grid_size", "img_size", "patch_size"))
    blocks = all(hasattr(vit, name) for name in ("blocks", "num_prefix_tokens")) and all(
        hasattr(block, "mlp") for block in vit.blocks
    )
    if not (patches and blocks):
        raise ValueError(f"{backbone} is not a vision transformer with blocks that have an MLP; take a vit_* or deit_*")
    return vit
