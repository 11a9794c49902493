"""`ImageData`: images for classification."""
# Shape suffixes: M images, C channels.

from __future__ import annotations

import importlib.resources
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast, final

import numpy as np
import torch
from lightning import LightningDataModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.transforms import v2

from routerzoo.data.download import default_root
from routerzoo.data.loading import TrainingLoader, evaluation_loader, order_seed
from routerzoo.errors import UserError


@dataclass(frozen=True)
class ImageSet:
    """A published data set.

    Args:
        image_size: height and width, pixels.
        channels: 1 for grey, 3 for color.
        mean: of each channel over the training split, of pixels from 0 to 1.
        std: standard deviation of each channel.
        flip: whether a mirrored image is as good an example.
        torchvision: name of its class in `torchvision.datasets`; None for the one that ships with the package.
        folder: where under `root/vision` it is kept.
    """

    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool
    torchvision: str | None
    folder: str = ""


IMAGE_SETS: dict[str, ImageSet] = {
    "fashion-mini": ImageSet(28, 1, (0.2860,), (0.3530,), True, None),
    "fashion-mnist": ImageSet(28, 1, (0.2860,), (0.3530,), True, "FashionMNIST", "fashion-mnist"),
    "mnist": ImageSet(28, 1, (0.1307,), (0.3081,), False, "MNIST", "mnist"),
    "cifar10": ImageSet(32, 3, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), True, "CIFAR10", "cifar10"),
    "cifar100": ImageSet(32, 3, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), True, "CIFAR100", "cifar100"),
}
FASHION_CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
# ImageNet's, for folders of images.
FOLDER_MEAN, FOLDER_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VALIDATION_SHARE = 0.1


class ImageBatch(NamedTuple):
    """`images_BCHW` normalized float32; `labels_B` int64."""

    images_BCHW: Tensor
    labels_B: Tensor


class Split(NamedTuple):
    """One split before any transform: an image by index, all labels, and the names of the classes."""

    image: Callable[[int], Any]
    labels: Sequence[int]
    names: Sequence[str]


class Images(Dataset[tuple[Tensor, int]]):
    """A split with its transform.

    Args:
        split: images and labels.
        transform: makes a tensor of an image.
        seed: seed of the augmentation, which depends on it, the epoch and the index alone. None where the transform
            has nothing random.
    """

    def __init__(self, split: Split, transform: v2.Transform, seed: int | None = None) -> None:
        self.split, self.transform, self.seed = split, transform, seed

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, int]:
        """Return image and label, of an index, or of `(epoch, index)` in training."""
        epoch, index = index if isinstance(index, tuple) else (0, index)
        if self.seed is None:
            return self.transform(self.split.image(index)), int(self.split.labels[index])
        # The same however many workers there are, and after a resume.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(((self.seed * 1_000_003 + epoch) * 10_000_019 + index) % 2**63)
            return self.transform(self.split.image(index)), int(self.split.labels[index])


@final
class ImageData(LightningDataModule):
    """Images for classification.

    Training images are padded, cropped and, where that makes sense, mirrored; images of a folder are cropped at random
    sizes, as is usual for ImageNet. Grey images of 16 bits keep them; colored ones are read with 8 bits a channel. The
    order and the augmentation depend on `seed` and epoch alone.

    Args:
        dataset: `fashion-mini` (ships with the package), `fashion-mnist`, `mnist`, `cifar10`, `cifar100`, or the path
            of a folder with `train`, `val` and, optionally, `test`, each with a folder of images per class. Published
            sets have their published test split; a tenth of the training images, chosen by a fixed seed, validates.
        root: folder that downloads are kept in; by default `$ROUTERZOO_DATA`, or `~/.cache/routerzoo`.
        image_size: height and width that images are brought to, pixels; by default the set's, 224 for a folder.
        batch_size: images per batch and process.
        augment: augment the training images.
        num_workers: processes that load data.
        seed: seed of order and augmentation; by default torch's (`seed_everything`).

    Raises:
        UserError: an unknown data set, or files that are missing or broken.
    """

    def __init__(
        self,
        dataset: str = "fashion-mini",
        *,
        root: str | None = None,
        image_size: int | None = None,
        batch_size: int = 64,
        augment: bool = True,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        if image_size is not None and image_size < 1:
            raise UserError(f"image_size must be at least 1, got {image_size}")
        self.dataset = dataset
        self.published = IMAGE_SETS.get(dataset)
        self.root = Path(root).expanduser() if root is not None else default_root()
        self.image_size = image_size or (self.published.image_size if self.published is not None else 224)
        self.batch_size, self.augment, self.num_workers = batch_size, augment, num_workers
        self.seed = order_seed(seed)
        self._splits: dict[str, Split] = {}
        if self.published is None and not Path(dataset).expanduser().is_dir():
            raise UserError(
                f"no data set or folder is called {dataset!r}; the data sets are {', '.join(IMAGE_SETS)}, and a folder "
                "with train/<class>/ and val/<class>/ can be named by its path"
            )

    @property
    def patch_size(self) -> int | None:
        """Height and width of a patch, pixels; None for a folder.

        One that cuts published images into 4 x 4, also where they are brought to a multiple of their size, so that what
        is learned at one size fits the other; elsewhere into 4 x 4 of the new size.
        """
        if self.published is None:
            return None
        published = self.published.image_size // 4
        return self.image_size // 4 if self.image_size % published else published

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return self.published.channels if self.published is not None else 3

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes by label. May download the data set."""
        return list(self.split("train").names)

    def most_frequent_class_accuracy(self, split: str) -> float:
        """Return a split's accuracy when every image is given the training split's most frequent class."""
        labels = list(self.split("train").labels)
        most_frequent = max(set(labels), key=labels.count)
        return float(np.mean(np.asarray(self.split(split).labels) == most_frequent))

    def prepare_data(self) -> None:
        """Download what is not there yet."""
        self.split("train")

    def split(self, name: str) -> Split:
        """Return `train`, `val` or `test` before any transform. May download the data set.

        Raises:
            UserError: a folder without that split.
        """
        if not self._splits:
            if self.published is None:
                self._splits = _folder_splits(Path(self.dataset).expanduser())
            elif self.published.torchvision is None:
                self._splits = _bundled_splits()
            else:
                self._splits = _torchvision_splits(self.published, self.root / "vision" / self.published.folder)
            for split_name, split in self._splits.items():
                _check_labels(split, f"{split_name} split of {self.dataset}")
        if name not in self._splits:
            raise UserError(f"the folder {self.dataset} has no {name} split: add {self.dataset}/{name}/<class>/")
        return self._splits[name]

    def _transform(self, training: bool) -> v2.Transform:
        return image_transform(self.published, self.image_size, augment=training and self.augment)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled, augmented images of the training split."""
        images = Images(self.split("train"), self._transform(training=True), self.seed if self.augment else None)
        if len(images) < self.batch_size:
            raise UserError(
                f"the training split of {self.dataset} has {len(images)} images, "
                f"fewer than batch_size {self.batch_size}"
            )
        return TrainingLoader(
            images, self.batch_size, self.seed, collate_fn=collate, num_workers=self.num_workers, pin_memory=_pin()
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """All images of the validation split."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """All images of the test split."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """All images of the test split, with their labels."""
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: str) -> DataLoader[Any]:
        images = Images(self.split(split), self._transform(training=False))
        return evaluation_loader(
            images, batch_size=self.batch_size, collate_fn=collate, num_workers=self.num_workers, pin_memory=_pin()
        )


def image_transform(published: ImageSet | None, size: int, *, augment: bool) -> v2.Transform:
    """Return what brings images to a size and normalizes them, and may augment them.

    Args:
        published: the set that they are of; None for a folder's, which are normalized as ImageNet's.
        size: height and width, pixels.
        augment: crop, pad and mirror at random.
    """
    steps: list[Any] = [v2.ToImage()]
    if published is None:
        mean, std = FOLDER_MEAN, FOLDER_STD
        if augment:
            steps += [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
        else:
            steps += [v2.Resize(round(size / 0.875), antialias=True), v2.CenterCrop(size)]
    else:
        mean, std = published.mean, published.std  # type: ignore[assignment]
        if size != published.image_size:
            steps.append(v2.Resize([size, size], antialias=True))
        if augment:
            steps.append(v2.RandomCrop(size, padding=max(size // 8, 1)))
            if published.flip:
                steps.append(v2.RandomHorizontalFlip())
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    return cast(v2.Transform, v2.Compose(steps))


def collate(samples: Sequence[tuple[Tensor, int]]) -> ImageBatch:
    """Stack images to a batch."""
    return ImageBatch(torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples]))


def _check_labels(split: Split, name: str) -> None:
    if len(split.labels) == 0:
        raise UserError(f"the {name} has no images")
    lowest, highest = min(split.labels), max(split.labels)
    if lowest < 0 or highest >= len(split.names):
        raise UserError(
            f"the {name} has labels from {lowest} to {highest}, but {len(split.names)} classes, "
            f"0 to {len(split.names) - 1}"
        )


def _array_split(images_MHWC: np.ndarray, labels_M: np.ndarray, names: Sequence[str]) -> Split:
    return Split(lambda index: images_MHWC[index], labels_M.tolist(), names)


def _bundled_splits() -> dict[str, Split]:
    path = Path(str(importlib.resources.files("routerzoo.data") / "bundled" / "fashion-mini.npz"))
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {
                split: _array_split(arrays[f"{split}_images"][..., None], arrays[f"{split}_labels"], FASHION_CLASSES)
                for split in ("train", "val", "test")
            }
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is broken ({error}); install routerzoo again") from error


def _torchvision_splits(published: ImageSet, root: Path) -> dict[str, Split]:
    cls = getattr(datasets, str(published.torchvision))
    try:
        with warnings.catch_warnings():
            # torchvision unpickles CIFAR in a way that newer NumPy versions frown at; its files are checksummed.
            warnings.filterwarnings("ignore", message=r"dtype\(\): align", category=Warning)
            whole, test = cls(root, train=True, download=True), cls(root, train=False, download=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"cannot load {published.torchvision} from {root}, nor download it there: {error}") from error
    images_M = whole.data.numpy() if isinstance(whole.data, Tensor) else whole.data
    test_M = test.data.numpy() if isinstance(test.data, Tensor) else test.data
    if images_M.ndim == 3:
        images_M, test_M = images_M[..., None], test_M[..., None]
    labels_M, test_labels_M = np.asarray(whole.targets), np.asarray(test.targets)
    order = np.random.default_rng(0).permutation(len(images_M))
    held_out = round(len(order) * VALIDATION_SHARE)
    val, train = np.sort(order[:held_out]), np.sort(order[held_out:])
    names = list(whole.classes)
    return {
        "train": _array_split(images_M[train], labels_M[train], names),
        "val": _array_split(images_M[val], labels_M[val], names),
        "test": _array_split(test_M, test_labels_M, names),
    }


def _folder_splits(folder: Path) -> dict[str, Split]:
    splits: dict[str, Split] = {}
    for name in ("train", "val", "test"):
        path = folder / name
        if not path.is_dir():
            if name == "test":
                continue
            raise UserError(f"the image folder {folder} has no {name}/; it needs train/<class>/ and val/<class>/")
        splits[name] = class_folders(path)
        if splits[name].names != splits["train"].names:
            raise UserError(f"{path} has the classes {splits[name].names}, train has {splits['train'].names}")
    return splits


def class_folders(path: Path) -> Split:
    """Return the images of a folder that has a folder of images for each class.

    Raises:
        UserError: it has not.
    """
    try:
        images = datasets.ImageFolder(str(path))
    except (FileNotFoundError, OSError) as error:
        raise UserError(f"cannot use the image folder {path}: {error}") from error
    return Split(partial(_read_image, images), images.targets, list(images.classes))


def _read_image(images: Any, index: int) -> Any:
    path = images.samples[index][0]
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):
                # Pillow's conversion to 8 bits would cut off what is above 255.
                grey_HW = np.asarray(image).astype(np.float32) / 65535
                return np.repeat(grey_HW[..., None], 3, axis=2)
            mode, converted = image.mode, image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds
        raise UserError(f"cannot read the image {path}: {error}") from error
    if mode in ("I", "F"):
        raise UserError(
            f"the image {path} has pixels of 32 bits (mode {mode}), whose largest value is not known: save it with 8 "
            "or 16 bits"
        )
    return converted


def _pin() -> bool:
    return torch.cuda.is_available()
