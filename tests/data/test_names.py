"""Every published data set trains with the shipped configs of its domain, by its name alone."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import cifar

from routerzoo.cli import main as cli
from routerzoo.data import ImageData, LabelledText, TextData, labelled_text, text
from routerzoo.data.images import IMAGE_SETS
from routerzoo.runs.folder import CONFIG
from tests.faults.refusals import read_only

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "1", "--trainer.enable_progress_bar", "false"]


def idx(array):
    """Write an array as MNIST's files are."""
    shape = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()


def write_images(name, root):
    folder = root / "vision" / IMAGE_SETS[name].folder
    rng = np.random.default_rng(0)
    if name in ("mnist", "fashion-mnist"):
        raw = folder / ("MNIST" if name == "mnist" else "FashionMNIST") / "raw"
        raw.mkdir(parents=True)
        for split, number in (("train", 100), ("t10k", 20)):
            images, labels = rng.integers(256, size=(number, 28, 28), dtype=np.uint8), np.arange(number) % 10
            (raw / f"{split}-images-idx3-ubyte").write_bytes(idx(images))
            (raw / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels.astype(np.uint8)))
        return
    set_class = cifar.CIFAR10 if name == "cifar10" else cifar.CIFAR100
    base, key = folder / set_class.base_folder, "labels" if name == "cifar10" else "fine_labels"
    base.mkdir(parents=True)
    classes = 10 if name == "cifar10" else 100
    for file, _ in set_class.train_list + set_class.test_list:
        number = 100
        data = rng.integers(256, size=(number, 3072), dtype=np.uint8)
        (base / file).write_bytes(pickle.dumps({"data": data, key: (np.arange(number) % classes).tolist()}))
    meta = {set_class.meta["key"]: [f"class {i}" for i in range(classes)]}
    (base / set_class.meta["filename"]).write_bytes(pickle.dumps(meta))


def write_text(name, root):
    folder = root / "language" / name
    folder.mkdir(parents=True)
    for file in text.TEXT_SETS[name].files:
        (folder / file).write_text("the quick brown fox jumps over the lazy dog \n" * 400)


def write_labelled(name, root):
    if name == "imdb":
        for split in ("train", "test"):
            for label in ("neg", "pos"):
                folder = root / "language" / "imdb" / "aclImdb" / split / label
                folder.mkdir(parents=True)
                for number in range(20):
                    (folder / f"{number}_1.txt").write_text(f"a {label} film<br />number {number}")
        return
    published = labelled_text.LABELLED_SETS[name]
    folder = root / "language" / published.folder
    folder.mkdir(parents=True)
    for file in published.files.values():
        if file.endswith(".csv"):
            rows = "".join(f"question {n},intent {n % 7}\n" for n in range(60))
            (folder / file).write_text("text,category\n" + rows)
        else:
            (folder / file).write_text("".join(f"{n % 2} sentence {n}\n" for n in range(60)))


CASES = [
    *(("vision", name, write_images) for name in IMAGE_SETS if name != "fashion-mini"),
    *(("language", name, write_text) for name in text.TEXT_SETS if name != "tiny-shakespeare"),
    *(("sst-2", name, write_labelled) for name in [*labelled_text.LABELLED_SETS, "imdb"]),
]


def fit(domain, name, root):
    config = ["--config", str(CONFIGS / "tasks" / f"{domain}.yaml")]
    routers = ["--config", str(CONFIGS / "routers" / "HashRouter.yaml")]
    data = ["--data.dataset", name, "--data.root", str(root)]
    cli.main(["fit", *config, *routers, *data, "--run_dir", "run", *SMALL])
    assert Path("run", CONFIG).is_file()


@pytest.fixture
def stand_ins(monkeypatch):
    """Take small files for the published ones."""
    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)
    for name, published in text.TEXT_SETS.items():
        if max(published.splits) > 1:
            monkeypatch.setitem(text.TEXT_SETS, name, replace(published, splits=(0.9, 0.95)))


@pytest.mark.full
@pytest.mark.parametrize(("domain", "name", "write"), CASES, ids=[case[1] for case in CASES])
def test_every_named_data_set_trains_by_its_name_alone(domain, name, write, tmp_path, stand_ins):
    write(name, tmp_path)
    fit(domain, name, tmp_path)


@pytest.mark.parametrize(("domain", "name", "write"), CASES, ids=[case[1] for case in CASES])
def test_a_shared_folder_may_be_read_only(domain, name, write, tmp_path, stand_ins, monkeypatch):
    monkeypatch.setenv("ROUTERZOO_DATA", str(tmp_path / "own"))
    shared = tmp_path / "shared"
    write(name, shared)
    data_class = {"vision": ImageData, "language": TextData, "sst-2": LabelledText}[domain]
    with read_only(shared):
        data = data_class(name, root=str(shared), batch_size=2)
        data.prepare_data()
        assert len(next(iter(data.train_dataloader()))[0]) == 2
    # What is made of the files once is the user's own.
    assert (tmp_path / "own").exists() == (name in ("wikitext-2", "wikitext-103", "ptb"))
