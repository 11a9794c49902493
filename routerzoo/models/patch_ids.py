"""Token ids for image patches, for routers that route by id.

The hash router and StableMoE's distilled router are defined for text. These are extensions of their papers to vision: a
patch's id is its position, or a hash of its pixels. Ids come from the input, not from hidden states, so that a patch
keeps its id over training. What an id is made of is drawn or fitted once and is part of the `state_dict`.
"""
# Shape suffixes: B images, N patches of an image, C channels, P pixels of a patch (channels x height x width),
# V patch ids, M sampled patches.

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PatchIdKind = Literal["position", "lsh", "codebook"]


class PatchIds(nn.Module, ABC):
    """Gives each patch of an image an id below `vocab_size`.

    Args:
        patch_size: height and width of a patch, pixels.
        channels: channels of the images.
    """

    vocab_size: int

    def __init__(self, patch_size: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.num_pixels = channels * patch_size[0] * patch_size[1]

    @abstractmethod
    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the ids of all patches, int64 `[B, N]`, row by row."""

    def fit_token_counts(self, images_BCHW: Tensor, generator: torch.Generator) -> None:
        """Fit to images of the training split, once, before the first step."""

    def patches(self, images_BCHW: Tensor) -> Tensor:
        """Return the pixels of all patches, float32 `[B, N, P]`."""
        return F.unfold(images_BCHW.float(), self.patch_size, stride=self.patch_size).transpose(1, 2)


@final
class PositionIds(PatchIds):
    """A patch's id is its position: exactly balanced under a balanced table, and blind to content."""

    def __init__(self, patch_size: tuple[int, int], channels: int, num_patches: int) -> None:
        super().__init__(patch_size, channels)
        self.vocab_size = num_patches

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Number the patches."""
        batch, _, height, width = images_BCHW.shape
        num_patches = (height // self.patch_size[0]) * (width // self.patch_size[1])
        return torch.arange(num_patches, device=images_BCHW.device).expand(batch, -1)


@final
class LSHIds(PatchIds):
    """A patch's id is the signs of its random projections, locality-sensitive hashing: `sign(R (patch - mean))`.

    The loads are skewed, since natural patches are; the balanced table of the hash router evens them out where it can.

    Args:
        patch_size: height and width of a patch, pixels.
        channels: channels of the images.
        num_ids: number of ids, a power of 2.
        seed: seed of the projections R.
    """

    projection: Tensor
    mean: Tensor
    bit_values: Tensor

    def __init__(self, patch_size: tuple[int, int], channels: int, num_ids: int = 256, seed: int = 0) -> None:
        super().__init__(patch_size, channels)
        if num_ids < 2 or num_ids & (num_ids - 1):
            raise ValueError(f"num_patch_ids must be a power of 2 for lsh, got {num_ids}")
        bits = num_ids.bit_length() - 1
        generator = torch.Generator(device="cpu").manual_seed(seed)
        self.vocab_size = num_ids
        self.register_buffer("projection", torch.randn(bits, self.num_pixels, generator=generator, device="cpu"))
        self.register_buffer("mean", torch.zeros(self.num_pixels))
        self.register_buffer("bit_values", 2 ** torch.arange(bits), persistent=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Hash the patches."""
        kind = images_BCHW.device.type
        with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):
            projected = F.linear(self.patches(images_BCHW) - self.mean.float(), self.projection.float())
            return ((projected > 0) * self.bit_values).sum(-1)

    def fit_token_counts(self, images_BCHW: Tensor, generator: torch.Generator) -> None:
        """Take the mean patch."""
        self.mean.copy_(self.patches(images_BCHW).mean((0, 1)))


@final
class CodebookIds(PatchIds):
    """A patch's id is the nearest entry of a codebook, fitted by k-means to patches of the training split.

    Args:
        patch_size: height and width of a patch, pixels.
        channels: channels of the images.
        num_ids: entries of the codebook.
        seed: seed of the entries before they are fitted.
    """

    codebook: Tensor

    def __init__(self, patch_size: tuple[int, int], channels: int, num_ids: int = 256, seed: int = 0) -> None:
        super().__init__(patch_size, channels)
        if num_ids < 1:
            raise ValueError(f"num_patch_ids must be at least 1, got {num_ids}")
        generator = torch.Generator(device="cpu").manual_seed(seed)
        self.vocab_size = num_ids
        self.register_buffer("codebook", torch.randn(num_ids, self.num_pixels, generator=generator, device="cpu"))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Find each patch's nearest entry."""
        with torch.autocast(images_BCHW.device.type, enabled=False):
            return _nearest(self.patches(images_BCHW), self.codebook.float())

    def fit_token_counts(self, images_BCHW: Tensor, generator: torch.Generator, iterations: int = 20) -> None:
        """Fit the codebook: Lloyd's algorithm from randomly chosen patches."""
        patches_MP = self.patches(images_BCHW).flatten(0, 1).to(self.codebook.device)
        distinct_MP = torch.unique(patches_MP, dim=0)
        chosen = torch.randperm(len(distinct_MP), generator=generator)[: self.vocab_size]
        codebook_VP = self.codebook.float().clone()
        codebook_VP[: len(chosen)] = distinct_MP[chosen]
        for _ in range(iterations):
            ids_M = _nearest(patches_MP, codebook_VP)
            counts_V = torch.bincount(ids_M, minlength=self.vocab_size)
            sums_VP = torch.zeros_like(codebook_VP).index_add_(0, ids_M, patches_MP)
            used_V1 = (counts_V > 0).unsqueeze(1)
            codebook_VP = torch.where(used_V1, sums_VP / counts_V.clamp_min(1).unsqueeze(1), codebook_VP)
        self.codebook.copy_(codebook_VP)


def _nearest(patches_P: Tensor, codebook_VP: Tensor) -> Tensor:
    # |a - b|^2 less |a|^2, which is the same for all entries.
    return (codebook_VP.square().sum(-1) - 2 * patches_P @ codebook_VP.T).argmin(-1)


def create_patch_ids(
    kind: PatchIdKind, patch_size: tuple[int, int], channels: int, num_patches: int, num_ids: int
) -> PatchIds:
    """Build what gives patches their ids.

    Raises:
        ValueError: an unknown kind, or a number of ids that it cannot have.
    """
    if kind == "position":
        return PositionIds(patch_size, channels, num_patches)
    if kind == "lsh":
        return LSHIds(patch_size, channels, num_ids)
    if kind == "codebook":
        return CodebookIds(patch_size, channels, num_ids)
    raise ValueError(f"patch_ids must be position, lsh or codebook, got {kind!r}")
