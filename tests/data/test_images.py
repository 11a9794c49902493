import numpy as np
import pytest
import torch
from PIL import Image

from routerzoo.data import ImageData
from routerzoo.data.images import IMAGE_SETS, Split, _check_labels
from routerzoo.errors import UserError


def test_the_bundled_images_are_balanced():
    data = ImageData()
    assert [len(data.split(name).labels) for name in ("train", "val", "test")] == [6000, 1000, 1000]
    assert (np.bincount(data.split("train").labels) == 600).all()
    assert (data.num_classes, data.in_channels, data.image_size) == (10, 1, 28)
    assert data.most_frequent_class_accuracy("val") == pytest.approx(0.1)


def test_batches_are_normalised():
    batch = next(iter(ImageData(augment=False, batch_size=512).train_dataloader()))
    assert batch.images_BCHW.shape == (512, 1, 28, 28)
    assert batch.images_BCHW.dtype == torch.float32
    assert abs(batch.images_BCHW.mean()) < 0.1
    assert abs(batch.images_BCHW.std() - 1) < 0.1
    assert batch.labels_B.dtype == torch.int64


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    def first(epoch=0, **options):
        loader = ImageData(batch_size=8, **options).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return next(iter(loader)).images_BCHW

    before = torch.random.get_rng_state()
    images = first()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first(), images)
    assert torch.equal(first(num_workers=1), images)
    assert not torch.equal(first(epoch=1), images)
    assert not torch.equal(first(augment=False), images)


@pytest.fixture
def folder(tmp_path):
    for split, number in (("train", 3), ("val", 2)):
        for label in ("cat", "dog"):
            path = tmp_path / "pets" / split / label
            path.mkdir(parents=True)
            for index in range(number):
                Image.fromarray(np.full((40, 50, 3), 20 * index, np.uint8)).save(path / f"{index}.png")
    return tmp_path / "pets"


def test_a_folder_of_images(folder):
    data = ImageData(str(folder), image_size=32, batch_size=4)
    assert data.class_names == ["cat", "dog"]
    assert next(iter(data.train_dataloader())).images_BCHW.shape == (4, 3, 32, 32)
    assert next(iter(data.val_dataloader())).labels_B.tolist() == [0, 0, 1, 1]
    with pytest.raises(UserError, match="has no test split: add"):
        data.test_dataloader()


def test_broken_images_and_folders_are_named(folder):
    (folder / "train" / "cat" / "0.png").write_bytes(b"no image")
    data = ImageData(str(folder), image_size=32, batch_size=6)
    with pytest.raises(UserError, match=r"cannot read the image .*cat.0\.png"):
        list(data.train_dataloader())
    (folder / "val" / "bird").mkdir()
    with pytest.raises(UserError, match="cannot use the image folder"):
        ImageData(str(folder)).prepare_data()
    with pytest.raises(UserError, match="has no train/"):
        ImageData(str(folder / "train" / "cat")).prepare_data()


def test_unknown_sets_and_sizes_are_refused():
    with pytest.raises(UserError, match="no data set or folder is called 'imagenet'; the data sets are fashion-mini"):
        ImageData("imagenet")
    with pytest.raises(UserError, match="image_size must be at least 1, got 0"):
        ImageData(image_size=0)


def test_a_label_out_of_range_is_refused():
    with pytest.raises(UserError, match="has labels from 0 to 7, but 3 classes, 0 to 2"):
        _check_labels(Split(lambda index: None, [0, 7], ["a", "b", "c"]), "train split of it")


def test_a_set_that_cannot_be_loaded_says_where_it_was_looked_for(tmp_path, monkeypatch):
    raw = tmp_path / "vision" / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(b"broken")
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(UserError, match=r"cannot load MNIST from .*mnist, nor download it there"):
        ImageData("mnist", root=str(tmp_path)).prepare_data()


def test_published_sets_have_their_statistics():
    for published in IMAGE_SETS.values():
        assert len(published.mean) == len(published.std) == published.channels


def save_16_bits(path, values_HW):
    Image.fromarray(values_HW.astype(np.uint16)).save(path)


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_images_of_16_bits_keep_their_values(folder, kind):
    ramp = np.arange(0, 65536, 16).reshape(64, 64)
    save_16_bits(folder / "val" / "cat" / f"ramp.{kind}", ramp)
    data = ImageData(str(folder), image_size=56, batch_size=5)
    image = data.split("val").image(2)
    assert image.shape == (64, 64, 3)
    assert (image[..., 0] == (ramp / 65535).astype(np.float32)).all()
    # Resized to 64 and cropped to 56: the 4th row and column begin.
    normalised = next(iter(data.val_dataloader())).images_BCHW[2]
    expected = (ramp[4:60, 4:60] / 65535 - 0.485) / 0.229
    assert np.allclose(normalised[0], expected, atol=1e-5)
    for label in ("cat", "dog"):
        save_16_bits(folder / "train" / label / "ramp.png", ramp)
    for images in (ImageData(str(folder), image_size=32, batch_size=8).train_dataloader(),):
        assert next(iter(images)).images_BCHW.max() < (1 - 0.406) / 0.225


def test_images_of_32_bits_are_refused(folder):
    for mode, dtype in (("I", np.int32), ("F", np.float32)):
        path = folder / "val" / "cat" / "0.tiff"
        Image.fromarray(np.full((40, 50), 70_000, dtype), mode=None).save(path)
        with pytest.raises(UserError, match=rf"0.tiff has pixels of 32 bits \(mode {mode}\), whose largest value"):
            ImageData(str(folder), batch_size=1).split("val").image(1)


def test_patches_are_as_large_as_the_data_says():
    assert {name: ImageData(name).patch_size for name in IMAGE_SETS} == {
        "fashion-mini": 7,
        "fashion-mnist": 7,
        "mnist": 7,
        "cifar10": 8,
        "cifar100": 8,
    }
    # Of 8 x 8 patches at twice the size, and of 4 x 4 where the set's do not divide another.
    assert [ImageData(image_size=size).patch_size for size in (56, 32, 64)] == [7, 8, 16]
