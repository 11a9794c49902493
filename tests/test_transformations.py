"""What may be done to a model: compiling and exporting it, other precisions, gradients in parts."""

import warnings

import pytest
import torch

import routerzoo
from routerzoo import LayerSpec, MoE, RoutingContext, TextClassification, attach, auxiliary_loss, create_router
from routerzoo.data.labelled_text import LabelledBatch
from tests.conftest import BUILT_IN, router_factory
from tests.distributed.data_parallel import LENGTH, SEQUENCES, VOCABULARY, Model
from tests.tasks.test_tasks import language, vision

ALL = routerzoo.list_routers()
SPEC = LayerSpec(16, 8, layer=0, num_layers=2, vocab_size=40, num_positions=8, hidden_dim=32, num_tasks=2)


def declaring(name, training):
    """Return the routers that declare a property, by name."""
    return [router for router in ALL if getattr(create_router(router, SPEC).train(training).properties, name)]


COMPILING = declaring("compiles", training=False)


class Logits(torch.nn.Module):
    """A net whose answer is its logits alone: what another runtime has a use for."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, inputs):
        return self.net(inputs)[0]


class Labels(torch.nn.Module):
    """The same of a classifier of texts of different lengths."""

    def __init__(self, task):
        super().__init__()
        self.task = task

    def forward(self, ids_BS, padding_mask_BS):
        return self.task(LabelledBatch(ids_BS, padding_mask_BS, torch.zeros(len(ids_BS), dtype=torch.long)))[0]


def texts():
    padding_mask_BS = torch.zeros(2, 8, dtype=torch.bool)
    padding_mask_BS[0, 5:] = True
    return torch.randint(256, (2, 8)), padding_mask_BS


def text_classification(router):
    return TextClassification(
        router=router_factory(router, top_k=2), d_model=16, num_blocks=2, num_heads=2, num_experts=4, max_length=16
    )


# What builds the task, what of it is transformed, and what that is given.
TASKS = {
    "language": (language, lambda task: Logits(task.net), lambda: (torch.randint(256, (2, 8)),)),
    "vision": (vision, lambda task: Logits(task.net), lambda: (torch.randn(2, 1, 28, 28),)),
    "text classification": (text_classification, Labels, texts),
}


@pytest.mark.full
@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("router_name", [name for name in BUILT_IN if name in COMPILING])
def test_each_task_compiles_with_each_router(router_name, name):
    build, part_of, inputs = TASKS[name]
    task = build(router_name).eval()
    given = inputs()
    expected = part_of(task)(*given)
    torch.compiler.reset()  # the same code was compiled for other routers before, of which there is a limit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own compiler
        # A graph without a break returns tensors, no context.
        compiled = torch.compile(part_of(task), backend="aot_eager", fullgraph=True)(*given)
    torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=1e-5)


def full_context(num_tokens):
    tokens = torch.arange(num_tokens)
    return RoutingContext(
        token_ids=torch.randint(40, (num_tokens,)),
        positions=tokens % 8,
        sequence_ids=tokens // 8,
        padding_mask=tokens % 8 == 7,
        task_ids=tokens // 8 % 2,
        attention=torch.rand(num_tokens, 2, 8).softmax(-1),
        step=1,
        total_steps=10,
    )


@pytest.mark.full
@pytest.mark.parametrize("router_name", declaring("compiles", training=True))
def test_a_layer_trains_in_one_graph_with_its_context(router_name):
    layer, x_TD, context = MoE(SPEC, router_factory(router_name)), torch.randn(32, 16), full_context(32)
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own compiler
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)

        def gradients(run):
            torch.manual_seed(0)
            layer.zero_grad()
            own = context.new_pass()
            y_TD = run(x_TD, own)
            assert [(entry.layer, entry.call) for entry in own.routings] == [(layer, 0)]
            (y_TD.square().mean() + auxiliary_loss(layer, own, token_losses=torch.ones(32))).backward()
            return {"y": y_TD.detach(), **{n: p.grad for n, p in layer.named_parameters() if p.grad is not None}}

        expected, found = gradients(layer), gradients(compiled)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.full
@pytest.mark.parametrize("name", TASKS)
def test_each_task_is_exported_with_each_router(router_name, name):
    build, part_of, inputs = TASKS[name]
    task = build(router_name).eval()
    given, other = inputs(), inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own exporter
        program = torch.export.export(part_of(task), given)
    torch.testing.assert_close(program.module()(*given), part_of(task)(*given), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(program.module()(*other), part_of(task)(*other), atol=1e-5, rtol=1e-5)


def batches(number):
    generator = torch.Generator().manual_seed(number)
    return torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=generator)


@pytest.mark.full
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_router_trains_in_16_bits(name, dtype, device):
    model = Model(name).train().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    updates = attach(model, optimizer, 20, token_counts=torch.arange(VOCABULARY) + 1)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16, init_scale=2.0**10)
    losses = []
    for _ in range(20):
        with torch.autocast(device, dtype):
            loss = model(batches(0).to(device), 0, 0)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert all(value == value and abs(value) < 1e4 for value in losses)
    assert sum(losses[-3:]) < sum(losses[:3])
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert scaler.get_scale() >= 2.0**10 or dtype == torch.bfloat16
    assert updates.step == 20


@pytest.mark.full
@pytest.mark.parametrize("name", declaring("batch_independent", training=True))
def test_accumulated_gradients_are_those_of_a_larger_batch(name):
    """Auxiliary losses aside, which are of a micro-batch where they are of a batch."""
    model = Model(name, auxiliary=0.0).double().train()
    for layer in model.layers:
        layer.router.fit_token_counts(torch.arange(VOCABULARY) + 1)
    ids_BS = batches(1)

    def gradients(parts):
        model.zero_grad()
        size = len(ids_BS) // parts
        for part in range(parts):
            torch.manual_seed(0)
            (model(ids_BS[part * size : (part + 1) * size], part * size, 0) / parts).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    with constant_noise():
        whole, accumulated = gradients(1), gradients(4)
    assert whole.keys() == accumulated.keys()
    for parameter, gradient in whole.items():
        torch.testing.assert_close(accumulated[parameter], gradient, atol=1e-10, rtol=1e-8, msg=parameter)


class constant_noise:
    """Let random draws depend on nothing, for a while."""

    def __enter__(self):
        from tests.distributed.data_parallel import noise_by_place

        self.patch = pytest.MonkeyPatch()
        for owner, name in (
            (torch, "randn_like"),
            (torch, "rand_like"),
            (torch.Tensor, "uniform_"),
            (torch.Tensor, "exponential_"),
        ):
            self.patch.setattr(owner, name, getattr(owner, name))
        noise_by_place()

    def __exit__(self, *error):
        self.patch.undo()
