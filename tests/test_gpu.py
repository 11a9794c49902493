"""What only a GPU shows. `tests/moe/test_layer.py` tests what it can of it with tensors that have no values."""
# Shape suffixes: T tokens, D model width.

import copy
import csv
from functools import partial
from pathlib import Path

import pytest
import torch

from routerzoo import MLPExperts, MoE, Routing, SwiGLUExperts, auxiliary_loss
from routerzoo.cli.main import main
from routerzoo.functional import gate_linear
from routerzoo.functional.losses import balance_loss, z_loss
from routerzoo.moe.softmax_losses import _losses
from tests.conftest import SPEC, router_factory
from tests.moe.test_low_memory import BANKS, bank_of, compare, routing_of

pytestmark = [pytest.mark.gpu, pytest.mark.full]
TOKENS = 256
ROOT = Path(__file__).parents[1]


def with_bfloat16_experts(router):
    layer = MoE(SPEC, router_factory(router, top_k=2), SwiGLUExperts).cuda()
    for parameter in layer.experts.parameters():
        parameter.data = parameter.data.bfloat16()
    return layer


def outputs(layer, x_TD, context):
    """Return what a layer computes, and the gradients of its input and its parameters."""
    x_TD = x_TD.clone().requires_grad_()
    layer.zero_grad()
    y_TD = layer(x_TD, context)
    y_TD.float().square().mean().backward()
    gradients = [p.grad for p in layer.parameters() if p.grad is not None]
    return [t.detach().float().cpu() for t in (y_TD, x_TD.grad, *gradients)]


@pytest.mark.parametrize("experts", [MLPExperts, SwiGLUExperts])
def test_a_layer_computes_what_it_does_on_a_cpu(router_name, experts, make_context):
    layer = MoE(SPEC, router_factory(router_name, top_k=2), experts, num_shared_experts=1).eval()
    x_TD, context = torch.randn(TOKENS, SPEC.d_model), make_context(TOKENS)
    expected = outputs(layer, x_TD, context)
    found = outputs(copy.deepcopy(layer).cuda(), x_TD.cuda(), context.to("cuda"))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_backends_agree_in_bfloat16(make_context):
    layer = with_bfloat16_experts("LinearRouter").eval()
    x_TD, context = torch.randn(TOKENS, SPEC.d_model, device="cuda", dtype=torch.bfloat16), make_context(TOKENS)
    found = {}
    for backend in ("grouped", "loop", "reference"):
        layer.experts.backend = backend
        found[backend] = outputs(layer, x_TD, context.to("cuda"))
    for backend in ("grouped", "loop"):
        for one, other in zip(found[backend], found["reference"], strict=True):
            torch.testing.assert_close(one, other, atol=2e-2, rtol=5e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_step_waits_for_nothing(router_name, dtype, make_context):
    layer = MoE(SPEC, router_factory(router_name, top_k=2), MLPExperts).to("cuda", dtype).train()
    x_TD = torch.randn(TOKENS, SPEC.d_model, device="cuda", dtype=dtype)
    context = make_context(TOKENS).to("cuda")
    layer(x_TD, context).float().sum().backward()  # what is set up once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x_TD, context.to("cuda")).float().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_layer_is_compiled_into_one_graph(router_name, make_context):
    layer = with_bfloat16_experts(router_name).eval()
    assert layer.router.properties.compiles
    x_TD = torch.randn(TOKENS, SPEC.d_model, device="cuda", dtype=torch.bfloat16)
    context = make_context(TOKENS).to("cuda")
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x_TD, context), layer(x_TD, context), atol=2e-2, rtol=5e-2)


def test_a_step_is_recorded_in_a_graph():
    layer = with_bfloat16_experts("LinearRouter")
    x_TD = torch.randn(TOKENS, SPEC.d_model, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            layer.zero_grad(set_to_none=True)
            layer(x_TD).float().square().mean().backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    layer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = layer(x_TD).float().square().mean()
        loss.backward()
    # Other tokens go elsewhere: what was recorded must follow them.
    x_TD.copy_(torch.randn_like(x_TD))
    graph.replay()
    recorded = [loss.clone(), *(p.grad.clone() for p in layer.parameters())]
    layer.zero_grad(set_to_none=True)
    expected = layer(x_TD).float().square().mean()
    expected.backward()
    for one, other in zip(recorded, [expected, *(p.grad for p in layer.parameters())], strict=True):
        torch.testing.assert_close(one, other, atol=2e-2, rtol=5e-2)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "32-true"])
@pytest.mark.parametrize("domain", ["language", "vision"])
def test_a_run_trains_and_goes_on(domain, precision, tmp_path):
    options = ["--trainer.accelerator", "gpu", "--trainer.devices", "1", "--trainer.precision", precision]
    sizes = {
        "language": ["--model.d_model", "32", "--model.num_heads", "4", "--data.batch_size", "8"],
        "vision": ["--data.batch_size", "32"],
    }
    command = ["fit", "--config", str(ROOT / f"configs/{domain}/HyperRouter.yaml"), *options, *sizes[domain]]
    quiet = ["--run_dir", str(tmp_path / "run"), "--trainer.enable_progress_bar", "false"]
    limits = ["--trainer.limit_val_batches", "2", "--trainer.log_every_n_steps", "1"]
    main([*command, *quiet, *limits, "--trainer.max_steps", "6"])
    main([*command, *quiet, *limits, "--trainer.max_steps", "12", "--ckpt_path", "last"])
    with (tmp_path / "run/logs/metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == list(range(12))


@pytest.mark.parametrize(
    ("means", "dtype", "tolerance"),
    [
        ("hybrid", torch.bfloat16, 3e-2),
        ("triton", torch.bfloat16, 3e-2),
        ("triton", torch.float16, 4e-3),
        ("triton", torch.float32, 1e-5),
    ],
)
@pytest.mark.parametrize("kind", BANKS)
@pytest.mark.parametrize("routing", [{}, {"drop": 0.3}, {"skew": 20.0, "top_k": 1}, {"flat": True, "drop": 0.2}])
def test_experts_as_one_operator(means, dtype, tolerance, kind, routing):
    if means == "hybrid" and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("torch's grouped product needs sm_90 or sm_100")
    bank = bank_of(kind, 256, 8, dtype, hidden_dim=192).cuda()
    make, weights = routing_of(TOKENS, 8, dtype=dtype, **{"top_k": 3, **routing})  # with skew 7 experts have no row
    arguments = {"args": tuple(a.cuda() for a in make.args)} if isinstance(make, partial) else {}
    if arguments:
        make = partial(make.func, *arguments["args"], **make.keywords)
    else:
        flat = make(weights)
        token_N, expert_N = flat.token_N.cuda(), flat.expert_N.cuda()

        def make(weight_N):
            return Routing(token_N=token_N, expert_N=expert_N, weight_N=weight_N)

    x_TD = torch.randn(TOKENS, 256, device="cuda").to(dtype)
    compare(means, bank, make, weights.cuda(), 8, x_TD, tolerance)


@pytest.mark.parametrize("experts", [MLPExperts, SwiGLUExperts])
@pytest.mark.parametrize("low_memory", [None, False])
def test_two_steps_give_equal_bits(experts, low_memory, make_context):
    layer = MoE(SPEC, router_factory("LinearRouter", top_k=2), experts, low_memory=low_memory).to(
        "cuda", torch.bfloat16
    )
    x_TD, found = torch.randn(TOKENS, SPEC.d_model, device="cuda", dtype=torch.bfloat16, requires_grad=True), []
    context = make_context(TOKENS).to("cuda")
    weights = {"balance": 0.1, "z": 0.1, "sequence_balance": 0.1}
    for _ in range(5):
        current = context.new_pass()
        loss = layer(x_TD, current).float().square().mean() + auxiliary_loss(layer, current, weights)
        found.append(torch.autograd.grad(loss, [x_TD, *layer.parameters()]))
    for gradients in found[1:]:
        assert all(map(torch.equal, gradients, found[0]))


def test_the_gate_is_as_exact_as_float32():
    x_TD, weight_ED = torch.randn(4096, 2048, device="cuda").bfloat16(), torch.randn(64, 2048, device="cuda") * 0.02
    weight_ED[1] = weight_ED[0] * (1 + 1e-6)  # nearly tied
    right = x_TD.double() @ weight_ED.double().T
    errors = [(x_TD.float() @ weight_ED.T - right).abs().max(), (gate_linear(x_TD, weight_ED) - right).abs().max()]
    assert errors[1] <= 8 * errors[0], errors  # tensor cores cut off what they add up


@pytest.mark.parametrize("padded", [0, 300])
def test_losses_of_a_softmax_gate(padded):
    logits_TE = torch.randn(1000, 64, device="cuda", requires_grad=True)
    experts_TK = logits_TE.detach().topk(6).indices
    padding_mask = torch.arange(1000, device="cuda") < padded if padded else None
    found = _losses(logits_TE, experts_TK, padding_mask)[:2]
    balance = balance_loss(logits_TE.softmax(-1), experts_TK, padding_mask=padding_mask)
    expected = balance, z_loss(logits_TE, padding_mask=padding_mask)
    torch.testing.assert_close(found, expected)
    grad, right = (torch.autograd.grad(sum(losses), logits_TE)[0] for losses in (found, expected))
    torch.testing.assert_close(grad, right)
