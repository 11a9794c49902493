"""Audits find what was planted, and nothing else; counterfactuals cost what they cost by hand."""

import json
import math
from functools import partial

import pytest
import torch
from torch import nn

from routerzoo import LayerSpec, LinearRouter, MoE, Routing, RoutingContext
from routerzoo.__main__ import main
from routerzoo.audit import Losses, Subject, Thresholds, audit, record_experts
from routerzoo.audit.counterfactuals import substitute, with_first
from routerzoo.audit.documents import cut, read_documents
from routerzoo.audit.page import write_page
from routerzoo.audit.subject import spread
from routerzoo.audit.thresholds import read_thresholds
from routerzoo.data import TextData
from routerzoo.errors import UserError

EXPERTS = 8


class Net(nn.Module):
    """Two MoE layers on embeddings whose first feature is constant, so that a router's weight of it is a bias."""

    def __init__(self, router=LinearRouter, num_experts=EXPERTS):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        specs = [LayerSpec(16, num_experts, layer=i, num_layers=2, hidden_dim=8, vocab_size=50) for i in range(2)]
        self.layers = nn.ModuleList(MoE(spec, router) for spec in specs)
        with torch.no_grad():
            self.embedding.weight[:, 0] = 1
            for layer in self.layers:
                if isinstance(layer.router, LinearRouter):
                    layer.router.weight[:, 0] = 0

    def context(self, ids_BS):
        sequences = torch.arange(len(ids_BS)).unsqueeze(1).expand_as(ids_BS)
        return RoutingContext(token_ids=ids_BS, sequence_ids=sequences)

    def forward(self, ids_BS):
        context, x = self.context(ids_BS), self.embedding(ids_BS)
        return sum((layer(x, context) for layer in self.layers), x)


class Packed(Net):
    """Two documents in each sequence, whose last tokens are padding."""

    def context(self, ids_BS):
        places = torch.arange(ids_BS.shape[1]).expand_as(ids_BS)
        documents = 2 * torch.arange(len(ids_BS)).unsqueeze(1) + (places >= 20)
        return RoutingContext(token_ids=ids_BS, sequence_ids=documents, padding_mask=places >= 28)


def subject_of(net, batches=2):
    torch.manual_seed(1)
    given = [torch.randint(50, (8, 32)) for _ in range(batches)]

    def losses(ids_BS):
        y_BS = net(ids_BS).square().mean(-1)
        return Losses(y_BS.sum(1), torch.full((len(ids_BS),), y_BS.shape[1]))

    return Subject(
        "net", "random ids", net, given, losses, lambda b: b, lambda b: torch.arange(8), "document", "abcdefgh"
    )


def test_a_balanced_model_is_healthy_and_stays_as_it_was():
    net = Net()
    before = [parameter.clone() for parameter in net.parameters()]
    result = audit(subject_of(net))
    assert result.findings == []
    assert result.healthy
    assert result.tokens == 512
    layer = result.layers[1]
    assert (layer.name, layer.router, layer.num_experts, layer.top_k) == ("layers.1", "LinearRouter", 8, 2)
    assert sum(layer.relative_load) == pytest.approx(8)
    assert layer.assignments == 1024
    assert layer.specialization["token"]["chance"] == pytest.approx(0.25)
    assert layer.specialization["token"]["specialization"] == 1  # the layer sees nothing but the id
    assert set(layer.specialization) == {"token", "document"}
    assert [name.partition(":")[0] for name in result.left_out] == ["saturation", "counterfactuals", "the best expert"]
    assert net.training
    assert not net.layers[0]._routing_hooks
    assert not net.layers[0].experts._forward_hooks
    assert all(torch.equal(*pair) for pair in zip(before, net.parameters(), strict=True))


def dead(layer):
    layer.router.weight[3, 0] = -100


def exploding(layer):
    layer.experts.down[5] *= 100


def vanishing(layer):
    for parameter in layer.experts.parameters():
        parameter[2] *= 1e-4


def not_a_number(layer):
    layer.experts.up[6, 0, 0] = torch.nan


def collapsed(layer):
    layer.router.weight[[1, 4], 0] = 100


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (dead, [(3, "dead")]),
        (exploding, [(5, "parameter norm exploding"), (5, "output norm exploding")]),
        (vanishing, [(2, "parameter norm vanishing"), (2, "output norm vanishing")]),
        (not_a_number, [(6, "parameters are NaN or inf"), (6, "outputs are NaN or inf")]),
        (
            collapsed,
            [(e, "dead") for e in (0, 2, 3, 5, 6, 7)] + [(None, "routing collapsed onto experts 1, 4")],
        ),
    ],
)
def test_planted_faults_are_named_by_layer_and_expert(plant, found):
    net = Net()
    with torch.no_grad():
        plant(net.layers[1])
    result = audit(subject_of(net))
    assert [(f.layer, f.expert, f.kind) for f in result.findings] == [(1, *one) for one in found]
    text = str(result.findings[0])
    assert text.startswith(f"MoE layer 1, expert {found[0][0]}: {found[0][1]}")
    json.dumps(result.to_json(), allow_nan=False)  # NaN and inf are strings


def test_thresholds_can_be_set_and_taken_away():
    net = Net()
    with torch.no_grad():
        dead(net.layers[0])
    none = Thresholds(min_load=None)
    assert audit(subject_of(net), thresholds=none).healthy
    strict = audit(
        subject_of(Net()), thresholds=Thresholds(max_gate_entropy=0.1, min_random_cost=9.0), counterfactual_batches=1
    )
    assert {f.kind for f in strict.findings} == {"gate undecided", "a random first choice costs too little"}
    with pytest.raises(UserError, match="the threshold min_load must be a number of at least 0, got -1"):
        Thresholds(min_load=-1)


def test_tokens_of_packed_documents_are_of_their_row_and_padding_counts_nowhere():
    net = Packed()
    result = audit(subject_of(net), best_batches=1)
    layer = result.layers[0]
    assert result.tokens == 2 * 8 * 28
    assert layer.assignments == 2 * result.tokens
    ids_BS = torch.cat([batch[:, :28] for batch in subject_of(net).batches], 1)  # by row
    top_BSK = (net.embedding(ids_BS) @ net.layers[0].router.weight.T).topk(2).indices
    shares_BE = torch.nn.functional.one_hot(top_BSK, EXPERTS).sum(2).float().mean(1)
    torch.testing.assert_close(layer.group_shares_VE, shares_BE)
    assert layer.best.tokens == 8  # one of each row


@pytest.mark.parametrize("router", ["ExpertChoiceRouter", "SoftMoERouter", "TopPRouter"])
def test_tokens_are_counted_whatever_the_router_selects(router):
    result = audit(subject_of(Net(router)))
    assert result.tokens == 512
    assert not any("which token" in sentence for sentence in result.left_out)


def test_images_that_come_without_sequence_ids_are_in_their_order():
    net = Net()
    subject = subject_of(net)
    expected = audit(subject, best_batches=1).layers[0]
    net.context = lambda ids_BS: RoutingContext()
    result = audit(subject, best_batches=1)
    assert "specialization by document: neither data nor model say which document a token is of" in result.left_out
    assert result.layers[0].best is None
    subject.batch_first = True
    layer = audit(subject, best_batches=1).layers[0]
    torch.testing.assert_close(layer.group_shares_VE, expected.group_shares_VE)
    assert layer.best == pytest.approx(expected.best)


def test_thresholds_of_a_file_are_numbers_by_name(tmp_path):
    path = tmp_path / "limits.yaml"
    path.write_text("max_load: 4\nmin_load: null\nmin_drop_cost: none\n")
    assert read_thresholds(path) == {"max_load": 4.0, "min_load": None, "min_drop_cost": None}
    path.write_text('{"min_load": 0.5}')
    assert read_thresholds(path) == {"min_load": 0.5}
    for text, told in (
        ("min_loads: 3", "limits.yaml: unknown threshold 'min_loads'; did you mean 'min_load'"),
        ("max_load: many", "the threshold max_load must be a number or null, got 'many'"),
        ("- 3", "has no thresholds by name, such as 'max_load: 4'"),
        ("a: [", "is neither YAML nor JSON"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=told):
            read_thresholds(path)


def test_a_threshold_of_what_was_not_measured_is_said():
    with pytest.raises(UserError, match="min_drop_cost judges counterfactuals, and there are none"):
        audit(subject_of(Net()), thresholds=Thresholds(min_drop_cost=0.1))
    result = audit(subject_of(Net("HashRouter")), thresholds=Thresholds(min_gate_margin=0.1))
    assert "MoE layer 1: min_gate_margin judges what was not measured" in result.left_out


def test_load_is_not_judged_on_too_few_tokens():
    net = Net()
    subject = subject_of(net)
    subject.batches = [subject.batches[0][:1, :8]]
    result = audit(subject)
    assert result.healthy
    assert any("layer 0: its load is not judged, 16 assignments are fewer than 20" in one for one in result.left_out)


def test_saturation_compares_the_same_tokens():
    net, other = Net(), Net()
    earlier = [("same", record_experts(subject_of(net))), ("other", record_experts(subject_of(other)))]
    layer = audit(subject_of(net), earlier=earlier).layers[0]
    assert layer.saturation["same"] == {"saturation": 1.0, "chance": 0.25}
    assert layer.saturation["other"]["saturation"] < 0.6
    larger = [("larger", record_experts(subject_of(Net(num_experts=16))))]
    with pytest.raises(UserError, match=r"larger routes to expert \d+ of MoE layer 0, the audited model has 8"):
        audit(subject_of(net), earlier=larger)
    with pytest.raises(UserError, match="short routes 256 tokens, the audited model 512"):
        audit(subject_of(net), earlier=[("short", record_experts(subject_of(net, 1)))])


class Constant(nn.Module):
    """Adds c_e to the loss of each token that expert e computes alone."""

    def __init__(self, values, top_k=1):
        super().__init__()
        self.moe = MoE(LayerSpec(4, len(values), hidden_dim=2), partial(LinearRouter, top_k=top_k, renormalize=True))
        with torch.no_grad():
            for name, parameter in self.moe.experts.named_parameters():
                parameter.zero_()
                if name == "down_bias":
                    parameter[:, 0] = torch.tensor(values)

    def forward(self, x_BSD):
        sequences = torch.arange(len(x_BSD)).unsqueeze(1).expand(x_BSD.shape[:2])
        return self.moe(x_BSD, RoutingContext(sequence_ids=sequences))[..., 0].sum(1)


def test_counterfactuals_cost_what_they_cost_by_hand():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    net = Constant(values.tolist())
    x_BSD = torch.randn(16, 5, 4)
    subject = Subject("net", "x", net, [x_BSD], lambda x: Losses(net(x), torch.full((16,), 5)))
    result = audit(subject, counterfactual_batches=1, best_batches=1).layers[0]
    order_TE = (x_BSD.flatten(0, 1) @ net.moe.router.weight.T).argsort(1, descending=True)
    first_T, next_T = values[order_TE[:, 0]], values[order_TE[:, 1]]
    assert result.costs["drop"] == pytest.approx(-float(first_T.mean()), rel=1e-5)
    assert result.costs["next"] == pytest.approx(float((next_T - first_T).mean()), rel=1e-5)
    # Seeded: of the other three, at random.
    assert abs(result.costs["random"] - float(((15 - first_T) / 3 - first_T).mean())) < 1.0
    best = result.best
    assert best.tokens == 16  # one in each sequence
    # Whatever the tokens were: expert 0 is the best one.
    assert 0 <= best.gain <= 7
    assert best.router_is_best <= 1
    mean_first = best.gain + 1
    assert best.random == pytest.approx((15 - mean_first) / 3 - mean_first, rel=1e-4)


def test_a_first_choice_is_replaced_under_its_own_weight():
    routing = Routing(torch.tensor([[0, 1], [2, -1], [-1, -1]]), torch.tensor([[0.3, 0.7], [1.0, 0.0], [0.0, 0.0]]))
    changed = with_first(routing, torch.tensor([3, 3, 3]))
    assert changed.experts_TK.tolist() == [[0, 3], [3, -1], [-1, -1]]
    assert torch.equal(changed.weights_TK, routing.weights_TK)
    dropped = with_first(routing, None, torch.tensor([True, False, False]))
    assert dropped.experts_TK.tolist() == [[0, -1], [2, -1], [-1, -1]]
    assert dropped.weights_TK.tolist() == [[pytest.approx(0.3), 0], [1, 0], [0, 0]]
    assert dropped.may_drop
    drawn = substitute(routing, "random", 4, torch.Generator().manual_seed(0)).experts_TK
    assert drawn[0, 0] == 0
    assert drawn[0, 1] in (2, 3)


def test_what_cannot_be_measured_is_said():
    result = audit(subject_of(Net("HashRouter")), counterfactual_batches=1, best_batches=1)
    assert set(result.layers[0].costs) == {"drop", "random"}
    assert "MoE layer 0, counterfactual 'next': HashRouter has no logits, hence no next choice" in result.left_out
    assert result.layers[0].best.next is None
    assert math.isfinite(result.layers[0].best.gain)


def test_samples_are_taken_from_all_of_the_data():
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(3, 20) == [0, 1, 2]


def test_a_dense_model_and_empty_data_are_refused():
    with pytest.raises(UserError, match="no routing to audit: net has no MoE layer, it is a dense model"):
        Subject("net", "x", nn.Linear(2, 2), [0], lambda batch: None)
    with pytest.raises(UserError, match="there is nothing to audit net on: x has no tokens"):
        Subject("net", "x", Net(), [], lambda batch: None)


def test_documents_are_cut_into_windows_of_their_own(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "abcde"}\n\n{"text": "fg"}\n')
    (tmp_path / "more.txt").write_text("hij")
    documents = list(read_documents(str(tmp_path)))
    assert [(name, document.text) for name, document in documents] == [
        ("more.txt", "hij"),
        ("rows.jsonl:1", "abcde"),
        ("rows.jsonl:2", "fg"),
    ]
    batches, names = cut(iter(documents), lambda text: [ord(c) for c in text], 4, 2, 9)
    assert [batch.documents_B.tolist() for batch in batches] == [[0, 1], [2]]  # the window "e" predicts nothing
    assert batches[0].ids_BS.tolist() == [[104, 105, 106, 0], [97, 98, 99, 100]]
    assert batches[0].mask_BS.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert names == ["more.txt", "rows.jsonl:1", "rows.jsonl:2"]
    (tmp_path / "rows.jsonl").write_text('{"txt": "abc"}\n')
    with pytest.raises(UserError, match=r"at byte 0: no field 'text'; there are txt \(text_field\)"):
        list(read_documents(str(tmp_path)))
    ((_, document),) = read_documents(str(tmp_path / "rows.jsonl"), "txt")
    assert document.text == "abc"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no files"):
        list(read_documents(str(tmp_path / "empty")))


def test_an_audit_reads_what_training_reads(tmp_path):
    def texts(corpus):
        return [(name, document.text) for name, document in read_documents(str(corpus))]

    for split in ("train", "validation", "test"):
        (tmp_path / "named").mkdir(exist_ok=True)
        (tmp_path / "named" / f"{split}.jsonl").write_text(json.dumps({"text": split}))
    assert texts(tmp_path / "named") == [("test.jsonl:1", "test")]
    (tmp_path / "named" / "test.jsonl").unlink()
    assert texts(tmp_path / "named" / "*.jsonl") == [("validation.jsonl:1", "validation")]
    (tmp_path / "lines.log").write_bytes("é\r\nb".encode())  # of any suffix, as it is
    assert texts(tmp_path / "lines.log") == [("lines.log", "é\r\nb")]
    ((name, text),) = texts("tiny-shakespeare")
    assert name == "tiny-shakespeare.txt"
    assert len(text) == len(TextData().stream("test"))


def test_the_command_says_what_it_cannot_audit(tmp_path, capsys):
    for args, told in (
        (["nothing"], "nothing does not exist: give the folder of a run, a checkpoint, or a model's folder"),
        ([str(tmp_path)], "is neither a run with a checkpoint nor a folder of transformers"),
        (["nothing", "--min-load", "-1"], "the threshold min_load must be a number of at least 0, got -1"),
        (["nothing", "--batches", "0"], "--batches must be at least 1, got 0"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["audit", *args])
        assert ended.value.code == 2
        assert told in capsys.readouterr().err


def test_a_crash_is_no_verdict(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("routerzoo.cli.audit._released", lambda *args: 1 / 0)
    with pytest.raises(SystemExit) as ended:
        main(["audit", str(tmp_path)])
    assert ended.value.code == 2
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.full
def test_the_page_needs_no_other_file(tmp_path):
    net = Net()
    with torch.no_grad():
        dead(net.layers[1])
    subject = subject_of(net)
    earlier = [("before", record_experts(subject))]
    write_page(tmp_path / "audit.html", audit(subject, earlier=earlier, counterfactual_batches=1, best_batches=1))
    page = (tmp_path / "audit.html").read_text()
    assert "MoE layer 1, expert 3: dead (0; min_load is 0.02)" in page
    for title in ("all tokens at once", "one token at a time", "Saturation", "Thresholds", "Load of each expert"):
        assert title in page
    assert page.count("data:image/png;base64,") == 5
    assert "http" not in page
