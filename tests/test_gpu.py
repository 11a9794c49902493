"""What only a GPU shows. `tests/moe/test_layer.py` tests what it can of it with tensors that have no values."""
# Shape suffixes: T tokens, D model width.

import copy
import csv
from pathlib import Path

import pytest
import torch

from routerzoo import MLPExperts, MoE, SwiGLUExperts
from routerzoo.cli.main import main
from tests.conftest import SPEC, router_factory

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


def test_a_step_waits_for_nothing(router_name, make_context):
    layer = with_bfloat16_experts(router_name).train()
    x_TD = torch.randn(TOKENS, SPEC.d_model, device="cuda", dtype=torch.bfloat16)
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
