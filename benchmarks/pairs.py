"""One MoE layer of two versions of the package on a CPU, step by step in turn, over the grid of `layer.py`.

    git worktree add /tmp/old COMMIT
    python benchmarks/pairs.py /tmp/old                  # below ten minutes
    python benchmarks/pairs.py /tmp/old --low_memory     # with what is an option on a CPU

Each version has a process that builds every setting's layer and steps, forward and backward, when it is asked to. A
ratio is the new version's processor time over the old one's in the same round; which goes first changes by round. At
the end stand the median over the settings, and each setting's median and ratio of best times.
"""

# Shape suffixes: T tokens, D model width.

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GRID = {
    "experts": ("mlp", "swiglu"),
    "tokens": (1024, 4096),
    "d_model": (256, 512),
    "num_experts": (8, 16, 64),
    "top_k": (1, 2),
}
FEWEST_ROUNDS = 3


def main() -> None:
    """Measure the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="a checkout of the older version")
    parser.add_argument("--low_memory", action="store_true", help="of the new version")
    parser.add_argument("--minutes", type=float, default=8.0, help="shared by the settings, at least 3 rounds each")
    parser.add_argument("--out", type=Path, default=Path("layer_pairs.csv"))
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        _serve(options.low_memory)
        return
    settings = [dict(zip(GRID, point, strict=True)) for point in itertools.product(*GRID.values())]
    random.Random(0).shuffle(settings)  # so that a run that is cut short has seen all kinds
    versions = {
        "new": _Version(options.old, ROOT, options.low_memory),
        "old": _Version(options.old, options.old.resolve(), low_memory=False),
    }
    begun, rows = time.monotonic(), list[dict[str, Any]]()
    for number, setting in enumerate(settings):
        ends = begun + 60 * options.minutes * (number + 1) / len(settings)
        for version in versions.values():
            version.ask(setting)
        times: dict[str, list[float]] = {name: [] for name in versions}
        while len(times["new"]) < FEWEST_ROUNDS or time.monotonic() < ends:
            for name in sorted(versions, reverse=len(times["new"]) % 2 == 0):
                times[name].append(versions[name].ask("step"))
        ratio = statistics.median(new / old for new, old in zip(times["new"], times["old"], strict=True))
        best = min(times["new"]) / min(times["old"])
        rows.append({**setting, "rounds": len(times["new"]), "pairs": round(ratio, 3), "best": round(best, 3)})
        print(rows[-1], flush=True)
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    for column in ("pairs", "best"):
        values = [row[column] for row in rows]
        told = f"median {statistics.median(values):.3f}, lowest {min(values):.3f}, highest {max(values):.3f}"
        print(f"new to old, {column}, {len(rows)} settings: {told}")


class _Version:
    """A process that computes with the package of one checkout."""

    def __init__(self, old: Path, checkout: Path, low_memory: bool) -> None:
        command = [sys.executable, __file__, str(old), "--serve", *(["--low_memory"] if low_memory else [])]
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, cwd=checkout, text=True, stdin=pipe, stdout=pipe)
        if not Path(self.ask("where")).is_relative_to(checkout):
            raise SystemExit(
                f"{sys.executable} does not import routerzoo from {checkout}: uninstall it, or take another"
            )

    def ask(self, question: Any) -> Any:
        """Return what the process replies."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        if not (reply := self.process.stdout.readline()):
            raise SystemExit(f"the process that measures ended at {question}")
        return json.loads(reply)


def _serve(low_memory: bool) -> None:
    import routerzoo

    routerzoo.tune_cpu()
    step: Callable[[], float] | None = None
    for line in sys.stdin:
        question: Any = json.loads(line)
        reply: Any = None
        if question == "where":
            reply = routerzoo.__file__
        elif question == "step":
            assert step is not None
            reply = step()
        else:
            step = None  # before another layer takes memory
            step = _step_of(question, low_memory)
            step()  # pays for what is done once
        print(json.dumps(reply), flush=True)


def _step_of(setting: dict[str, Any], low_memory: bool) -> Callable[[], float]:
    import torch

    from routerzoo import LinearRouter, MLPExperts, MoE, SwiGLUExperts

    gated, d_model = setting["experts"] == "swiglu", setting["d_model"]
    hidden = -(-8 * d_model // 24) * 8 if gated else 4 * d_model
    experts = partial(SwiGLUExperts if gated else MLPExperts, hidden_dim=hidden, bias=False)
    router = partial(LinearRouter, top_k=setting["top_k"])
    torch.manual_seed(0)
    more: dict[str, Any] = {"low_memory": True} if low_memory else {}  # older versions have no such option
    layer = MoE(d_model=d_model, num_experts=setting["num_experts"], router=router, experts=experts, **more)
    x_TD = torch.randn(setting["tokens"], d_model, requires_grad=True)
    grad_TD = torch.randn(setting["tokens"], d_model)

    def step() -> float:
        for tensor in (x_TD, *layer.parameters()):
            tensor.grad = None
        begun = time.process_time()
        layer(x_TD).backward(grad_TD)
        return time.process_time() - begun

    return step


if __name__ == "__main__":
    main()
