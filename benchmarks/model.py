"""Speed of whole models: a training step against a dense model's, the time to the first step, tokens per second.

    python benchmarks/model.py                        # all of it
    python benchmarks/model.py --only generation
    python benchmarks/model.py --device cuda

The model is the small published setting: 4 blocks of width 256, 16 experts of 512, k = 2, 512 tokens a sequence; a
decoder over bytes, and a vision transformer over 8 x 8 patches of 32 x 32 images. The dense model has the same active
parameters: one feed-forward network of 1,024. A step is forward, losses (the routers' too), backward and AdamW. Models
are run in turn; a ratio is that of the best times, beside the median of the ratios of pairs. What the floors explain is
what E experts cost beyond one network of the same operations when nothing routes or dispatches; see `layer.py`.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from contenders import FLOORS, Setting
from layer import cpu_name, step_of, timed
from torch import Tensor, nn

from routerzoo import (
    LinearRouter,
    MLPExperts,
    MoE,
    auxiliary_loss,
    moe_layers,
    provide_context,
    sparsify,
    tune_cpu,
)
from routerzoo.models.decoder import Decoder
from routerzoo.optim import use_fused_kernel

WIDTH, BLOCKS, HEADS, EXPERTS, HIDDEN, TOP_K, LENGTH, VOCABULARY = 256, 4, 8, 16, 512, 2, 512, 256
Step = Callable[[], None]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--sequences", type=int, default=4, help="sequences of 512 tokens in a step")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=None, help="a file for what is printed")
    options = parser.parse_args()
    tune_cpu()
    torch.manual_seed(0)
    machine = torch.cuda.get_device_name() if options.device == "cuda" else cpu_name()
    precision = "bfloat16 by autocast" if options.device == "cuda" else "float32"
    told = [
        f"{machine}, {torch.get_num_threads()} thread(s), {precision}, torch {torch.__version__}.",
        f"Command: `{' '.join(['python', 'benchmarks/model.py', *sys.argv[1:]])}`",
    ]
    for name in options.only:
        told += ["", f"## {PARTS[name].__doc__}", "", *PARTS[name](options)]
    print("\n".join(told))
    if options.out is not None:
        options.out.write_text("\n".join(told) + "\n")


def training_step(options: argparse.Namespace) -> list[str]:
    """Training step against a dense model."""
    tokens = options.sequences * LENGTH
    dtype = "bfloat16" if options.device == "cuda" else "float32"
    setting = Setting(tokens, WIDTH, EXPERTS, TOP_K, "mlp", dtype, options.device, hidden_dim=HIDDEN)
    x_TD = torch.randn(tokens, WIDTH, device=options.device, dtype=getattr(torch, dtype))
    floors = {name: step_of(build(setting).to(x_TD), x_TD) for name, build in FLOORS.items()}
    steps = {
        "language, MoE": decoder_step(EXPERTS, options),
        "language, dense": decoder_step(0, options),
        "vision, MoE": vit_step(EXPERTS, options),
        "vision, dense": vit_step(0, options),
        **floors,
    }
    times = in_turn(steps, options)
    best = {name: min(values) for name, values in times.items()}
    explained = BLOCKS * (best["expert floor"] - best["active floor"])
    told = [
        f"{tokens} tokens a step. The floors explain {1000 * explained:.1f} ms of a step: {BLOCKS} times "
        f"{1000 * best['expert floor']:.1f} ms for {EXPERTS} experts instead of {1000 * best['active floor']:.1f} ms.",
        "",
        "| model | MoE, ms | dense, ms | MoE / dense | pairs | MoE / (dense + what the floors explain) |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for domain in ("language", "vision"):
        sparse, dense = times[f"{domain}, MoE"], times[f"{domain}, dense"]
        pairs = statistics.median(a / b for a, b in zip(sparse, dense, strict=True))
        told.append(
            f"| {domain} | {1000 * min(sparse):.0f} | {1000 * min(dense):.0f} | {min(sparse) / min(dense):.2f} "
            f"| {pairs:.2f} | {min(sparse) / (min(dense) + explained):.2f} |"
        )
    return [*told, "", "The language model's step, by operation:", "", *profile(steps["language, MoE"])]


def first_step(options: argparse.Namespace) -> list[str]:
    """Time to the first step."""
    program = (
        "import argparse, sys, routerzoo.cli.main; sys.path.insert(0, 'benchmarks'); import model; "
        "model.decoder_step(model.EXPERTS, argparse.Namespace(device='cpu', sequences=1))()"
    )
    plain = "import torch, lightning.pytorch, torchmetrics, jsonargparse, timm"
    told = []
    parts = {
        "imports of the command line, model, one step of 512 tokens": program,
        "of it other people's imports": plain,
    }
    for what, code in parts.items():
        seconds = []
        for _ in range(3):
            begun = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parents[1])
            seconds.append(time.perf_counter() - begun)
        told.append(f"- {what}: {min(seconds):.1f} s (best of {', '.join(f'{s:.1f}' for s in seconds)})")
    return told


def generation(options: argparse.Namespace) -> list[str]:
    """Generation, one token at a time."""
    told = ["| experts | parameters, M | tokens per second | a layer on a token, ms |", "| ---: | ---: | ---: | ---: |"]
    for num_experts in (4, 16, 64, 256):
        model = decoder(num_experts, options).eval()
        stream = model.stream(torch.randint(VOCABULARY, (1, 16), device=options.device), temperature=0.0)
        for _ in range(4):
            next(stream)
        seconds = []
        for _ in range(60):
            begun = time.perf_counter()
            int(next(stream)[0])
            seconds.append(time.perf_counter() - begun)
        layer = next(moe_layers(model))
        x_1D = torch.randn(1, WIDTH, device=options.device)

        @torch.no_grad()
        def step(layer: MoE = layer, x_1D: Tensor = x_1D) -> None:
            layer(x_1D)

        step()
        one = min(timed(step, options.device) for _ in range(50))
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        told.append(f"| {num_experts} | {parameters:.1f} | {1 / statistics.median(seconds):.0f} | {1000 * one:.2f} |")
    return [*told, "", "A token's time does not grow with the experts it was not sent to; their weights are not read."]


def decoder(num_experts: int, options: argparse.Namespace) -> Decoder:
    """Return the language model; without experts, the dense one."""
    return Decoder(
        VOCABULARY,
        partial(LinearRouter, top_k=TOP_K),
        partial(MLPExperts, hidden_dim=HIDDEN if num_experts else TOP_K * HIDDEN),
        num_experts=max(num_experts, 2),
        d_model=WIDTH,
        num_blocks=BLOCKS,
        num_heads=HEADS,
        moe_blocks="all" if num_experts else "none",
        max_length=LENGTH,
    ).to(options.device)


def decoder_step(num_experts: int, options: argparse.Namespace) -> Step:
    """Return a training step of the language model."""
    model = decoder(num_experts, options).train()
    ids_BS = torch.randint(VOCABULARY, (options.sequences, LENGTH + 1), device=options.device)

    def loss() -> Tensor:
        logits_BSV, context = model(ids_BS[:, :-1])
        return F.cross_entropy(logits_BSV.flatten(0, 1), ids_BS[:, 1:].flatten()) + auxiliary_loss(model, context)

    return optimised(model, loss)


def vit_step(num_experts: int, options: argparse.Namespace) -> Step:
    """Return a training step of the vision transformer."""
    import timm

    hidden = HIDDEN if num_experts else TOP_K * HIDDEN
    vit = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=4,
        embed_dim=WIDTH,
        depth=BLOCKS,
        num_heads=HEADS,
        mlp_ratio=hidden / WIDTH,
        num_classes=10,
        class_token=False,
        global_pool="avg",
    )
    if num_experts:
        experts = partial(MLPExperts, hidden_dim=HIDDEN)
        sparsify(vit, num_experts=num_experts, router=partial(LinearRouter, top_k=TOP_K), experts=experts, blocks="all")
    model = vit.to(options.device).train()
    images = torch.randn(options.sequences * LENGTH // 64, 3, 32, 32, device=options.device)
    labels = torch.randint(10, (len(images),), device=options.device)

    def loss() -> Tensor:
        with provide_context(model) as context:
            return F.cross_entropy(model(images), labels) + auxiliary_loss(model, context)

    return optimised(model, loss)


def optimised(model: nn.Module, loss: Callable[[], Tensor]) -> Step:
    """Return a step that takes a loss down."""
    optimizer = torch.optim.AdamW(model.parameters())
    use_fused_kernel(optimizer)

    on_gpu = next(model.parameters()).is_cuda

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def in_turn(steps: dict[str, Step], options: argparse.Namespace) -> dict[str, list[float]]:
    """Return the times of each step, run in another order each round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.rounds + 1):
        for name in random.Random(number).sample(list(steps), len(steps)):
            seconds = timed(steps[name], options.device)
            if number:
                times[name].append(seconds)
    return times


def profile(step: Step) -> list[str]:
    """Return where a step's time goes, the largest first."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiled:
        for _ in range(3):
            step()
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    told = ["| operation | share |", "| --- | ---: |"]
    return [*told, *(f"| {e.key} | {100 * e.self_cpu_time_total / total:.0f} % |" for e in events[:8])]


PARTS = {"training_step": training_step, "first_step": first_step, "generation": generation}

if __name__ == "__main__":
    main()
