"""Everything to measure on one GPU, in one call of at most nine minutes.

    pip wheel -q --no-deps -w wheels . plugins/*/   # of the commit to measure
    pip download -q --no-deps --python-version 3.12 --only-binary :all: -d wheels 'jsonargparse<5' docstring-parser \
        typeshed-client pooch platformdirs liger-kernel   # what the machine lacks, for its Python
    python benchmarks/gpu.py --out gpu --wheels wheels --text text8.txt
    python benchmarks/gpu.py --out gpu --wheels wheels --text text8.txt --parts scaling   # a call of its own
    python benchmarks/gpu.py --out gpu --device cpu   # a dry run on a CPU: small sizes, the same path

In this order, so that the most important figures come first and each is written when it is there:

1. the card's rates: a copy, and a large bfloat16 product;
2. the layer at four points (tokens, width, experts, k, hidden units): a target, fine-grained experts, fewer tokens, and
   coarse experts; forward and backward of every contender, one at a time in memory;
3. profiles of our layer and of the best peer at the first point;
4. the tests that are marked `gpu`;
5. six routers on text, 2,000 steps each, three at a time;
6. only with `--parts scaling`: the same for 2.5, 10 and 40 million tokens, and power laws of one exponent.

"Share of the dense rate" is the time of the same products by cuBLAS alone, one after another, divided by a contender's
time; "of the active floor" likewise with a dense network of the active size. A contender that fails has a note instead
of figures; one whose process crashes or takes too long is skipped. liger-kernel is not autotuned. Results: `layer.csv`,
`profile.txt`, `tests.txt`, `fits.csv`, `scaling.csv`, what these runs printed, and `summary.md`.
"""
# Shape suffixes: N rows of all assignments, D model width, H hidden width, Z 2 H, E experts.

from __future__ import annotations

import argparse
import csv
import gc
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

HERE, ROOT = Path(__file__).resolve(), Path(__file__).resolve().parents[1]
POINTS = {
    "cuda": ["32768,2048,64,8,1024", "32768,2048,256,32,256", "4096,2048,64,8,1024", "32768,2048,8,2,4096"],
    "cpu": ["64,32,8,2,32", "16,32,4,2,32"],
}
PROFILED = ("routerzoo", "liger")
ROUTERS = ("LinearRouter", "HyperRouter", "XMoERouter", "StableMoERouter", "HashRouter", "RandomFrozenRouter")
STARTED = "started.json"
LONGEST = 120
"""Seconds that a process may take for a point."""
SECONDS = {"layer": 230, "tests": 110, "fits": 190, "scaling": 510}
STEPS = {"cuda": 2000, "cpu": 4}
SCALED_STEPS = {"cuda": (152, 608, 2440), "cpu": (1, 2, 4)}
"""Steps of 16,384 tokens: 2.5, 10 and 40 million tokens."""
TOKENS = {"cuda": 32 * 512, "cpu": 4 * 32}
COLUMNS = (
    "point",
    "contender",
    "ms",
    "best ms",
    "TFLOP/s",
    "of dense rate",
    "of active floor",
    "peak MiB",
    "error",
    "note",
)


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--wheels", type=Path, default=None, help="a folder of wheels to run with")
    parser.add_argument(
        "--text", default="tiny-shakespeare", help="text to train on: a file, or the name of a data set"
    )
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--steps", type=int, nargs="*", default=None, help="of fits; by default 2000, and 4 on a CPU")
    parser.add_argument("--parts", nargs="*", default=["layer", "tests", "fits"], choices=list(SECONDS))
    parser.add_argument("--point", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point is not None:
        _measure_point(options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * options.minutes - 20
    # liger-kernel would try 160 configurations before its first step, longer than all that is measured here.
    own = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "4", "LIGER_FUSED_MOE_AUTOTUNE": "0"}
    environment = {**os.environ, **own}
    parts: dict[str, Callable[[argparse.Namespace, dict[str, str], float], list[str]]]
    parts = {"layer": _layer, "tests": _tests, "fits": _fits, "scaling": _scaling}
    with tempfile.TemporaryDirectory() as packages:
        if options.wheels is not None:
            install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", packages]
            subprocess.run([*install, *map(str, sorted(options.wheels.glob("*.whl")))], check=True)
            environment["PYTHONPATH"] = os.pathsep.join([packages, environment.get("PYTHONPATH", "")])
        told = [_machine(environment)]
        for part in options.parts:
            limit = min(ends, time.monotonic() + SECONDS[part]) if options.device == "cuda" else ends
            told += ["", f"## {part}", "", *parts[part](options, environment, limit)]
            (options.out / "summary.md").write_text("\n".join(told) + "\n", encoding="utf-8")
    print("\n".join(told))


def _machine(environment: dict[str, str]) -> str:
    program = (
        "import torch, triton; name = torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU';"
        "print(f'{name}; torch {torch.__version__}; triton {triton.__version__}; CUDA {torch.version.cuda}')"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        driver = "no driver"
    return f"{done.stdout.strip()}; {driver}"


# --- the layer ---


def _layer(options: argparse.Namespace, environment: dict[str, str], limit: float) -> list[str]:
    table = options.out / "layer.csv"
    with table.open("w", newline="") as file:
        csv.DictWriter(file, COLUMNS).writeheader()
    for point in POINTS[options.device]:
        ended = "no time was left"
        for _ in range(4):  # a process that dies takes a contender with it
            left = min(limit - time.monotonic(), LONGEST)
            if left < 10:
                break
            command = [
                sys.executable,
                str(HERE),
                "--out",
                str(options.out),
                "--device",
                options.device,
                "--point",
                point,
            ]
            try:
                code = subprocess.run(command, env=environment, timeout=left, check=False).returncode
            except subprocess.TimeoutExpired:
                ended = f"stopped after {left:.0f} s"
                continue
            ended = "" if code == 0 else f"the process exited with {code}"
            if not ended:
                break
        if ended:
            _write(options, {"point": point, "contender": "all that is missing", "note": ended})
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [f"| {' | '.join(COLUMNS)} |", f"| {' | '.join('---' for _ in COLUMNS)} |"]
    return [*lines, *(f"| {' | '.join(row[name] for name in COLUMNS)} |" for row in rows)]


def _measure_point(options: argparse.Namespace) -> None:
    """Measure the contenders of a point that have no row yet, one at a time in memory."""
    import torch
    from contenders import CudaGraph, DenseFloor, Setting, Unavailable, compiled, liger, mixtral, ours

    cuda = options.device == "cuda"
    tokens, d_model, num_experts, top_k, hidden = map(int, options.point.split(","))
    setting = Setting(tokens, d_model, num_experts, top_k, "swiglu", "bfloat16", options.device, hidden)
    generator = torch.Generator(options.device).manual_seed(0)
    draw = partial(torch.randn, tokens, d_model, device=options.device, dtype=torch.bfloat16, generator=generator)
    x_TD, grad_TD = draw(), draw()
    flops = 6 * tokens * top_k * 3 * d_model * hidden
    contenders: dict[str, Callable[[], Callable[[], Any]]] = {
        "dense products": lambda: _dense_products(setting),
        "grouped products": lambda: _grouped_products(setting),
    }
    layers: dict[str, Callable[[Setting], torch.nn.Module]] = {
        "active floor": lambda setting: DenseFloor(replace(setting, top_k=1, hidden_dim=top_k * hidden)),
        "routerzoo": ours,
        "liger": liger,
        "transformers grouped_mm": partial(mixtral, implementation="grouped_mm"),
        "routerzoo Triton products": partial(_with_means, "triton"),
        "routerzoo composed": partial(ours, low_memory=False),
        "routerzoo CUDA graph": CudaGraph,
    }
    if options.point in (POINTS["cuda"][0], *POINTS["cpu"]):
        layers["routerzoo compiled"] = compiled  # Inductor takes its time
    for name, build in layers.items():
        contenders[name] = partial(_layer_step, build, setting, x_TD, grad_TD)
    with (options.out / "layer.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["point"] == options.point]
    seconds = {row["contender"]: float(row["ms"]) / 1e3 for row in rows if row["ms"]}
    if not rows and options.point == POINTS[options.device][0]:
        _write(options, {"point": "", "contender": "rates", "note": _rates(options.device)})
    expected = None
    for name in [name for name in contenders if name not in {row["contender"] for row in rows}]:
        row: dict[str, Any] = {"point": options.point, "contender": name}
        started = options.out / STARTED
        if started.exists() and json.loads(started.read_text()) == [options.point, name]:
            _write(options, {**row, "note": "the process died or took too long"})
            continue
        started.write_text(json.dumps([options.point, name]))
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
        try:
            torch.manual_seed(1)
            step = contenders[name]()
            times = _times(step, cuda)
            seconds[name] = times[len(times) // 2]
            row |= {"ms": f"{1e3 * seconds[name]:.3f}", "best ms": f"{1e3 * times[0]:.3f}"}
            row["TFLOP/s"] = f"{flops / seconds[name] / 1e12:.1f}"
            for column, floor in (("of dense rate", "dense products"), ("of active floor", "active floor")):
                if floor in seconds:
                    row[column] = f"{seconds[floor] / seconds[name]:.3f}"
            if cuda and "graph" not in name:  # a graph has its memory before its first step
                if name in layers:
                    step(release=True)
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                step()
                row["peak MiB"] = f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f}"
            found = step()
            if name.startswith(("routerzoo", "liger")) and found is not None:
                expected = found if expected is None else expected
                errors = [
                    float((a.float() - b.float()).norm() / b.float().norm())
                    for a, b in zip(found, expected, strict=True)
                ]
                row["error"] = f"{max(errors):.1e}"
            del step, found
        except Unavailable as error:
            row["note"] = str(error)
        except Exception as error:  # the others are measured all the same
            row["note"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        _write(options, row)
        if cuda:
            try:
                torch.cuda.synchronize()
            except Exception:  # nothing can be measured after it in this process
                os._exit(1)
    if cuda and options.point == POINTS["cuda"][0]:
        for name in PROFILED:  # last, since a profiler slows down what follows
            torch.manual_seed(1)
            _profile(options, name, contenders[name]())


def _write(options: argparse.Namespace, row: dict[str, Any]) -> None:
    with (options.out / "layer.csv").open("a", newline="") as file:
        csv.DictWriter(file, COLUMNS, restval="").writerow(row)
    print({name: value for name, value in row.items() if value}, flush=True)


def _times(step: Callable[[], Any], cuda: bool) -> list[float]:
    """Return the seconds of 20 steps, sorted; on a CPU of one, which is a dry run."""
    import torch

    step()
    if not cuda:
        begun = time.perf_counter()
        step()
        return [time.perf_counter() - begun]
    for _ in range(2):
        step()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(20)]
    for begin, end in pairs:
        begin.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) / 1e3 for begin, end in pairs)


def _layer_step(build: Any, setting: Any, x_TD: Any, grad_TD: Any) -> Callable[..., tuple[Any, Any] | None]:
    import torch

    with torch.device(setting.device):
        layer = build(setting)
    layer = layer.to(setting.device, torch.bfloat16).train()
    x_TD = x_TD.clone().requires_grad_()

    def step(release: bool = False) -> tuple[Any, Any] | None:
        layer.zero_grad(set_to_none=True)
        x_TD.grad = None
        if release:
            return None
        y_TD = layer(x_TD)
        y_TD.backward(grad_TD)
        return y_TD.detach(), x_TD.grad

    return step


def _with_means(means: str, setting: Any) -> Any:
    """Our layer, computed by means that are not the default."""
    from contenders import ours

    from routerzoo.moe import dispatch

    layer = ours(setting, low_memory=True)
    chosen, forward = dispatch.means_for, layer.forward

    def forced(*arguments: Any) -> Any:
        dispatch.means_for = lambda x_TD, network: means
        try:
            return forward(*arguments)
        finally:
            dispatch.means_for = chosen

    if setting.device == "cuda":  # elsewhere Triton would interpret
        layer.forward = forced
    return layer


def _products(setting: Any, experts: int | None) -> tuple[Any, ...]:
    """Return x_ND, a_NH, z_NZ, and the weights, stacked where there are experts."""
    import torch

    draw = partial(torch.randn, device=setting.device, dtype=torch.bfloat16)
    num_rows, stacked = setting.tokens * setting.top_k, () if experts is None else (experts,)
    d, h = setting.d_model, setting.hidden
    return draw(num_rows, d), draw(num_rows, h), draw(num_rows, 2 * h), draw(*stacked, 2 * h, d), draw(*stacked, d, h)


def _dense_products(setting: Any) -> Callable[[], None]:
    """The six products of a step, of one expert with all rows."""
    x_ND, a_NH, z_NZ, up, down = _products(setting, None)

    def step() -> None:
        for a, b in ((x_ND, up.T), (a_NH, down.T), (x_ND, down), (z_NZ, up), (z_NZ.T, x_ND), (x_ND.T, a_NH)):
            a @ b

    return step


def _grouped_products(setting: Any) -> Callable[[], None]:
    """The same by torch's grouped product, every expert with as many rows."""
    import torch
    import torch.nn.functional as F

    x_ND, a_NH, z_NZ, up, down = _products(setting, setting.num_experts)
    each = len(x_ND) // setting.num_experts
    ends_E = torch.arange(1, setting.num_experts + 1, device=setting.device, dtype=torch.int32) * each

    def step() -> None:
        pairs = ((x_ND, up.mT), (a_NH, down.mT), (x_ND, down), (z_NZ, up), (z_NZ.T, x_ND), (x_ND.T, a_NH))
        for a, b in pairs:
            F.grouped_mm(a, b, offs=ends_E)

    return step


def _rates(device: str) -> str:
    import torch

    if device != "cuda":
        return "a dry run on a CPU"
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    copy = _times(partial(torch.empty_like(source).copy_, source), cuda=True)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = _times(partial(torch.mm, a, b), cuda=True)
    return f"copy {2**32 / copy[10] / 1e12:.2f} TB/s; 8192^3 in bfloat16 {2 * 8192**3 / product[10] / 1e12:.0f} TFLOP/s"


def _profile(options: argparse.Namespace, name: str, step: Callable[[], Any]) -> None:
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
        step()
        torch.cuda.synchronize()
    table = profiled.key_averages().table(sort_by="cuda_time_total", row_limit=30, max_name_column_width=70)
    with (options.out / "profile.txt").open("a", encoding="utf-8") as file:
        file.write(f"## {options.point} {name}\n{table}\n")


# --- tests and fits ---


def _tests(options: argparse.Namespace, environment: dict[str, str], limit: float) -> list[str]:
    addopts = "addopts=--import-mode=importlib --strict-markers -ra"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "8", "-m", "gpu", "-W", "default", "-o", addopts]
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")]
    command += ["-v", "--tb=short", "tests/test_gpu.py", *map(str, files)]  # the layer first
    if options.device == "cpu":
        command += ["--collect-only", "-n", "0"]
    with (options.out / "tests.txt").open("w") as log:
        running = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            running.wait(max(limit - time.monotonic() - 15, 1))
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGINT)  # pytest then prints what failed
            try:
                running.wait(15)
            except subprocess.TimeoutExpired:
                running.kill()
    return [line for line in (options.out / "tests.txt").read_text().splitlines()[-12:] if line.strip()]


def _fits(options: argparse.Namespace, environment: dict[str, str], limit: float) -> list[str]:
    """Train six routers, three at a time, so that the card is not idle between launches."""
    return _table(_trained(options, environment, limit, options.steps or [STEPS[options.device]], "fits"))


def _scaling(options: argparse.Namespace, environment: dict[str, str], limit: float) -> list[str]:
    """Train them for several numbers of tokens, the smallest first, and fit power laws."""
    rows = _trained(options, environment, limit, options.steps or SCALED_STEPS[options.device], "scaling")
    losses = {(row["router"], row["tokens"]): row["bits per byte"] for row in rows if not row["note"]}
    return [*_table(rows), "", *_power_laws(losses)]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    return [f"| {' | '.join(rows[0])} |", "| --- " * len(rows[0]) + "|"] + [
        f"| {' | '.join(str(value) for value in row.values())} |" for row in rows
    ]


def _power_laws(losses: dict[tuple[str, int], float]) -> list[str]:
    """Fit `loss = a tokens^-b` by least squares of logarithms, one b for all routers; and compare a's.

    The multiplier of a router is how many times the tokens the linear gate takes to reach its loss.
    """
    means, products, squares = {}, 0.0, 0.0
    for router in dict.fromkeys(router for router, _ in losses):
        points = [(math.log(tokens), math.log(loss)) for (name, tokens), loss in losses.items() if name == router]
        x_mean, y_mean = (statistics.fmean(values) for values in zip(*points, strict=True))
        means[router] = x_mean, y_mean
        products += sum((x - x_mean) * (y - y_mean) for x, y in points)
        squares += sum((x - x_mean) ** 2 for x, _ in points)
    if squares == 0 or products >= 0 or "LinearRouter" not in means:
        return ["No power laws: they need losses that fall, and the linear gate's."]
    exponent = -products / squares
    scales = {router: y_mean + exponent * x_mean for router, (x_mean, y_mean) in means.items()}
    multipliers = {router: math.exp((scales["LinearRouter"] - scale) / exponent) for router, scale in scales.items()}
    return [
        f"loss = a tokens^-{exponent:.4f}",
        "",
        "| router | a | tokens that the linear gate takes |",
        "| --- | --- | --- |",
        *(f"| {router} | {math.exp(scales[router]):.3f} | {multipliers[router]:.2f} |" for router in scales),
    ]


def _trained(
    options: argparse.Namespace, environment: dict[str, str], limit: float, numbers: Sequence[int], name: str
) -> list[dict[str, Any]]:
    """Train each router for each number of steps; return a row of each, and write it when it is there."""
    (options.out / f"{name}.csv").write_text("router,tokens,bits per byte,seconds,note\n")
    small = options.device == "cpu"
    sizes = {"d_model": 32 if small else 384, "num_blocks": 1 if small else 6, "num_heads": 2 if small else 6}
    with tempfile.TemporaryDirectory() as runs:

        def fit(router: str, steps: int) -> dict[str, Any]:
            folder = Path(runs) / f"{router}_{steps}"
            command = [sys.executable, "-m", "routerzoo", "fit"]
            for config in ("tasks/language", f"routers/{router}", "trainer/cpu" if small else "trainer/gpu"):
                command += ["--config", str(ROOT / f"configs/{config}.yaml")]
            arguments = {f"model.{name}": value for name, value in sizes.items()} | {
                "model.num_experts": 16,
                "model.experts": "SwiGLUExperts",
                "model.experts.hidden_dim": 32 if small else 256,
                "data.dataset": options.text,
                "data.sequence_length": 32 if small else 512,
                "data.batch_size": 4 if small else 32,
                "trainer.max_steps": steps,
                "trainer.val_check_interval": max(steps // 4, 1),
                "trainer.limit_val_batches": 2 if small else 20,
                "trainer.enable_progress_bar": "false",
                "run_dir": folder,
            }
            for argument, value in arguments.items():
                command += [f"--{argument}", str(value)]
            begun, note = time.perf_counter(), ""
            try:
                left = max(limit - time.monotonic(), 1)
                done = subprocess.run(
                    command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=left, check=False
                )
            except subprocess.TimeoutExpired:
                note = "unfinished"
            else:
                with (options.out / f"{name}.txt").open("a", encoding="utf-8") as file:
                    file.write(f"## {router}, {steps} steps\n{done.stdout}{done.stderr}\n")
                if done.returncode != 0:
                    note = f"failed: {(done.stderr or done.stdout).strip().splitlines()[-1][:150]}"
            losses = list(_validation(folder))
            row = {
                "router": router,
                "tokens": steps * TOKENS[options.device],
                "bits per byte": round(losses[-1], 4) if losses else "",
                "seconds": round(time.perf_counter() - begun),
                "note": note,
            }
            with (options.out / f"{name}.csv").open("a", newline="") as file:
                csv.writer(file).writerow(row.values())
            return row

        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(fit, *zip(*((router, n) for n in numbers for router in ROUTERS), strict=True)))


def _validation(folder: Path) -> Iterator[float]:
    for path in folder.rglob("metrics.csv"):
        with path.open(newline="") as file:
            yield from (float(row["val/bpb"]) for row in csv.DictReader(file) if row.get("val/bpb"))


if __name__ == "__main__":
    main()
