"""The texts of the realistic tier are what they seem, and what is evaluated on has not been trained on."""

import itertools
import json
import random
import re
from datetime import datetime
from xml.etree import ElementTree

import pytest
import torch

from routerzoo.bench.realistic.byte_model import ByteLanguageModel, PackedByteLanguageModel
from routerzoo.bench.realistic.generated import GENERATED, generated_bytes
from routerzoo.bench.realistic.sources import of_files, play, python
from routerzoo.errors import UserError


def pieces(name, count=50):
    return list(itertools.islice(GENERATED[name](random.Random(0)), count))


@pytest.mark.parametrize("name", GENERATED)
def test_generated_text_follows_from_its_seed(name):
    text = generated_bytes(name, 2000, 1)
    assert len(text) == 2000
    assert text.isascii()
    assert generated_bytes(name, 1000, 1) == text[:1000]
    assert generated_bytes(name, 2000, 2) != text


def test_sums_are_right():
    for line in pieces("arithmetic"):
        a, sign, b, result = re.fullmatch(r"(\d+) ([-+*%]) (\d+) = (-?\d+)\n", line).groups()
        a, b = int(a), int(b)
        assert int(result) == {"+": a + b, "-": a - b, "*": a * b, "%": a % b}[sign]


def test_records_markup_logs_and_tables_are_well_formed():
    for record in pieces("json"):
        assert {"id", "name", "position"} < json.loads(record.rstrip(",\n")).keys()
    lines = pieces("markup", 500)
    ends = [place for place, line in enumerate(lines) if re.match(r"</", line)]
    assert len(ElementTree.fromstring("<all>" + "".join(lines[: ends[-1] + 1]) + "</all>")) > 5
    times = [datetime.fromisoformat(line.split()[0]) for line in pieces("logs")]
    assert times == sorted(times)
    assert {line.count(",") for line in pieces("tables")} == {5}


def test_real_text_is_real_and_split():
    assert b"First Citizen" in play().train
    assert len(play().test) / len(play().train + play().test) == pytest.approx(0.1, abs=1e-4)
    assert b"def " in python().test
    assert python().test[:2000] not in python().train


def test_every_tenth_file_is_held_out(tmp_path):
    for number in range(20):
        (tmp_path / f"{number:02}.txt").write_text(f"<{number}>")
    text = of_files(sorted(tmp_path.iterdir()), "numbers", "mine")
    assert text.test == b"<0><10>"
    assert text.train.startswith(b"<1><2>")
    few = of_files(sorted(tmp_path.iterdir())[:2], "numbers", "mine")
    assert few.train + few.test == b"<0><1>"  # cut by position
    with pytest.raises(UserError, match=r"the domain mine has no file \(numbers\): name other domains"):
        of_files([], "numbers", "mine")


@pytest.fixture
def own(tmp_path):
    """Two domains whose bytes say which they are, and which split they are from."""
    for name, train, test in (("a", "a", "A"), ("b", "b", "B")):
        (tmp_path / name).write_text(train * 9000 + test * 1000)
    return f"one={tmp_path / 'a'},two={tmp_path / 'b'}"


def texts(batch, length):
    return ["".join(map(chr, ids)) for ids in batch.x.view(-1, length).tolist()]


def test_a_micro_batch_is_of_one_domain_and_evaluation_of_all_on_other_text(own):
    task = ByteLanguageModel.with_options(own)(0)
    assert (task.num_domains, task.num_experts, task.name) == (2, 4, "bytes-one-two")
    batch = task.batch(task.tokens, task.generator("training"), 0.5)
    shown = texts(batch, 64)
    assert set("".join(shown)) == {"a", "b"}
    parts = batch.split(task.micro_batches)
    assert [len(part.domain_T) for part in parts] == [128] * 8
    for part in parts:
        (domain,) = part.domain_T.unique().tolist()
        assert set("".join(texts(part, 64))) == {"ab"[domain]}
    assert torch.equal(batch.target.view(-1, 64)[:, :-1], batch.x[:, 1:])
    held_out = task.batch(256, task.generator("evaluation"), 1.0)
    assert [text[0] for text in texts(held_out, 64)] == ["A", "B", "A", "B"]
    assert set("".join(texts(task.batch(256, task.generator("curve"), 0.1), 64))) == {"A", "B"}


def test_packed_documents_have_a_boundary_and_labels_on_both_sides(own):
    task = PackedByteLanguageModel.with_options(own)(0)
    batch = task.batch(task.tokens, task.generator("training"), 0.0)
    labels = ["".join("ab"[domain] for domain in domains) for domains in batch.domain_T.view(-1, 64).tolist()]
    assert labels == texts(batch, 64)
    changes = [sum(a != b for a, b in itertools.pairwise(label)) for label in labels]
    assert set(changes) == {0, 1}
    assert all(16 <= label.index(label[-1]) <= 48 for label, n in zip(labels, changes, strict=True) if n)


def test_runs_of_a_seed_see_the_same_text_and_seeds_differ(own):
    def first(seed):
        task = ByteLanguageModel.with_options("arithmetic,logs")(seed)
        return task.batch(task.tokens, task.generator("training"), 0.0).x

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))
    assert ByteLanguageModel.with_options(own).data() != ByteLanguageModel.with_options("play,logs").data()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("play", "a mix has at least two domains, each with a name of its own, got play"),
        ("play,play=x.txt", "a mix has at least two domains, each with a name of its own"),
        ("play,lgos", "unknown domain 'lgos'; did you mean 'logs'"),
        ("play,mine=no/such/file", "cannot read no/such/file of the domain mine: No such file"),
    ],
)
def test_domains_that_cannot_be_read_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        ByteLanguageModel.with_options(options)


def test_a_domain_of_too_little_text_is_refused(tmp_path):
    (tmp_path / "short").write_text("only a few words")
    with pytest.raises(UserError, match="the domain short has 14 bytes to train on and 2 to evaluate on, fewer than a"):
        ByteLanguageModel.with_options(f"play,short={tmp_path / 'short'}")
