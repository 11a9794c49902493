"""Texts with labels: published sets from a local server, one's own files, and what is refused."""

import hashlib
import io
import tarfile
from dataclasses import replace

import pytest
import torch

from routerzoo import LabelledText
from routerzoo.data import labelled_text
from routerzoo.data.labelled_text import LABELLED_SETS, Example, collate
from routerzoo.errors import UserError

ROWS = "text,label\n" + "".join(f'"well, {i}",{"good" if i % 2 else "bad"}\n' for i in range(40))


def test_a_csv_file_is_cut_into_splits_without_overlap(tmp_path):
    file = tmp_path / "own.csv"
    file.write_text(ROWS)
    data = LabelledText(str(file))
    splits = {split: data.examples(split) for split in ("train", "val", "test")}
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 32, "val": 4, "test": 4}
    assert len(set().union(*splits.values())) == 40
    assert data.class_names == ["bad", "good"]
    assert data.num_classes == 2
    assert LabelledText(str(file)).examples("val") == splits["val"]
    assert LabelledText(str(file), seed=1).examples("val") != splits["val"]
    assert data.token_counts().sum() == sum(len(example.text.encode()) for example in splits["train"])
    assert 0 <= data.most_frequent_class_accuracy("test") <= 1


def test_a_folder_has_the_splits_it_has(tmp_path):
    for split, rows in (("train", 40), ("test", 3)):
        (tmp_path / f"{split}.csv").write_text("".join(ROWS.splitlines(keepends=True)[: rows + 1]))
    data = LabelledText(str(tmp_path))
    assert (len(data.examples("train")), len(data.examples("val")), len(data.examples("test"))) == (36, 4, 3)


def test_batches_are_padded_on_the_right():
    batch = collate([(torch.tensor([7, 8, 9]), 1), (torch.tensor([5]), 0)])
    assert batch.ids_BS.tolist() == [[7, 8, 9], [5, 0, 0]]
    assert batch.padding_mask_BS.tolist() == [[False] * 3, [False, True, True]]
    assert batch.labels_B.tolist() == [1, 0]


def test_texts_are_read_to_their_length(tmp_path):
    file = tmp_path / "own.csv"
    file.write_text(ROWS)
    batch = next(iter(LabelledText(str(file), sequence_length=4, batch_size=2).val_dataloader()))
    assert batch.ids_BS.shape == (2, 4)
    assert bytes(batch.ids_BS[0].tolist()) == b"well"


def serve(monkeypatch, server, name, **files):
    """Serve files in place of a published set's."""
    known, (folder, address) = LABELLED_SETS[name], server
    urls, checksums = {}, {}
    for split, text in files.items():
        (folder / split).write_text(text)
        urls[split], checksums[split] = f"{address}/{split}", hashlib.sha256(text.encode()).hexdigest()
    monkeypatch.setitem(LABELLED_SETS, name, replace(known, urls=urls, checksums=checksums))


def test_published_sets_are_downloaded_and_read(monkeypatch, tmp_path, server):
    lines = {split: f"1 a {split} delight\n0 dull , for {split}\n" for split in ("train", "val", "test")}
    serve(monkeypatch, server, "sst-2", **lines)
    data = LabelledText("sst-2", root=str(tmp_path / "root"))
    assert data.examples("val") == [Example("a val delight", "1"), Example("dull , for val", "0")]
    assert (tmp_path / "root" / "language" / "sst" / "stsa.binary.dev").is_file()
    rows = "text,category\n" + "".join(f"question {i},intent_{i % 3}\n" for i in range(30))
    serve(monkeypatch, server, "banking77", train=rows, test="text,category\nwhen?,intent_1\n")
    banking = LabelledText("banking77", root=str(tmp_path / "root"))
    assert [len(banking.examples(split)) for split in ("train", "val", "test")] == [27, 3, 1]
    assert banking.num_classes == 3


def test_a_file_with_another_checksum_is_refused(monkeypatch, tmp_path, server):
    serve(monkeypatch, server, "sst-2", train="1 a\n", val="1 a\n", test="1 a\n")
    broken = replace(LABELLED_SETS["sst-2"], checksums=dict.fromkeys(("train", "val", "test"), "0" * 64))
    monkeypatch.setitem(LABELLED_SETS, "sst-2", broken)
    with pytest.raises(UserError, match=r"SHA256 hash of .* does not match"):
        LabelledText("sst-2", root=str(tmp_path / "root")).examples("train")


def serve_imdb(monkeypatch, server, member="aclImdb/{split}/{label}/{i}_1.txt"):
    folder, address = server
    path = folder / "imdb.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for split in ("train", "test"):
            for label in ("neg", "pos"):
                for i in range(10):
                    content = f"{label}<br /><br />{i}".encode()
                    info = tarfile.TarInfo(member.format(split=split, label=label, i=i))
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    monkeypatch.setattr(labelled_text, "IMDB_URL", f"{address}/{path.name}")
    monkeypatch.setattr(labelled_text, "IMDB_CHECKSUM", f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}")


def test_imdb_comes_from_its_archive(monkeypatch, tmp_path, server):
    serve_imdb(monkeypatch, server)
    data = LabelledText("imdb", root=str(tmp_path / "root"))
    assert [len(data.examples(split)) for split in ("train", "val", "test")] == [18, 2, 20]
    assert data.examples("test")[0] == Example("neg  0", "neg")


def test_an_archive_cannot_write_outside_its_folder(monkeypatch, tmp_path, server):
    serve_imdb(monkeypatch, server, "../../outside/{split}{label}{i}.txt")
    with pytest.raises(UserError, match="is a broken archive"):
        LabelledText("imdb", root=str(tmp_path / "root")).examples("train")
    assert not list(tmp_path.rglob("outside"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,mood\nfine,good\n", "has the columns text, mood; it needs text and label"),
        ("", "is empty"),
        ("text,label\n", "has a header, and no text"),
        ("text,label\n,good\n", "line 2: no text"),
        ("text,label\nfine,\n", "line 2: no label"),
        ("text,label\nfine,good\n", "has too few texts to be cut into three splits"),
        (b"text,label\n\xff\xfe,good\n", "is not UTF-8 text: byte 0xff at 11"),
    ],
)
def test_broken_files_are_named(content, message, tmp_path):
    file = tmp_path / "own.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        LabelledText(str(file)).examples("train")


def test_what_does_not_exist_or_fit_is_refused(tmp_path):
    with pytest.raises(UserError, match="is called 'sst-3'; the sets are sst-2, sst-5, banking77, imdb"):
        LabelledText("sst-3").examples("train")
    with pytest.raises(UserError, match="batch_size must be at least 1, got 0"):
        LabelledText(batch_size=0)
    (tmp_path / "train.csv").write_text(ROWS)
    (tmp_path / "test.csv").write_text("text,label\nso so,mixed\n")
    with pytest.raises(UserError, match=r"the test split of .* has 'mixed', which training lacks"):
        LabelledText(str(tmp_path)).examples("train")
    (tmp_path / "test.csv").write_text("text,label\nso so,good\n")
    with pytest.raises(UserError, match="has 36 texts to train on, fewer than batch_size 64"):
        LabelledText(str(tmp_path), batch_size=64).train_dataloader()
    lines = tmp_path / "lines"
    lines.write_text("1 fine\nnonsense\n")
    with pytest.raises(UserError, match="line 2: expected a label, a space and a text, got 'nonsense'"):
        labelled_text.read_lines(lines)
