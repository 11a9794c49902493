"""The byte-level language model: scopes of balancing, the reference, and what its rows say."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from routerzoo import RoutingContext, auxiliary_loss
from routerzoo.__main__ import main
from routerzoo.bench.choices import RouterChoice, read_choice
from routerzoo.bench.protocol import settings_digest
from routerzoo.bench.realistic.byte_model import ByteLanguageModel
from routerzoo.bench.realistic.excess import bits_by_domain, domain_table, excess_bits, excess_table
from routerzoo.bench.realistic.scopes import SCOPES
from routerzoo.bench.registry import list_tasks, task_class
from routerzoo.bench.rows import Row, read_rows
from routerzoo.bench.run import Run
from routerzoo.bench.scores import summaries
from routerzoo.errors import UserError
from routerzoo.models.decoder import Decoder

SCOPE = {choice.label: choice for choice in SCOPES}


class Small(ByteLanguageModel):
    """A model of a few thousand parameters, and 64 tokens a step."""

    name = "small-bytes"
    domains = ("arithmetic", "logs", "json", "tables")
    dim, hidden_dim, num_heads = 16, 8, 2
    num_domains, num_experts = 4, 8
    sequence_length, tokens, micro_batches, evaluation_tokens = 8, 64, 4, 512
    steps = 4


# The tokens that the balance loss of a scope takes together, in a pass of the whole step.
GROUPS = {
    "sequence": torch.arange(8).repeat_interleave(8),
    "micro-batch": torch.arange(4).repeat_interleave(16),
    "all processes": torch.zeros(64, dtype=torch.int64),
}


@pytest.mark.parametrize("label", GROUPS)
def test_what_a_step_descends_is_the_loss_of_its_scope(label):
    run, expected = (Run(Small(0), SCOPE[label], 0.0) for _ in range(2))
    batch = run.task.batch(64, run.task.generator("training"), 0.0)
    for part in batch.split(run._passes):
        (run._loss(part, 0) / run._passes).backward()
    context = whole_context(batch)
    loss = expected.task.token_losses(expected.model(batch.x, context), batch).mean()
    context.sequence_ids = GROUPS[label]
    (loss + auxiliary_loss(expected.layers, context, {"sequence_balance": 0.01, "z": 0.001})).backward()
    for ours, theirs in zip(run.model.parameters(), expected.model.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def whole_context(batch):
    place_T = torch.arange(64)
    return RoutingContext(batch.token_ids_T, positions=place_T % 8, sequence_ids=place_T // 8)


def test_only_scopes_within_a_step_need_passes_of_their_own():
    task = Small(0)
    passes = {label: Run(task, choice, 0.0)._passes for label, choice in SCOPE.items()}
    assert {label for label, number in passes.items() if number > 1} == {"micro-batch", "accumulated batch"}


def test_the_accumulated_load_is_that_of_the_whole_step(monkeypatch):
    seen = []
    run = Run(Small(0), SCOPE["accumulated batch"], 0.0)
    kept = run._loss

    def spied(batch, step):
        seen.append([None if (load := layer.step_load.earlier_E) is None else int(load.sum()) for layer in run.layers])
        return kept(batch, step)

    monkeypatch.setattr(run, "_loss", spied)
    training = run._train()
    next(training), next(training)
    # 16 tokens a micro-batch, two experts each; counted anew in each step.
    assert seen == 2 * [[None] * 2, [32] * 2, [64] * 2, [96] * 2]


def test_a_run_says_what_the_routing_knows_of_domains():
    task = Small(0)
    reference = Run(task, RouterChoice("oracle"), 0.01).outcome()
    assert reference.nmi == 1.0
    assert reference.nmi_by_layer == "1 1"
    assert reference.load_entropy == pytest.approx(1.0)  # evaluation has all domains alike
    by_domain = [float(loss) for loss in reference.loss_by_domain.split()]
    assert sum(by_domain) / 4 == pytest.approx(reference.loss, rel=1e-5)
    linear = Run(task, SCOPE["micro-batch"], 0.01).outcome()
    assert 0 < linear.nmi < 1
    assert linear.train_flops == pytest.approx(Run(task, SCOPE["sequence"], 0.01).outcome().train_flops)


def test_the_reference_gives_each_domain_experts_of_its_own():
    assert ByteLanguageModel.num_experts == ByteLanguageModel.top_k * len(ByteLanguageModel.domains)
    task = Small(0)
    batch = task.batch(64, task.generator("evaluation"), 1.0)
    experts = {int(domain): task.oracle(batch)[batch.domain_T == domain].unique().tolist() for domain in range(4)}
    assert experts == {domain: [2 * domain, 2 * domain + 1] for domain in range(4)}


def test_a_decoder_hands_on_the_context_that_it_is_given():
    decoder = Decoder(256, "LinearRouter", num_experts=4, d_model=16, num_blocks=2, num_heads=2, max_length=4)
    context = RoutingContext(task_ids=torch.tensor([[0, 0, 1, 1]]))
    assert decoder(torch.zeros(1, 4, dtype=torch.int64), context=context)[1] is context
    assert len(context.routings) == 2


def row(router, seed, *bits, status="finished"):
    losses = [value * math.log(2) for value in bits]
    loss = sum(losses) / len(losses) if losses else None
    text = " ".join(map(str, losses))
    made = Row("bytes", router, "final", seed, 10, 0.1, 1.0, status, loss=loss, loss_by_domain=text, nmi_by_layer="")
    return replace(made, nmi_by_layer="0.25 0.5", load_entropy=0.9, dead_experts=0.0) if losses else made


def test_excess_by_hand_and_a_failed_run_is_the_worst_of_its_seed():
    made = [row("oracle", seed, 1.0, 2.0) for seed in (0, 1)] + [row("blind", seed, 3.0, 4.0) for seed in (0, 1)]
    made += [row("Mine", 0, 1.5, 2.0), row("Mine", 1, status="failed")]
    found = summaries(made)
    excess = {summary.router: excess_bits(summary, found) for summary in found}
    assert excess["Mine"] == pytest.approx([0.25, 2.0])
    assert excess["oracle"] == [0, 0]
    assert bits_by_domain(made[4]) == pytest.approx([1.5, 2.0])
    table = excess_table(found)
    assert list(table.columns[0].cells) == ["oracle", "Mine", "blind"]
    assert list(table.columns[2].cells) == ["0.25 0.50"] * 3
    by_domain = domain_table(type("Two", (ByteLanguageModel,), {"domains": ("a", "b")}), found)
    assert [list(column.cells)[1] for column in by_domain.columns] == ["Mine", "0.50", "0.00"]


def test_loss_weights_are_part_of_a_choice():
    mine = read_choice("{class_path: XMoERouter, label: mine, loss_weights: {global_balance: 0.01}}")
    assert Run(Small(0), mine, 0.0).aux_weights.keys() == {"global_balance"}
    plain = RouterChoice("XMoERouter", label="mine")
    assert settings_digest(Small, mine) != settings_digest(Small, plain)
    with pytest.raises(UserError, match="loss_weights by name, got"):
        read_choice("{class_path: XMoERouter, loss_weights: [balance]}")


def test_tiers_are_kept_apart(tmp_path):
    assert "bytes" in list_tasks("realistic")
    assert "bytes" not in list_tasks()
    assert task_class("bytes:play,logs") is task_class("bytes:play,logs")
    for args, message in (
        (["--tasks", "bytes", "clusters"], "the tiers exact and realistic have protocols of their own"),
        (["--tasks", "clusters:play"], "the task clusters has no options, got 'play'"),
        (["--domains", "play,logs"], "a domain's name and path have no comma, got play,logs"),
        (["--domains", "play"], "a mix has at least two domains"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["bench", *args, "--folder", str(tmp_path)])


@pytest.mark.full
def test_the_tier_runs_from_the_command_line(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("some words of my own\n" * 500)
    args = ["--domains", "play", "logs", f"mine={tmp_path / 'notes.txt'}", "--routers", "scopes", "HashRouter"]
    main(
        ["bench", *args, "--quick", "--steps", "4", "--seeds", "1", "--folder", str(tmp_path / "rows"), "--slots", "1"]
    )
    told = capsys.readouterr().out
    assert "excess bits per byte over the reference" in told
    assert "Tiny Shakespeare; file notes.txt; digest" in told
    rows = read_rows(tmp_path / "rows" / "rows.csv")
    assert {row.router for row in rows} == {"oracle", "blind", "dense", "HashRouter", *SCOPE}
    assert all(row.status == "finished" and row.task == "bytes-play-logs-mine" for row in rows)


@pytest.mark.full
def test_the_reference_beats_what_cannot_see_the_domain():
    losses = {
        label: Run(ByteLanguageModel(0, steps=100), choice, 0.002).outcome().loss / math.log(2)
        for label, choice in (("blind", RouterChoice("blind")), ("oracle", RouterChoice("oracle")), *SCOPE.items())
        if label in ("blind", "oracle", "all processes")
    }
    assert losses["oracle"] + 0.2 < losses["all processes"] < losses["blind"] - 0.1
