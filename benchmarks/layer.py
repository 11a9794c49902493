"""Speed and memory of one MoE layer, against two floors and against peers.

    pip install -e '.[bench]'
    python benchmarks/layer.py                        # the grid in float32
    python benchmarks/layer.py --dtype bfloat16
    python benchmarks/layer.py --skew                 # one expert takes half of the tokens
    python benchmarks/layer.py --device cuda --minutes 9 --seconds 5   # on a GPU, bfloat16
    python benchmarks/layer.py --only E64 --suffix _e64                # a part, and then
    python benchmarks/layer.py --join FILE.csv FILE.csv --suffix _all  # one table of several parts
    python benchmarks/layer.py --curve                # cost against the number of experts, no peers

A figure is forward and backward of one layer, router included. The contenders of a setting run in one process, in
turn, in another order each round. Two ratios to the expert floor are taken: the median over rounds of the time relative
to the floor's in the same round, and the best time relative to the floor's best. Where neighbours on the same machine
slow a core down for a while, the second is the one that repeats. On a CPU the time is that of the process (other load
does not count), with one thread unless told otherwise, after `routerzoo.tune_cpu`, which serves all contenders alike.
Each setting has a process of its own. Writes a table, a CSV file and a picture.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from contenders import FLOORS, OURS, PEERS, Setting, Unavailable
from torch import Tensor, nn

from routerzoo import tune_cpu

GRIDS = {
    "cpu": {"tokens": [1024, 4096], "d_model": [256, 512], "num_experts": [8, 16, 64], "top_k": [1, 2]},
    "cuda": {"tokens": [4096, 32768], "d_model": [1024, 2048], "num_experts": [8, 64, 128], "top_k": [2, 8]},
}
CURVES = {
    "cpu": {"tokens": [2048], "d_model": [256], "num_experts": [8, 16, 32, 64, 128, 256], "top_k": [2]},
    "cuda": {"tokens": [16384], "d_model": [1024], "num_experts": [8, 16, 32, 64, 128, 256], "top_k": [2]},
}
# A contender whose first step is this many times slower than the floor's is measured by that alone.
HOPELESS = 12.0
ESSENTIAL = frozenset({*FLOORS, *OURS})
# One that is still this many times slower after a few rounds is measured by those.
OUT_OF_THE_RACE, QUALIFYING_ROUNDS = 1.6, 3
MIN_ROUNDS = 7
FIGURES = ("seconds", "ratio", "best ratio", "to active floor", "best to active floor", "peak MiB", "rounds")


def main() -> None:
    """Measure the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default=None, choices=["float32", "bfloat16"])
    parser.add_argument("--experts", nargs="*", default=["mlp", "swiglu"], choices=["mlp", "swiglu"])
    parser.add_argument("--hidden_dim", type=int, default=None, help="hidden units of an expert")
    parser.add_argument("--rounds", type=int, default=200, help="at most so many")
    parser.add_argument("--seconds", type=float, default=40.0, help="after so long, no more than 7 rounds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--skew", action="store_true", help="one expert takes half of the tokens")
    parser.add_argument("--curve", action="store_true", help="cost against the number of experts, k and tokens fixed")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--contenders", nargs="*", default=None, help="only these, beside the floors")
    parser.add_argument("--no-tuning", action="store_true", help="leave memory allocation as the system has it")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no further setting after so long")
    parser.add_argument(
        "--only", nargs="*", default=[""], help="settings whose name contains one of these, such as E64"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--suffix", default="", help="added to the names of the files")
    parser.add_argument(
        "--join",
        nargs="*",
        type=Path,
        help="measure nothing: one table of these files; a setting counts as in the last",
    )
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    if options.one is not None:
        print("RESULT " + json.dumps(measure(Setting(**json.loads(options.one)), options)))
        return
    rows = joined(options.join) if options.join else run_grid(options)
    marks = {"_skew": options.skew, "_curve": options.curve, "_untuned": options.no_tuning, options.suffix: True}
    name = f"layer_{options.device}_{options.dtype}{''.join(mark for mark, on in marks.items() if on)}"
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    summary = summarise(rows)
    (options.out / f"{name}.md").write_text(f"{header(options)}\n\n{summary}\n")
    print(f"\n{header(options)}\n\n{summary}")
    (draw_curve if options.curve else draw)(rows, options.out / f"{name}.png")


def run_grid(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run a process for each setting."""
    grid = (CURVES if options.curve else GRIDS)[options.device]
    points = list(itertools.product(options.experts, *grid.values()))
    rows: list[dict[str, Any]] = []
    started = time.monotonic()
    for number, (experts, *sizes) in enumerate(points):
        setting = Setting(*sizes, experts, options.dtype, options.device, options.hidden_dim)
        if not any(part in named(setting) for part in options.only):
            continue
        minutes = (time.monotonic() - started) / 60
        if minutes > options.minutes:
            print(f"stopped after {minutes:.0f} minutes, {len(points) - number} settings before the end")
            break
        command = [sys.executable, __file__, *sys.argv[1:], "--one", json.dumps(asdict(setting))]
        threads = {"OMP_NUM_THREADS": str(options.threads)} if options.device == "cpu" else {}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **threads})
        results = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not results:
            print(f"{named(setting)}: failed\n{done.stderr[-2000:]}", file=sys.stderr)
            continue
        found = json.loads(results[0])
        rows += [{**asdict(setting), **row} for row in found]
        told = ", ".join(f"{r['contender']} {r['best ratio']:.2f}" for r in found if r["ratio"] is not None)
        print(f"[{number + 1}/{len(points)}] {named(setting)}: {told}", flush=True)
    return rows


def joined(files: Iterable[Path]) -> list[dict[str, Any]]:
    """Read the settings of several runs, each from the last file that has it."""
    numbers = dict.fromkeys(("tokens", "d_model", "num_experts", "top_k"), int) | dict.fromkeys(FIGURES, float)
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for path in files:
        here: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        with path.open(newline="") as file:
            for text in csv.DictReader(file):
                row = {name: numbers.get(name, str)(value) if value else None for name, value in text.items()}
                here.setdefault(point(row), []).append({**row, "note": row["note"] or ""})
        found |= here
    return [row for where in sorted(found) for row in found[where]]


def named(setting: Setting) -> str:
    """Name a setting in short."""
    return f"{setting.experts} T{setting.tokens} d{setting.d_model} E{setting.num_experts} k{setting.top_k}"


def measure(setting: Setting, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all contenders of a setting."""
    warnings.simplefilter("ignore")
    if setting.device == "cpu" and not options.no_tuning:
        tune_cpu()
    torch.manual_seed(0)
    dtype = getattr(torch, setting.dtype)
    x_TD = torch.randn(setting.tokens, setting.d_model, device=setting.device, dtype=dtype)
    if options.skew:
        x_TD[: setting.tokens // 2] = x_TD[0]  # equal tokens go to the same experts
    builders = {**FLOORS, **OURS, **({} if options.no_peers or options.curve else PEERS)}
    if options.contenders is not None:
        builders = {name: build for name, build in builders.items() if name in FLOORS or name in options.contenders}
    steps: dict[str, Callable[[], None]] = {}
    times: dict[str, list[float]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, build in builders.items():
        rows[name] = {"contender": name, **dict.fromkeys(FIGURES)}
        try:
            steps[name] = step_of(build(setting).to(setting.device, dtype), x_TD)
            times[name] = [timed(steps[name], setting.device)]
        except Unavailable as error:
            rows[name]["note"] = str(error)
            steps.pop(name, None)
        except Exception as error:  # a peer may fail in any way; the rest goes on
            rows[name]["note"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            steps.pop(name, None)
    # The first step pays for what the process does once, so the floor's second one is the measure.
    times["expert floor"].append(timed(steps["expert floor"], setting.device))
    quick = [name for name in steps if times[name][0] < HOPELESS * times["expert floor"][1] or name in ESSENTIAL]
    times["expert floor"].pop()
    begun = time.monotonic()
    for number in range(options.rounds):
        if number >= MIN_ROUNDS and time.monotonic() - begun > options.seconds:
            break
        if number == QUALIFYING_ROUNDS:
            limit = OUT_OF_THE_RACE * min(times["expert floor"])
            quick = [name for name in quick if name in ESSENTIAL or min(times[name]) < limit]
        for name in random.Random(number).sample(quick, len(quick)):
            times[name].append(timed(steps[name], setting.device))
    for name in steps:
        # The first round warms up.
        own = times[name][1:] or times[name]
        rows[name]["seconds"] = min(own)
        rows[name]["rounds"] = len(own)
        for column, other in (("ratio", "expert floor"), ("to active floor", "active floor")):
            pairs = zip(own, times[other][1:], strict=False)
            rows[name][column] = statistics.median(a / b for a, b in pairs)
        rows[name]["best ratio"] = min(own) / min(times["expert floor"][1:])
        rows[name]["best to active floor"] = min(own) / min(times["active floor"][1:])
        rows[name]["peak MiB"] = peak_mib(steps[name], setting.device) if name in quick else None
    return [{"note": "", **row} for row in rows.values()]


def step_of(layer: nn.Module, x_TD: Tensor) -> Callable[[], None]:
    """Return forward and backward of a layer; gradients are made anew each time, as optimisers leave them."""
    layer.train()
    x_TD = x_TD.clone().requires_grad_()
    grad_TD = torch.randn_like(x_TD)

    def step() -> None:
        for parameter in layer.parameters():
            parameter.grad = None
        x_TD.grad = None
        layer(x_TD).backward(grad_TD)

    return step


def timed(step: Callable[[], None], device: str) -> float:
    """Return the seconds of a step: of this process's CPU time, or of the GPU."""
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        repeats = 5
        begin.record()
        for _ in range(repeats):
            step()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000 / repeats
    begun = time.process_time()
    step()
    return time.process_time() - begun


def peak_mib(step: Callable[[], None], device: str) -> float | None:
    """Return how far memory rises during a step, MiB; on a CPU only where the kernel tells (Linux)."""
    if device == "cuda":
        step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak / 2**20


def header(options: argparse.Namespace) -> str:
    """Say where and how this was measured."""
    machine = torch.cuda.get_device_name() if options.device == "cuda" else cpu_name()
    skew = ", one expert takes half of the tokens" if options.skew else ""
    tuned = "" if options.device == "cuda" else f", {'without' if options.no_tuning else 'with'} tune_cpu"
    return (
        f"One MoE layer, forward and backward, {options.dtype}{skew}. "
        f"{machine}, {options.threads} thread(s){tuned}, torch {torch.__version__}.\n"
        f"Command: `python benchmarks/layer.py {' '.join(sys.argv[1:])}`"
    )


def cpu_name() -> str:
    """Name the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def summarise(rows: list[dict[str, Any]]) -> str:
    """Return a table of each contender's ratios over the settings that it ran."""
    table = [
        "Time relative to the expert floor's over the settings: of the best times (median, lowest, highest), and the"
        " median of the medians of pairs; relative to the active floor; peak memory to the expert floor's.",
        "",
        "| contender | settings | best: median | lowest | highest | pairs | to the active floor | memory | highest |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    floors = {point(row): row["peak MiB"] for row in rows if row["contender"] == "expert floor"}
    for name in dict.fromkeys(row["contender"] for row in rows):
        own = [row for row in rows if row["contender"] == name and row["ratio"] is not None]
        if not own:
            note = next(row["note"] for row in rows if row["contender"] == name)
            table.append(f"| {name} | 0 ({note}) | | | | | | | |")
            continue
        best = [row["best ratio"] for row in own]
        pairs = statistics.median(row["ratio"] for row in own)
        active = statistics.median(row["best to active floor"] for row in own)
        memory = [row["peak MiB"] / floors[point(row)] for row in own if row["peak MiB"] is not None] or [math.nan]
        table.append(
            f"| {name} | {len(own)} | {statistics.median(best):.2f} | {min(best):.2f} | {max(best):.2f} | {pairs:.2f} "
            f"| {active:.2f} | {statistics.median(memory):.2f} | {max(memory):.2f} |"
        )
    return "\n".join([*table, "", against_peers(rows, floors)])


def against_peers(rows: list[dict[str, Any]], settings: Iterable[tuple[Any, ...]]) -> str:
    """Say in how many settings ours is ahead of every peer of the same precision, and where it is not."""
    ahead, behind = 0, []
    for where in settings:
        own = [row for row in rows if point(row) == where and row["ratio"] is not None]
        here = {row["contender"]: row["best ratio"] for row in own}
        equal = {row["contender"] for row in own if "bf16" not in row["contender"] or row["dtype"] == "bfloat16"}
        rivals = {name: ratio for name, ratio in here.items() if name in PEERS and name in equal}
        if not rivals or "routerzoo" not in here:
            continue
        fastest = min(rivals, key=rivals.__getitem__)
        ahead += here["routerzoo"] < rivals[fastest]
        if here["routerzoo"] >= rivals[fastest]:
            kind, tokens, d_model, num_experts, top_k = where
            behind.append(
                f"- {kind} T{tokens} d{d_model} E{num_experts} k{top_k}: {here['routerzoo']:.3f}, "
                f"{fastest} {rivals[fastest]:.3f}"
            )
    told = f"Ahead of every peer of the same precision in {ahead} of {ahead + len(behind)} settings (best times)."
    return "\n".join([told, *(["", "Behind in:", "", *behind] if behind else [])])


def point(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what identifies a row's setting."""
    return tuple(row[name] for name in ("experts", "tokens", "d_model", "num_experts", "top_k"))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw every contender's ratios."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = [n for n in dict.fromkeys(r["contender"] for r in rows) if n != "expert floor"]
    for place, name in enumerate(names):
        own = [row for row in rows if row["contender"] == name and row["ratio"] is not None]
        sizes = [8 + row["num_experts"] for row in own]
        axes.scatter([row["best ratio"] for row in own], [place] * len(own), s=sizes, alpha=0.5)
    axes.axvline(1, color="black", linewidth=1, linestyle="--")
    axes.set(xscale="log", xlabel="time relative to the expert floor (a larger dot is more experts)")
    axes.set_yticks(range(len(names)), labels=names)
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x", which="both")
    figure.savefig(path, dpi=110)


def draw_curve(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the time of each contender against the number of experts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    kinds = list(dict.fromkeys(row["experts"] for row in rows))
    for name, colour in (("active floor", "tab:grey"), ("expert floor", "tab:blue"), ("routerzoo", "tab:red")):
        for kind, style in zip(kinds, ("-o", "--s"), strict=False):
            own = [row for row in rows if row["contender"] == name and row["experts"] == kind]
            milliseconds = [1000 * row["seconds"] for row in own]
            axes.plot([row["num_experts"] for row in own], milliseconds, style, color=colour, label=f"{name}, {kind}")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="experts", ylabel="forward and backward, ms", ylim=(0, None))
    axes.set_title(f"{rows[0]['tokens']} tokens, width {rows[0]['d_model']}, k = {rows[0]['top_k']}")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
