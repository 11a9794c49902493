"""`subject_of_images`: a vision model of transformers on images."""
# Shape suffixes: B images, C channels, L classes.

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from routerzoo.audit.subject import Losses, Subject, spread
from routerzoo.data.images import IMAGE_SETS, ImageBatch, ImageData, Split, class_folders, image_transform
from routerzoo.errors import UserError


def subject_of_images(
    model: Any,
    data: str,
    *,
    name: str,
    folder: Path,
    split: str = "test",
    batch_size: int = 4,
    num_batches: int = 20,
) -> Subject:
    """Return a vision model of transformers, with routers of routerzoo, with batches of images from all of a data set.

    Images are prepared by the image processor of the model's folder. Without one they are brought to the model's size
    and normalized as `ImageData` does. Classes are the model's where they have the same names, or as many.

    Args:
        model: see `routerzoo.audit.released.load`.
        data: a data set of `ImageData`, by name or as a folder with splits, or a folder of images for each class.
        name: what the model is called.
        folder: of the model.
        split: of a data set that has splits, `val` or `test`.
        batch_size: images of a batch.
        num_batches: batches, at most.

    Raises:
        UserError: no MoE layer, or no images.
    """
    path = Path(data).expanduser()
    images = class_folders(path) if _is_by_class(path) else ImageData(data).split(split)
    indices = spread(len(images.labels), batch_size * num_batches)
    pixels, labels = _pixels(model.config, folder, data), _labels(model.config, images)
    batches = [
        ImageBatch(
            torch.stack([pixels(images.image(index)) for index in part]).to(model.device, model.dtype),
            torch.tensor([images.labels[index] for index in part], device=model.device),
        )
        for part in (indices[start : start + batch_size] for start in range(0, len(indices), batch_size))
    ]
    classifies = type(model).__name__.endswith("ForImageClassification")
    left_out = []
    if classifies and labels is None:
        left_out.append(
            f"loss and counterfactuals: the {len(images.names)} classes of {data} are not the model's "
            f"{model.config.num_labels}"
        )

    def losses(batch: ImageBatch) -> Losses | None:
        output = model(pixel_values=batch.images_BCHW)
        if not classifies or labels is None:
            return None
        return _losses(output.logits, labels[batch.labels_B.cpu()])

    return Subject(
        name,
        data if _is_by_class(path) else f"the {split} split of {data}",
        model,
        batches,
        losses,
        groups=lambda batch: batch.labels_B,
        group_kind="class",
        group_names=images.names,
        batch_first=True,
        left_out=left_out,
    )


def _is_by_class(path: Path) -> bool:
    return path.is_dir() and not (path / "train").is_dir()


def _losses(logits_BL: Tensor, labels_B: Tensor) -> Losses:
    losses_B = F.cross_entropy(logits_BL.float(), labels_B.to(logits_BL.device), reduction="none")
    return Losses(losses_B, torch.ones_like(losses_B))


def _pixels(config: Any, folder: Path, data: str) -> Callable[[Any], Tensor]:
    """Return what makes the model's input `[C, height, width]` of an image."""
    channels = getattr(config, "num_channels", 3)
    if (folder / "preprocessor_config.json").is_file():
        import transformers

        auto: Any = transformers.AutoImageProcessor
        try:
            processor = auto.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the image processor of {folder}: {error}") from None
        to_bytes = v2.Compose([v2.ToImage(), v2.ToDtype(torch.uint8, scale=True)])
        return lambda image: processor(_of_channels(to_bytes(image), channels), return_tensors="pt")["pixel_values"][0]
    size = getattr(config, "image_size", 224)
    prepare = image_transform(IMAGE_SETS.get(data), size if isinstance(size, int) else size[0], augment=False)
    return lambda image: _of_channels(prepare(image), channels)


def _of_channels(image_CHW: Tensor, channels: int) -> Tensor:
    """Repeat grey for a model of colored images."""
    if image_CHW.shape[0] == 1:
        return image_CHW.expand(channels, -1, -1)
    if image_CHW.shape[0] != channels:
        raise UserError(f"the model takes images of {channels} channels, these have {image_CHW.shape[0]}")
    return image_CHW


def _labels(config: Any, images: Split) -> Tensor | None:
    """Return the model's label of each class; None where classes are others."""
    names: Sequence[str] = images.names
    known = {name: int(label) for name, label in (config.label2id or {}).items()}
    if all(name in known for name in names):
        return torch.tensor([known[name] for name in names])
    return torch.arange(len(names)) if len(names) == config.num_labels else None
