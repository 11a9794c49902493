"""Compute one MoE layer on several processes, of which some have few tokens or none, and compare it with one process.

Run as many times at once as there are ranks: python -m tests.distributed.uneven_loads HOW RANK RANKS PORT FILE cpu,
where HOW is the name of the experts.
"""
# Shape suffixes: T tokens, D model width.

import copy
import json
import os
import sys
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from routerzoo import LayerSpec, LinearRouter, MLPExperts, MoE, SwiGLUExperts
from routerzoo.distributed.expert_parallel import shard_experts

EXPERTS = {"mlp": MLPExperts, "swiglu": partial(SwiGLUExperts, bias=True)}
TOKENS = [[5, 0, 7, 1], [0, 9, 0, 0], [0, 0, 3, 0], [0, 0, 0, 0], [4, 4, 4, 4]]
"""How many tokens each rank has."""
FAVOURS = [None, 0, 3]
"""An expert that takes all tokens: of the first rank, of the last."""
WIDTH = 16


def difference(one, other):
    assert one.shape == other.shape
    assert one.isfinite().all()
    return float((one - other).detach().abs().max()) if one.numel() else 0.0


def differences(layer, alone, sizes, rank):
    """Return the largest difference of outputs, gradients of inputs and gradients of experts."""
    x_TD = torch.randn(sum(sizes), WIDTH, dtype=torch.float64)
    target_TD = torch.randn(sum(sizes), WIDTH, dtype=torch.float64)
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    mine_TD, all_TD = x_TD[own].clone().requires_grad_(), x_TD.clone().requires_grad_()
    layer.zero_grad()
    alone.zero_grad()
    out_TD, expected_TD = layer(mine_TD), alone(all_TD)
    (out_TD - target_TD[own]).square().sum().backward()
    (expected_TD - target_TD).square().sum().backward()
    found = [difference(out_TD, expected_TD[own]), difference(mine_TD.grad, all_TD.grad[own])]
    for mine, whole in zip(layer.experts.parameters(), alone.experts.parameters(), strict=True):
        # Gradients are means over the ranks, whose losses are sums here.
        found.append(difference(mine.grad.full_tensor() * len(sizes), whole.grad))
    # Something was computed, for all that was equal.
    assert not sum(sizes) or all(float(p.grad.abs().sum()) > 0 for p in alone.experts.parameters())
    return max(found)


def main(how, rank, ranks, port, file):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    results = {}
    for favoured in FAVOURS:
        router = partial(LinearRouter, top_k=2 if favoured is None else 1, bias=True)
        layer = MoE(LayerSpec(WIDTH, 4), router, EXPERTS[how]).double()
        if favoured is not None:
            with torch.no_grad():
                layer.router.bias[favoured] = 10.0
        alone = copy.deepcopy(layer)
        shard_experts(layer, init_device_mesh("cpu", (ranks,), mesh_dim_names=("experts",)))
        for sizes in TOKENS:
            own = differences(layer, alone, sizes[:ranks], rank)
            every = [0.0] * ranks
            dist.all_gather_object(every, own)
            results[f"favoured {favoured}, tokens {sizes[:ranks]}"] = max(every)
    if rank == 0:
        with open(file, "w", encoding="utf-8") as out:
            json.dump(results, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
