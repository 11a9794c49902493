"""Train a model of one's own, sharded by `fully_shard`, with `attach`; one rank trains it whole.

Run as many times at once as there are ranks: python -m tests.distributed.own_sharding HOW RANK RANKS PORT FILE cpu.
"""

import json
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from routerzoo import LayerSpec, MoE, RoutingContext, StableMoERouter, attach, auxiliary_loss
from tests.moe.test_attach import BiasRouter

VOCABULARY, WIDTH, STEPS = 20, 16, 6


def build_stable(spec):
    return StableMoERouter(spec, stage1_steps=2, top_k=2)


class Block(nn.Module):
    """Has a router whose statistics are counted, one that has none and enters stage 2, and one that no pass reaches."""

    def __init__(self):
        super().__init__()
        spec = LayerSpec(WIDTH, 4, vocab_size=VOCABULARY)
        self.counted, self.staged, self.idle = (MoE(spec, router) for router in (BiasRouter, build_stable, BiasRouter))

    def forward(self, x, context):
        x = x + self.counted(x, context)
        return x + self.staged(x, context)


class Model(nn.Module):
    """Predicts each token from itself."""

    def __init__(self):
        super().__init__()
        self.embedding, self.block, self.head = nn.Embedding(VOCABULARY, WIDTH), Block(), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids, context):
        return self.head(self.block(self.embedding(ids), context))


def train(rank, ranks, device):
    torch.manual_seed(0)
    model = Model().double()
    if ranks > 1:
        mesh = init_device_mesh(device, (ranks,))
        fully_shard(model.block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    layers = [model.block.counted, model.block.staged, model.block.idle]
    attach(model, optimizer, STEPS)
    losses = []
    for _ in range(STEPS):
        ids = torch.randint(VOCABULARY, (8 * 6,)).chunk(ranks)[rank]
        context = RoutingContext(ids, process_group=dist.group.WORLD)
        loss = nn.functional.cross_entropy(model(ids, context), ids) + auxiliary_loss(layers[:2], context)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / ranks
        dist.all_reduce(mean)
        losses.append(mean.item())
    counted, staged, idle = (layer.router for layer in layers)
    return {
        "losses": losses,
        "bias": counted.selection_bias.tolist(),
        "idle": idle.seen,
        "stage": staged.stage,
        "choices": staged.frozen_choices.tolist(),
    }


def main(rank, ranks, port, file, device):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    result = train(rank, ranks, device)  # nothing holds the group any more when it is destroyed
    if rank == 0:
        with open(file, "w", encoding="utf-8") as out:
            json.dump(result, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
