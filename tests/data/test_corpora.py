"""Corpora of documents: what is read, how it is encoded, and what is refused."""

import gzip
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer

from routerzoo import LanguageModeling, LinearRouter
from routerzoo.cli.checkpoints import run_name
from routerzoo.data import TextData, shards
from routerzoo.data.documents import Piece, find_pieces, grouped, read, split_of, text_pieces
from routerzoo.data.shards import Reading, TokenStream, encode_corpus
from routerzoo.data.tokenizer import ByteTokenizer, SubwordTokenizer, load_tokenizer, train_bpe
from routerzoo.data.tokens import Span, collate
from routerzoo.errors import UserError
from routerzoo.models.decoder import Decoder
from tests.tasks.test_tasks import QUIET

TEXTS = [
    f"The {name} number {index}: é\n\n{'many words ' * (index % 5)}" for index in range(40) for name in ("ox", "hen")
]


def write_jsonl(path, texts, field="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": 1, field: text}, ensure_ascii=False) + "\n" for text in texts))
    return path


@pytest.fixture
def corpus(tmp_path):
    return str(write_jsonl(tmp_path / "corpus" / "all.jsonl", TEXTS).parent)


def data_of(corpus, tmp_path, **options):
    return TextData(corpus, **{"root": str(tmp_path / "root"), "sequence_length": 16, "batch_size": 2, **options})


def all_texts(corpus, field="text"):
    return [document.text for piece in find_pieces(str(corpus)) for document in read(piece, field)]


def test_documents_are_the_same_in_every_format(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr("routerzoo.data.documents.PIECE_BYTES", 500)
    lines = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    packed = pyarrow.Codec("zstd").compress(lines.read_bytes(), asbytes=True)
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    table = pyarrow.table({"text": TEXTS, "id": list(range(len(TEXTS)))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        assert all_texts(tmp_path / name) == TEXTS
    assert len(find_pieces(str(lines))) > 5
    assert len(find_pieces(str(tmp_path / "a.parquet"))) > 5
    assert all_texts(write_jsonl(tmp_path / "b.jsonl", TEXTS, "content"), "content") == TEXTS
    (tmp_path / "a.jsonl.zst").write_bytes(packed[:-100])
    with pytest.raises(UserError, match=r"a.jsonl.zst is a truncated or damaged .zst file"):
        all_texts(tmp_path / "a.jsonl.zst")


def test_pieces_of_running_text_are_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("routerzoo.data.documents.PIECE_BYTES", 300)
    monkeypatch.setattr("routerzoo.data.documents.BLOCK_BYTES", 100)
    path = tmp_path / "a.txt"
    text = "é" * 401 + "\n" + "\n".join(TEXTS)
    path.write_text(text)
    start = 1  # in the first character, which belongs to what is before
    pieces = text_pieces(Span(path, start), "train")
    parts = [part for piece in pieces for part in read(piece, "")]
    assert len(pieces) > 3
    assert "".join(part.text for part in parts) == text[1:]
    assert sum(part.num_bytes for part in parts) == len(text.encode()) - 2
    assert [part.begins for part in parts] == [True] + [False] * (len(parts) - 1)
    assert [part.ends for part in parts] == [False] * (len(parts) - 1) + [True]


def test_splits_come_from_names_or_else_from_content(tmp_path):
    for name in ("train-00000.jsonl", "validation.jsonl", "test.jsonl"):
        write_jsonl(tmp_path / "named" / name, [name])
    assert {Path(piece.name).name: piece.split for piece in find_pieces(str(tmp_path / "named"))} == {
        "train-00000.jsonl": "train",
        "validation.jsonl": "val",
        "test.jsonl": "test",
    }
    # Folders are named as data sets of Hugging Face have them; those above the corpus do not count.
    folder = tmp_path / "train" / "c"
    for name in ("train/a.jsonl", "Validation/x/test.jsonl", "test/a.jsonl"):
        write_jsonl(folder / name, [name])
    for corpus in (str(folder), f"{folder}/**/*.jsonl"):
        assert {str(Path(piece.name).relative_to(folder)): piece.split for piece in find_pieces(corpus)} == {
            "train/a.jsonl": "train",
            "Validation/x/test.jsonl": "val",
            "test/a.jsonl": "test",
        }
    assert [piece.split for piece in find_pieces(f"{folder}/train/*.jsonl")] == [None]
    write_jsonl(tmp_path / "dealt" / "b.jsonl", TEXTS)
    assert [piece.split for piece in find_pieces(f"{tmp_path}/dealt/*.jsonl")] == [None]
    dealt = [split_of(f"document {index}") for index in range(4000)]
    assert dealt.count("train") / 4000 == pytest.approx(0.9, abs=0.02)
    assert dealt.count("val") / 4000 == pytest.approx(0.05, abs=0.01)
    # A text file of a pattern is cut by position.
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("x" * 100)
    pieces = find_pieces(f"{tmp_path}/texts/*")
    assert [(p.split, p.start, p.end) for p in pieces] == [("train", 0, 90), ("val", 90, 95), ("test", 95, 100)]


def test_many_text_files_are_dealt_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("routerzoo.data.documents.BLOCK_BYTES", 20)
    texts = {f"{index}.txt": f"document {index}\r\n" + "é" * index for index in range(120)}
    (tmp_path / "c").mkdir()
    for name, text in texts.items():
        (tmp_path / "c" / name).write_bytes(text.encode())
    (tmp_path / "c" / "empty.txt").touch()
    (tmp_path / "c" / "README.md").write_text("# No document")
    data = data_of(str(tmp_path / "c"), tmp_path)
    content = b"".join(bytes(data.stream(split)[:]) for split in ("train", "val", "test"))
    found = [text.decode() for text in content.split(b"\xff")[1:]]
    assert sum(data.counts(split).documents for split in ("train", "val", "test")) == 120
    assert data.counts("train").documents < 120
    assert sorted(found) == sorted(texts.values())
    # They share shards, so that as many files are not written as are read.
    assert len(list(data.shard_folders[0].iterdir())) == 4


def test_small_files_share_a_shard_of_their_split(monkeypatch):
    monkeypatch.setattr("routerzoo.data.documents.PIECE_BYTES", 100)
    sizes = [(60, None), (40, None), (1, None), (300, None), (1, "train"), (1, "val")]
    pieces = [Piece("jsonl", str(place), split, size=size) for place, (size, split) in enumerate(sizes)]
    assert [[piece.size for piece in group] for group in grouped(pieces)] == [[60, 40], [1], [300], [1], [1]]


def test_a_corpus_is_the_same_from_any_folder(corpus, tmp_path, monkeypatch):
    absolute = data_of(corpus, tmp_path)._store(corpus).folder
    monkeypatch.chdir(tmp_path)
    assert data_of("corpus/*.jsonl", tmp_path)._store("corpus/*.jsonl").folder == absolute


def test_files_that_change_while_they_are_read_are_refused(corpus, tmp_path):
    class Slow(ByteTokenizer):
        def encode(self, texts):
            os.utime(Path(corpus) / "all.jsonl", (1, 1))
            return super().encode(texts)

    with pytest.raises(UserError, match="files of it have changed while they were read: run the command again"):
        encoded(corpus, tmp_path / "encoded", Slow())
    encoded(corpus, tmp_path / "encoded")


def test_a_byte_level_bpe_returns_every_text(tmp_path):
    train_bpe(TEXTS, 300, tmp_path / "t.json")
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    texts = ["\r\n a\r", "\0", " ", "漢字 😀\u200d", "\ufeff", "e\u0301 é", "\u2028", "<|endoftext|>", ""]
    assert [tokenizer.decode(ids.tolist()) for ids in tokenizer.encode(texts)] == texts


def test_the_default_prompt_ends_with_its_document(tmp_path):
    for split in ("train", "val", "test"):
        write_jsonl(tmp_path / "c" / f"{split}.jsonl", ["ab", "cdé"])
    (prompt,) = data_of(str(tmp_path / "c"), tmp_path).predict_dataloader()
    assert prompt.tolist() == [[255, *b"ab"]]


def test_no_text_is_encoded_as_the_mark_of_a_document():
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"?": 0, "<s>": 1, "<": 2, "s>": 3, "a": 4, "</s>": 5}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = SubwordTokenizer(backend, (1,), (5,)).encode(["a <s> a", "a b", "</s>"])
    assert [ids.tolist() for ids in found] == [[4, 2, 3, 4], [4, 0], [2, 0]]
    with pytest.raises(UserError, match=r"the tokenizer encodes text as \?, which is to begin or end documents: take"):
        SubwordTokenizer(backend, (0,)).encode(["a b"])


def test_tokens_are_documents_with_a_start_and_their_bytes_are_counted(tmp_path):
    for split, texts in {"train": ["ab", "  ", "cdé", None], "val": ["x"], "test": ["yz"]}.items():
        write_jsonl(tmp_path / "c" / f"{split}.jsonl", texts)
    data = data_of(str(tmp_path / "c"), tmp_path, sequence_length=2)
    assert data.stream("train")[:].tolist() == [255, *b"ab", 255, *"cdé".encode()]
    assert data.counts("train") == (8, 2, 6)
    assert data.bytes_per_token("train") == 6 / 7  # the first token is not predicted
    assert data.bytes_per_token("test") == 1
    assert data.metric == "bpb"
    assert data.encode("ab").tolist() == [255, *b"ab"]
    assert data.decode(data.encode("ab")) == "ab"
    longer = data_of(str(tmp_path / "c"), tmp_path, min_bytes=2)
    with pytest.raises(
        UserError,
        match=r"the val split of .* has no document of at least 2 bytes \(left out as too short: 3\): add documents or",
    ):
        longer.prepare_data()
    assert data_of(str(tmp_path / "c"), tmp_path, max_bytes=2).counts("train") == (3, 1, 2)


def test_a_bpe_is_trained_once_on_the_training_split(tmp_path):
    def data(size="bpe-400"):
        return TextData(tokenizer=size, root=str(tmp_path), max_bytes=60_000)

    first = data()
    assert first.vocab_size == 400
    raw = TextData(max_bytes=60_000)
    for split in ("train", "val", "test"):
        assert first.decode(first.stream(split)[:]) == raw.decode(raw.stream(split))
        assert first.bytes_per_token(split) == len(raw.stream(split)) / (len(first.stream(split)) - 1)
    path = first.trained_tokenizer
    changed = path.stat().st_mtime_ns
    assert data().trained_tokenizer == path
    assert path.stat().st_mtime_ns == changed
    again = TextData(tokenizer=str(path), root=str(tmp_path), max_bytes=60_000)
    assert again._store("tiny-shakespeare").folder == first._store("tiny-shakespeare").folder
    special = first.encode("<|endoftext|>").tolist()
    assert special[0] == 0
    assert 0 not in special[1:]  # no text is encoded as the start of a document
    assert first.token_counts().sum() == len(first.stream("train"))
    assert again.tokenizer_digest == first.tokenizer_digest
    assert data("bpe-300").tokenizer_digest != first.tokenizer_digest


def test_words_know_their_bytes(tmp_path):
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.txt").write_text(" ab c\nd\n")
    data = TextData(str(tmp_path), tokenizer="words", root=str(tmp_path / "root"))
    assert data.bytes_per_token("val") == 5 / 4  # "ab" is not predicted; " c", "\n", "d", "\n" are


class LogTraining(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.bpb = float(trainer.callback_metrics["train/bpb"])


def test_perplexity_comes_with_bits_per_byte(corpus, tmp_path):
    data = data_of(corpus, tmp_path, tokenizer="bpe-300")
    task = LanguageModeling(
        data.metric, vocab_size=data.vocab_size, num_blocks=1, d_model=8, num_heads=1, num_experts=2, max_length=16
    )
    torch.nn.init.zeros_(task.net.head.weight)  # every token is as likely as any other
    trainer = Trainer(**{**QUIET, "limit_val_batches": 1.0})
    (found,) = trainer.validate(task, data, verbose=False)
    assert found["val/ppl"] == pytest.approx(data.vocab_size, rel=1e-4)
    counts = data.counts("val")
    bits = (counts.tokens - 1) * math.log2(data.vocab_size)
    assert found["val/bpb"] == pytest.approx(bits / counts.bytes, rel=1e-4)
    assert task.baseline(data)[1] > 1
    small = LanguageModeling("ppl", vocab_size=290, num_blocks=1, d_model=8, num_heads=1, num_experts=2, max_length=16)
    with pytest.raises(UserError, match="the tokenizer bpe-300 has 300 token ids, and the model only 290: set the"):
        trainer.validate(small, data, verbose=False)


def test_the_marks_of_documents_are_no_bytes(corpus, tmp_path):
    data = data_of(corpus, tmp_path)
    task = LanguageModeling(num_blocks=1, d_model=8, num_heads=1, num_experts=2, max_length=16)
    torch.nn.init.zeros_(task.net.head.weight)
    (found,) = Trainer(**{**QUIET, "limit_val_batches": 1.0}).validate(task, data, verbose=False)
    counts = data.counts("val")
    assert found["val/bpb"] == pytest.approx(8 * (counts.tokens - 1) / counts.bytes, rel=1e-6)
    assert task.baseline(data)[1] == pytest.approx(data.unigram_baseline() / math.log(2) / data.bytes_per_token("val"))
    record = LogTraining()
    Trainer(**{**QUIET, "max_steps": 1, "callbacks": [record], "limit_val_batches": 0}).fit(task, data)
    assert record.bpb == pytest.approx(8 / data.bytes_per_token("train"), rel=1e-6)


def test_a_stream_of_shards_is_the_whole():
    whole = np.arange(20)
    stream = TokenStream([whole[:7], whole[7:8], whole[8:8], whole[8:]])
    assert len(stream) == 20
    for start in range(20):
        for stop in range(start, 23):
            assert stream[start:stop].tolist() == whole[start:stop].tolist()


def encoded(corpus, folder, tokenizer=None):
    return encode_corpus("it", find_pieces(corpus), tokenizer or ByteTokenizer(), Reading(), folder)


def test_a_corpus_is_encoded_once_in_pieces_and_continued(corpus, tmp_path, monkeypatch):
    whole = encoded(corpus, tmp_path / "whole").stream("train")[:]
    monkeypatch.setattr("routerzoo.data.documents.PIECE_BYTES", 600)

    class Killed(ByteTokenizer):
        calls = 0

        def encode(self, texts):
            Killed.calls += 1
            if Killed.calls == 3:
                raise KeyboardInterrupt
            return super().encode(texts)

    with pytest.raises(KeyboardInterrupt):
        encoded(corpus, tmp_path / "encoded", Killed())
    store = encoded(corpus, tmp_path / "encoded", Killed())
    pieces = len(find_pieces(corpus))
    assert pieces > 4
    assert Killed.calls == pieces + 1  # each piece once, but for the one that was interrupted
    assert store.stream("train")[:].tolist() == whole.tolist()
    assert not list(store.folder.glob("*.part"))
    (first, second, third), size = store.shards["train"][:3], whole.nbytes
    first.path.unlink()
    store = encoded(corpus, tmp_path / "encoded", Killed())
    assert Killed.calls == pieces + 2
    assert store.stream("train")[:].nbytes == size
    with second.path.open("r+b") as file:
        file.truncate(10)
    with pytest.raises(UserError, match=r"shard .*bin has 10 bytes, not \d+: delete it, and it is made again"):
        encoded(corpus, tmp_path / "encoded", Killed())
    second.path.unlink()
    store = encoded(corpus, tmp_path / "encoded", Killed())
    content = bytearray(third.path.read_bytes())
    content[5] ^= 1
    third.path.write_bytes(content)
    shards._open.cache_clear()
    shards._VERIFIED.clear()
    with pytest.raises(UserError, match=r"shard .*bin has changed since it was written: delete it, and"):
        store.verify()
    (store.folder / "00000.json").write_text("{")  # is made again
    encoded(corpus, tmp_path / "encoded", Killed())
    assert Killed.calls == pieces + 4


def test_an_epoch_resumes_in_its_middle(corpus, tmp_path):
    def loader():
        return data_of(corpus, tmp_path, documents="separate", seed=3).train_dataloader()

    whole = [batch.ids_BS.tolist() for batch in loader()]
    stopped = loader()
    batches = iter(stopped)
    for _ in range(5):
        next(batches)
    resumed = loader()
    resumed.load_state_dict(stopped.state_dict())
    assert [batch.ids_BS.tolist() for batch in resumed] == whole[5:]


def test_batches_know_documents():
    windows = [(torch.tensor([7, 0, 8, 9]), torch.zeros(4)), (torch.tensor([0, 5, 0, 0]), torch.zeros(4))]
    batch = collate(windows, start_id=0, attend_across=False)
    assert batch.sequence_ids_BS.tolist() == [[0, 1, 1, 1], [2, 2, 3, 4]]
    assert not batch.attend_across
    assert collate(windows).sequence_ids_BS is None


def test_separate_documents_are_as_alone():
    torch.manual_seed(0)
    net = Decoder(50, LinearRouter, num_experts=4, d_model=16, num_blocks=2, num_heads=2, max_length=12).eval()
    ids_BS = torch.randint(50, (2, 12))
    sequence_ids_BS = torch.tensor([[0] * 5 + [1] * 7, [2] * 3 + [3] * 9])
    logits_BSV, context = net(ids_BS, sequence_ids_BS=sequence_ids_BS, attend_across=False)
    for row, start, end in ((0, 0, 5), (0, 5, 12), (1, 0, 3), (1, 3, 12)):
        alone_BSV, _ = net(ids_BS[row : row + 1, start:end])
        torch.testing.assert_close(alone_BSV[0], logits_BSV[row, start:end])
    assert context.positions.view(2, 12).tolist() == [[*range(5), *range(7)], [*range(3), *range(9)]]
    assert context.sequence_ids.tolist() == sequence_ids_BS.flatten().tolist()
    marked_BSV, context = net(ids_BS, sequence_ids_BS=sequence_ids_BS)
    assert torch.equal(marked_BSV, net(ids_BS)[0])
    assert context.sequence_ids.tolist() == sequence_ids_BS.flatten().tolist()


def test_a_model_trains_on_separate_documents(corpus, tmp_path):
    data = data_of(corpus, tmp_path, documents="separate")
    task = LanguageModeling(num_blocks=1, d_model=8, num_heads=1, num_experts=2, max_length=16)
    Trainer(**{**QUIET, "max_steps": 2}).fit(task, data)
    (prompt,) = data.predict_dataloader()
    assert prompt[0, 0] == 255


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"a.csv": "x"}, {}, "a.csv is of an unknown type: corpora are files of .txt, .text, .md, .jsonl, .*; leave"),
        ({}, {}, "c holds no files: it should have train.txt, val.txt and test.txt, or files of documents"),
        ({"a.jsonl": ""}, {}, "c is empty"),
        (
            {"a.jsonl": '{"text": " "}\n'},
            {},
            r"the val split of .* has no document \(left out as empty: 1\): add documents$",
        ),
        ({"a.jsonl": '{"text": "a"}\n{"te'}, {}, r"a.jsonl, in the line at byte 14: no JSON"),
        ({"a.jsonl": "[1]\n"}, {}, "a.jsonl, in the line at byte 0: a list, where each line has an object"),
        ({"a.jsonl": '{"body": "a", "n": 1}'}, {}, r"no field 'text'; there are body, n \(text_field\)"),
        ({"a.jsonl": '{"text": 3}'}, {}, "the field 'text' is a int, not a text"),
        ({"a.parquet": "PAR1"}, {}, "a.parquet is no Parquet file, or a truncated one"),
        ({"a.jsonl.gz": "x"}, {}, "a.jsonl.gz is a truncated or damaged .gz file"),
        ({"a.jsonl.zst": "x"}, {}, "a.jsonl.zst is a truncated or damaged .zst file"),
        ({"a.jsonl": "[" * 10_000}, {}, "a.jsonl, in the line at byte 0: no JSON, of which each line has an object"),
        ({"train.jsonl": "", "val.jsonl": "", "more.jsonl": ""}, {}, "more.jsonl belongs to no split: name it train"),
        ({"train.jsonl": "", "test.jsonl": ""}, {}, "c has files for training and for testing, but none whose name"),
        ({"a.jsonl": "x"}, {"tokenizer": "words"}, "words are those of running text, and .*c has documents"),
        ({"a.jsonl": "x"}, {"tokenizer": "bpe-100"}, "bpe-100 is too small: a byte-level BPE has at least 257 ids"),
        (
            {"a.jsonl": "x"},
            {"tokenizer": "no.json"},
            "the tokenizer no.json does not exist: python -m routerzoo tokenize",
        ),
        ({"a.jsonl": "x"}, {"documents": "apart"}, "documents must be joined, marked or separate, got 'apart'"),
        ({"a.jsonl": "x"}, {"min_bytes": 0}, "min_bytes must be at least 1, got 0"),
    ],
)
def test_bad_corpora_are_refused_in_a_sentence(tmp_path, files, options, message):
    (tmp_path / "c").mkdir()
    for name, content in files.items():
        (tmp_path / "c" / name).write_text(content)
    with pytest.raises(UserError, match=message):
        data_of(str(tmp_path / "c"), tmp_path, **options).prepare_data()


def test_running_text_has_no_documents_to_separate():
    with pytest.raises(UserError, match="documents is 'separate', and tiny-shakespeare is running text: leave it out"):
        TextData(documents="separate")


@pytest.mark.parametrize(
    ("module", "corpus", "tokenizer"),
    [
        ("tokenizers", "tiny-shakespeare", "bpe-300"),
        ("transformers", "tiny-shakespeare", "gpt2"),
        ("pyarrow.parquet", "a.parquet", "bytes"),
        ("datasets", "hf:imdb", "bytes"),
    ],
)
def test_an_extra_that_is_missing_is_named(tmp_path, monkeypatch, module, corpus, tokenizer):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").write_text("PAR1")
    monkeypatch.setitem(sys.modules, module, None)
    package = module.partition(".")[0]
    with pytest.raises(UserError, match=rf"needs {package}: pip install 'routerzoo\[hf\]'"):
        data_of(corpus, tmp_path, tokenizer=tokenizer, max_bytes=None).prepare_data()


def test_a_damaged_tokenizer_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json is no tokenizer of the library tokenizers \("):
        load_tokenizer(str(path))


@pytest.mark.full
def test_a_tokenizer_of_transformers(corpus, tmp_path):
    from transformers import PreTrainedTokenizerFast

    train_bpe(TEXTS, 300, tmp_path / "tokenizer.json")
    plain = data_of(corpus, tmp_path, tokenizer=str(tmp_path / "tokenizer.json"))
    for name, special in {
        "gpt2-like": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
        "llama-like": {"bos_token": "<s>", "eos_token": "</s>"},
    }.items():
        wrapped = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), **special)
        wrapped.save_pretrained(tmp_path / name)
        data = data_of(corpus, tmp_path, tokenizer=str(tmp_path / name))
        assert data.decode(data.encode("two words é")) == "two words é"
        extra = 0 if name == "gpt2-like" else data.counts("train").documents
        assert len(data.stream("train")) == len(plain.stream("train")) + extra
    assert data.vocab_size == plain.vocab_size + 2
    with pytest.raises(UserError, match=r"there is no tokenizer '.*nowhere' \(.*\): take bytes, words, bpe-"):
        load_tokenizer(str(tmp_path / "nowhere"))


@pytest.mark.full
def test_data_sets_of_hugging_face(corpus, tmp_path):
    local = data_of(corpus, tmp_path)
    data = data_of(f"hf:{corpus}", tmp_path)
    for split in ("train", "val", "test"):
        assert data.counts(split) == local.counts(split)
        assert data.stream(split)[:].tolist() == local.stream(split)[:].tolist()
    few = data_of(f"hf:{corpus}", tmp_path, max_bytes=500)
    assert 500 <= sum(few.counts(split).bytes for split in ("train", "val", "test")) < 700
    folder = data._store(f"hf:{corpus}").folder
    os.utime(Path(corpus) / "all.jsonl", (1, 1))
    assert data_of(f"hf:{corpus}", tmp_path)._store(f"hf:{corpus}").folder != folder
    for name in ("train-0.jsonl", "train-1.jsonl", "validation.jsonl"):
        write_jsonl(tmp_path / "named" / name, [f"{name} {index}" for index in range(5)])
    named = data_of(f"hf:{tmp_path}/named", tmp_path)
    assert len(named.pieces(named.dataset)) == 3
    assert named.counts("train").documents == 10
    with pytest.raises(UserError, match=r"the test split of hf:.* has no document"):
        named.stream("test")
    card = "---\nconfigs:\n- config_name: en\n  data_files: en.jsonl\n- config_name: de\n  data_files: de.jsonl\n---\n"
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "README.md").write_text(card)
    write_jsonl(tmp_path / "two" / "en.jsonl", TEXTS)
    assert sum(data_of(f"hf:{tmp_path}/two:en", tmp_path).counts(s).documents for s in ("train", "val", "test")) == 80
    with pytest.raises(UserError, match=r"pick one among the available configs: \['en', 'de'\]"):
        data_of(f"hf:{tmp_path}/two", tmp_path).prepare_data()
    with (tmp_path / "two" / "en.jsonl").open("a") as file:
        file.write("{")
    with pytest.raises(UserError, match=r"datasets cannot load hf:.*two:en \("):
        data_of(f"hf:{tmp_path}/two:en", tmp_path).prepare_data()
    with pytest.raises(UserError, match=r"datasets cannot load hf:.*nowhere \("):
        data_of(f"hf:{tmp_path}/nowhere", tmp_path).prepare_data()


def test_a_pattern_of_paths_names_no_folder_with_a_star():
    def name(dataset):
        return run_name({"data": {"init_args": {"dataset": dataset}}, "model": {}})

    assert name("corpus/**/*.jsonl") == "corpus-LinearRouter"
    assert name("hf:allenai/c4:en") == "c4-en-LinearRouter"
    assert name(["a/b.txt", "*.txt"]) == "b+data-LinearRouter"


COMMAND = [sys.executable, "-m", "routerzoo", "tokenize"]


def tokenize(*arguments, **options):
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def contents(root):
    return {path.name: path.read_bytes() for path in root.glob("encoded/*/*") if path.suffix in (".bin", ".json")}


def write_large(folder, files=3, documents=3000):
    draw = np.random.default_rng(0)
    words = [bytes(draw.integers(97, 123, size).tolist()).decode() for size in draw.integers(2, 9, 3000)]
    for number in range(files):
        picks = draw.integers(0, len(words), (documents, 100))
        write_jsonl(folder / f"{number}.jsonl", [" ".join(words[index] for index in row) for row in picks])


@pytest.mark.full
def test_shards_are_the_same_in_parallel_and_after_kills(tmp_path):
    write_large(tmp_path / "c")
    train_bpe(TEXTS, 300, tmp_path / "t.json")
    arguments = [tmp_path / "c", "--tokenizer", tmp_path / "t.json"]
    tokenize(*arguments, "--root", tmp_path / "one")
    tokenize(*arguments, "--root", tmp_path / "two", "--workers", 2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    killed = 0
    while True:
        command = [*COMMAND, *map(str, arguments), "--root", str(tmp_path / "three")]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        finished = len(list(tmp_path.glob("three/encoded/*/*.json")))
        while process.poll() is None and len(list(tmp_path.glob("three/encoded/*/*.json"))) <= finished:
            time.sleep(0.05)
        time.sleep(0.05)
        process.kill()
        if process.wait() == 0:
            break
        killed += 1
    assert killed
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


MEMORY = """
import re, resource, sys
from pathlib import Path
from routerzoo.data import TextData

def anonymous():  # mapped files are no burden: the system drops their pages when it needs memory
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

data = TextData(sys.argv[1], tokenizer=sys.argv[2], root=sys.argv[3], sequence_length=1024, batch_size=8)
peak, before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, anonymous()
data.prepare_data()
encoding = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
largest = 0
for batches, batch in enumerate(data.train_dataloader(), 1):
    largest = max(largest, anonymous())
    if batches == 200:
        break
data.token_counts()
print(len(data.stream("train")), batches, encoding, max(largest, anonymous()) - before)
"""


@pytest.mark.full
def test_a_corpus_may_be_larger_than_memory(tmp_path):
    write_large(tmp_path / "c", files=1, documents=3000)
    line = (tmp_path / "c" / "0.jsonl").read_bytes()
    with (tmp_path / "c" / "0.jsonl").open("ab") as file:
        for number in range(300_000_000 // len(line)):
            file.write(line.replace(b'"text": "', b'"text": "%d ' % number))
    size = (tmp_path / "c" / "0.jsonl").stat().st_size
    assert size > 280_000_000
    train_bpe(TEXTS, 300, tmp_path / "t.json")
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "c"), "bytes", str(tmp_path / "root")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tokens, batches, *mebibytes = map(float, done.stdout.split())
    assert tokens > 240_000_000
    assert batches == 200
    assert max(mebibytes) < 100
