import hashlib
import zipfile

import numpy as np
import pytest
import torch

from routerzoo.data import TextData
from routerzoo.data.download import download, extract_member
from routerzoo.data.text import TEXT_SETS, TextSet
from routerzoo.data.tokens import IGNORED_TARGET, Span, Windows, encode_words
from routerzoo.errors import UserError


def sha256(content):
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def test_a_download_is_whole_or_not_there(server, tmp_path):
    folder, address = server
    (folder / "corpus").write_bytes(b"to be or not to be")
    path = tmp_path / "cache" / "corpus"
    with pytest.raises(
        UserError, match=r"cannot download corpus from .* \(SHA256 hash of .* does not match .* but got \w+\)\. If"
    ):
        download([f"{address}/corpus"], path, sha256(b"something else"))
    assert not path.exists()
    assert [file.name for file in path.parent.iterdir()] == ["corpus.lock"]
    download([f"{address}/missing", f"{address}/corpus"], path, sha256(b"to be or not to be"))
    assert path.read_bytes() == b"to be or not to be"
    assert path.stat().st_mode & 0o777 == 0o644
    (folder / "corpus").unlink()
    download([f"{address}/corpus"], path, sha256(b"to be or not to be"))  # it is there
    path.write_bytes(b"a user's own")
    download([f"{address}/corpus"], path, sha256(b"to be or not to be"))
    assert path.read_bytes() == b"a user's own"


def test_a_download_that_cannot_be_had_says_where_to_put_the_file(tmp_path):
    with pytest.raises(UserError, match=r"Connection refused.*\. If you have the file, put it at .*corpus$"):
        download(["http://127.0.0.1:9/corpus"], tmp_path / "corpus", None)


def test_a_broken_archive_is_refused_by_name(tmp_path):
    archive = tmp_path / "a.zip"
    archive.write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"a.zip is a broken archive .*; delete .*a.zip"):
        extract_member(archive, "corpus", tmp_path / "corpus")
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("../../outside", "x")
    with pytest.raises(UserError, match="holds no file corpus"):
        extract_member(archive, "corpus", tmp_path / "corpus")
    assert not (tmp_path.parent / "outside").exists()


def test_a_published_set_is_downloaded_checked_and_cut(server, tmp_path, monkeypatch):
    folder, address = server
    content = b"abcdefghij" * 10
    with zipfile.ZipFile(folder / "tiny.zip", "w") as zipped:
        zipped.writestr("tiny", content)
    tiny = TextSet(
        "bytes", "bpc", ("tiny",), ((f"{address}/tiny.zip",),), (sha256(content),), "tiny.zip", splits=(80, 90)
    )
    monkeypatch.setitem(TEXT_SETS, "tiny", tiny)
    data = TextData("tiny", root=str(tmp_path / "root"), sequence_length=8, batch_size=2)
    assert [len(data.stream(split)) for split in ("train", "val", "test")] == [80, 10, 10]
    assert data.metric == "bpc"
    part = TextData("tiny", root=str(tmp_path / "root"), max_bytes=60, sequence_length=8, batch_size=2)
    assert [bytes(part.stream(split)) for split in ("train", "val", "test")] == [content[:54], b"efg", b"hij"]
    assert part.metric == "bpc"
    with pytest.raises(UserError, match=r"max_bytes is 101, and .*tiny has only 100 bytes"):
        TextData("tiny", root=str(tmp_path / "root"), max_bytes=101).stream("train")
    broken = TextSet(
        "bytes", "bpc", ("tiny",), ((f"{address}/tiny.zip",),), (sha256(b"other"),), "tiny.zip", splits=(80, 90)
    )
    monkeypatch.setitem(TEXT_SETS, "tiny", broken)
    with pytest.raises(UserError, match="is not the published file"):
        TextData("tiny", root=str(tmp_path / "other")).stream("train")
    assert not (tmp_path / "other" / "language" / "tiny" / "tiny").exists()


def test_a_part_is_taken_of_one_file_only(tmp_path):
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.txt").write_text("some words\n")
    with pytest.raises(UserError, match=r"max_bytes cuts a corpus in one file, and .* has three"):
        TextData(str(tmp_path), max_bytes=5).stream("train")
    with pytest.raises(UserError, match="max_bytes must be at least 1, got 0"):
        TextData(max_bytes=0)


def test_published_sets_have_checksums_and_splits():
    for name, published in TEXT_SETS.items():
        if name == "tiny-shakespeare":
            continue
        assert published.urls
        assert published.archive_checksum is not None or all(published.file_checksums)
    assert TEXT_SETS["enwik8"].splits == TEXT_SETS["text8"].splits == (90_000_000, 95_000_000)


def test_the_bundled_text_is_the_known_one():
    data = TextData()
    path = data._spans("tiny-shakespeare")["train"].path
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    sizes = [len(data.stream(split)) for split in ("train", "val", "test")]
    assert sum(sizes) == 1_115_394
    assert sizes[0] == int(1_115_394 * 0.9)
    assert isinstance(data.stream("train"), np.memmap)
    # Entropy of the byte frequencies, with the validation split's own it would be a little less.
    assert data.unigram_baseline() / np.log(2) == pytest.approx(4.808, abs=1e-3)


def test_evaluation_predicts_every_token_but_the_first_once():
    stream = np.arange(1, 24, dtype=np.uint8)
    windows = Windows(stream, 5, training=False, name="it")
    targets = torch.cat([targets for _, targets in windows])
    assert targets[targets != IGNORED_TARGET].tolist() == list(range(2, 24))


def test_training_windows_do_not_overlap_and_move_with_the_epoch():
    stream = np.arange(100, dtype=np.uint8)
    windows = Windows(stream, 8, training=True, name="it")
    starts = []
    for epoch in range(5):
        seen = torch.cat([windows[epoch, i][0] for i in range(len(windows))])
        assert len(set(seen.tolist())) == len(seen)
        ids, targets = windows[epoch, 0]
        assert torch.equal(targets, ids + 1)
        starts.append(int(ids[0]))
    assert len(set(starts)) > 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"text with a \0 byte", "is not UTF-8 text: byte 0x00 at position 12"),
        (b"\xff\xfe text", "is not UTF-8 text: byte 0xff at position 0"),
        (b"ab", "too few to be cut"),
    ],
)
def test_bad_texts_are_refused_in_a_sentence(tmp_path, content, message):
    path = tmp_path / "corpus.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        TextData(str(path)).prepare_data()


def test_a_short_text_names_the_way_out(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("to be or not to be " * 10)
    with pytest.raises(UserError, match="too few for one window of sequence_length 256; choose a smaller one"):
        TextData(str(path)).setup("fit")
    with pytest.raises(UserError, match="fewer than batch_size 64"):
        TextData(str(path), sequence_length=8, batch_size=64).train_dataloader()


def test_unknown_and_unreadable_sets_are_named(tmp_path):
    with pytest.raises(UserError, match="no data set or file is called 'enwik9'; the data sets are tiny-shakespeare"):
        TextData("enwik9").prepare_data()
    with pytest.raises(UserError, match=r"holds no files: it should have train.txt, val.txt and test.txt, or files"):
        TextData(str(tmp_path)).prepare_data()
    (tmp_path / "train.txt").write_text("some words")
    with pytest.raises(UserError, match=r"lacks val.txt, test.txt; a text folder has"):
        TextData(str(tmp_path)).prepare_data()


def test_words_come_from_the_training_split_alone(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "train.txt").write_text("a b a\nc a\n")
    (folder / "val.txt").write_text("a d b\n")
    (folder / "test.txt").write_text("d\n")
    data = TextData(str(folder), tokenizer="words", root=str(tmp_path / "root"))
    assert data.metric == "ppl"
    assert data._words().words == ["a", "<eos>", "b", "c", "<unk>"]
    assert data.decode(data.stream("val")) == "a <unk> b <eos>"
    assert data.token_counts().tolist() == [3, 2, 1, 1, 0]
    assert data.encode("c zebra").tolist() == [3, 4]
    with pytest.raises(UserError, match="the prompt '  ' has no token"):
        data.encode("  ")


def test_words_are_encoded_once_and_anew_when_a_file_changes(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("a b c\n")
    splits = {split: [Span(path)] for split in ("train", "val", "test")}
    first = encode_words(splits, tmp_path / "encoded")
    assert encode_words(splits, tmp_path / "encoded").folder == first.folder
    path.write_text("a b c d\n")
    assert "d" in encode_words(splits, tmp_path / "encoded").words
    limited = encode_words(splits, tmp_path / "encoded", max_words=3)
    assert len(limited.words) == 3
    assert limited.words[-1] == "<unk>"


def test_words_are_those_of_whole_characters(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("é " * 200)
    data = TextData(str(path), tokenizer="words", root=str(tmp_path / "root"), max_bytes=301)
    assert data._words().words == ["é", "<eos>", "<unk>"]
    path.write_bytes((b"a" * 1023 + b" ") * 1024 + b"\xff " + b"a" * 100_000)
    with pytest.raises(UserError, match=r"text.txt is not UTF-8 text at byte 1048576: invalid start byte"):
        TextData(str(path), tokenizer="words", root=str(tmp_path / "root")).prepare_data()


def test_an_interrupted_encoding_leaves_nothing_finished(tmp_path, monkeypatch):
    path = tmp_path / "train.txt"
    path.write_text("a b c\n")
    splits = {split: [Span(path)] for split in ("train", "val", "test")}
    monkeypatch.setattr("routerzoo.data.tokens._write_stream", lambda *args: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        encode_words(splits, tmp_path / "encoded")
    monkeypatch.undo()
    assert len(encode_words(splits, tmp_path / "encoded").stream("train")) == 4


def test_the_order_depends_on_seed_and_epoch_alone_and_resumes():
    def ids(loader):
        return [batch.ids_BS[:, 0].tolist() for batch in loader]

    def loader(seed=0):
        return TextData(sequence_length=512, batch_size=64, seed=seed).train_dataloader()

    before = torch.random.get_rng_state()
    whole = ids(loader())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert ids(loader()) == whole
    assert ids(loader(seed=1)) != whole
    other_epoch = loader()
    other_epoch.sampler.set_epoch(1)
    assert ids(other_epoch) != whole
    stopped = loader()
    iterator = iter(stopped)
    for _ in range(10):
        next(iterator)
    resumed = loader()
    resumed.load_state_dict(stopped.state_dict())
    assert ids(resumed) == whole[10:]
    assert ids(resumed) == whole  # the epoch after starts at its beginning


def test_prompts_default_to_the_test_split():
    (prompt,) = TextData().predict_dataloader()
    assert prompt.shape == (1, 64)
    prompts = [batch.tolist() for batch in TextData(prompts=["To be", "é"]).predict_dataloader()]
    assert prompts == [[list(b"To be")], [list("é".encode())]]
