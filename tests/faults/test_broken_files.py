"""Damaged and hostile files: refused in one sentence that names the file, or read as what they were."""

import contextlib
import pickle
import random
import shutil
import sqlite3
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from routerzoo import ImageData, TextData
from routerzoo.checkpoints import sharded as folders
from routerzoo.checkpoints.single import WholeCheckpoints, read_checkpoint
from routerzoo.data.download import extract_member
from routerzoo.data.tokens import Span, WordCorpus, encode_words
from routerzoo.errors import UserError
from routerzoo.sweep.ledger import Ledger
from tests.faults.test_kills import assert_same

pytestmark = pytest.mark.full

CORRUPTIONS = 150


def corrupted(content, draw):
    """Return a file's bytes cut short, or with a few bits flipped, or with a piece overwritten."""
    kind = draw.choice(("cut", "flip", "overwrite"))
    if kind == "cut":
        return content[: draw.randrange(len(content))]
    damaged = bytearray(content)
    if kind == "flip":
        for _ in range(draw.randint(1, 3)):
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    else:
        start = draw.randrange(len(damaged))
        damaged[start : start + 64] = draw.randbytes(len(damaged[start : start + 64]))
    return bytes(damaged)


def attempt(read):
    """Return what was read, or why not."""
    try:
        return read(), None
    except UserError as error:
        return None, str(error)


def fuzz(path, read, expected, tries=CORRUPTIONS):
    """Damage a file over and over; return how often that was refused."""
    whole, draw, refused = path.read_bytes(), random.Random(path.name), 0
    for _ in range(tries):
        path.write_bytes(corrupted(whole, draw))
        content, refusal = attempt(read)
        if refusal is None:
            assert_same(content, expected)  # damage where nothing is kept
            continue
        refused += 1
        assert "\n" not in refusal.strip()
        assert str(path) in refusal or str(path.parent) in refusal, refusal
    path.write_bytes(whole)
    assert_same(read(), expected)
    return refused


def test_checkpoints(tmp_path):
    path = tmp_path / "last.ckpt"
    content = {"state_dict": {"weight": torch.randn(20, 30), "bias": torch.randn(7)}, "global_step": 3, "names": ["a"]}
    WholeCheckpoints().save_checkpoint(content, path)
    assert fuzz(path, lambda: read_checkpoint(path), content) > CORRUPTIONS * 0.8


@pytest.fixture
def folder(tmp_path):
    """Return a checkpoint of one process that was alone in its group."""
    path = tmp_path / "last.ckpt"
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        meta = {"state_dict": {}, "global_step": 3, "optimizer_states": [{"state": {}, "param_groups": []}]}
        folders.save(path, meta, {"state_dict.weight": torch.randn(20, 30), "optimizer.weight.step": torch.tensor(3.0)})
    finally:
        torch.distributed.destroy_process_group()
    return path


@pytest.mark.parametrize("part", ["meta.pt", ".metadata", "__0_0.distcp"])
def test_checkpoints_of_several_processes(folder, part):
    expected = read_checkpoint(folder)
    assert expected["state_dict"]["weight"].shape == (20, 30)
    assert fuzz(folder / part, lambda: read_checkpoint(folder), expected, 60) > 40
    (folder / part).unlink()
    with pytest.raises(UserError, match=r"last.ckpt"):
        read_checkpoint(folder)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_checkpoint_runs_code(tmp_path, folder):
    trace, path = tmp_path / "ran", tmp_path / "bomb.ckpt"
    torch.save({"state_dict": {}, "bomb": Bomb(trace)}, path)
    with pytest.raises(UserError, match=r"bomb.ckpt is not a checkpoint that can be read"):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(UserError, match=r"bomb.ckpt"):
        read_checkpoint(path)
    for part in (".metadata", "meta.pt"):
        broken = tmp_path / f"folder{part}"
        shutil.copytree(folder, broken)
        (broken / part).write_bytes(pickle.dumps(Bomb(trace)))
        with pytest.raises(UserError, match="folder"):
            read_checkpoint(broken)
    assert not trace.exists()


@pytest.mark.parametrize(
    "name", ["torch.serialization _load", "torch.serialization pickle", "torch load", f"{folders.__name__} shutil"]
)
def test_a_table_of_contents_names_its_classes_and_nothing_that_lies_beside_them(folder, name):
    (folder / ".metadata").write_bytes(f"c{name}\n.".replace(" ", "\n").encode())
    with pytest.raises(UserError, match="which is no part of one"):
        read_checkpoint(folder)


def test_encoded_corpora(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n" * 50)
    spans = {split: [Span(text, 0, None)] for split in ("train", "val", "test")}
    corpus = encode_words(spans, tmp_path / "encoded")
    expected = (corpus.words, torch.from_numpy(np.array(corpus.stream("train"))))

    def read():
        again = WordCorpus(corpus.folder)
        return again.words, torch.from_numpy(np.array(again.stream("train")))

    for name in ("train.npy", "vocabulary.json", "checksums.json"):
        assert fuzz(corpus.folder / name, read, expected, 60) > 40


def test_texts_that_are_no_text(tmp_path):
    path = tmp_path / "text.txt"
    for content in (b"", b"\xff\xfe" * 500, b"\x80" + b"text " * 500):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"text.txt"):
            TextData(dataset=str(path)).setup("fit")


def test_images(tmp_path):
    draw = random.Random(0)
    refused = 0
    for split in ("train", "val"):
        for kind in ("cat", "dog"):
            (tmp_path / "images" / split / kind).mkdir(parents=True)
            Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8)).save(
                tmp_path / "images" / split / kind / "one.png"
            )
    path = tmp_path / "images" / "train" / "cat" / "one.png"
    whole = path.read_bytes()
    data = ImageData(dataset=str(tmp_path / "images"), image_size=20, batch_size=1, augment=False)
    data.setup("fit")
    for _ in range(CORRUPTIONS):
        path.write_bytes(corrupted(whole, draw))
        image, refusal = attempt(lambda: data.train_dataloader().dataset[(0, 0)][0])
        assert image is not None or "one.png" in refusal
        refused += refusal is not None
    assert refused > CORRUPTIONS * 0.7


def test_sweep_stores(tmp_path):
    ledger = Ledger(tmp_path)
    row = {
        "stage": "final",
        "task": "t",
        "router": "r",
        "variant": "v",
        "seed": 0,
        "folder": "runs/x",
        "config": "c" * 500,
        "test": [],
    }
    ledger.plan([{**row, "key": f"key{number}"} for number in range(3)])
    for number in range(3):
        run = ledger.claim("code")
        ledger.finish(run.key, "finished", results={"test": {"bpb": 1.5 + number}})
    with contextlib.closing(sqlite3.connect(ledger.path)) as database, database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.execute("PRAGMA journal_mode = DELETE")
    whole, draw, refused = ledger.path.read_bytes(), random.Random(1), 0
    for _ in range(CORRUPTIONS):
        for litter in tmp_path.glob("sweep.db-*"):
            litter.unlink()
        ledger.path.write_bytes(corrupted(whole, draw))
        found, refusal = attempt(lambda: Ledger(tmp_path).runs())
        refused += refusal is not None
        assert refusal is None or "sweep.db" in refusal
        # Nothing that is read as a result is another one.
        for run in found or []:
            if run.status == "finished":
                assert run.results["test"]["bpb"] in (1.5, 2.5, 3.5)
    assert refused > CORRUPTIONS * 0.3


def test_archives_write_nowhere_else(tmp_path):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("../../outside/data.txt", "content")
    (tmp_path / "deep" / "folder").mkdir(parents=True)
    extract_member(archive, "data.txt", tmp_path / "deep" / "folder" / "data.txt")
    assert not (tmp_path / "outside").exists()
    hostile = tmp_path / "b.tar.gz"
    with tarfile.open(hostile, "w:gz") as tar:
        (tmp_path / "x").write_text("content")
        tar.add(tmp_path / "x", "../outside.txt")
    with tarfile.open(hostile) as tar, pytest.raises(tarfile.TarError):
        tar.extractall(tmp_path / "deep", filter="data")
    assert not (tmp_path / "outside.txt").exists()


def test_archives(tmp_path):
    archive, target = tmp_path / "a.zip", tmp_path / "data.txt"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("data.txt", "".join(random.Random(0).choices("abcdef", k=2000)))

    def read():
        target.unlink(missing_ok=True)
        return extract_member(archive, "data.txt", target).read_bytes()

    assert fuzz(archive, read, read()) > CORRUPTIONS * 0.8
