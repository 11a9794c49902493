"""Train a small model with each router on this process's share of a batch, and write its losses down.

Run as many times at once as there are ranks: python -m tests.distributed.data_parallel HOW RANK RANKS PORT FILE DEVICE,
where HOW is ddp, fsdp, or the number of ranks that share experts, with "-checkpoint" behind it where activations are
recomputed, and DEVICE cpu or cuda.
"""
# Shape suffixes: T tokens, B sequences, S tokens of a sequence, D model width.

import json
import os
import sys
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import routerzoo
from routerzoo import LayerSpec, MoE, RoutingContext, attach, auxiliary_loss
from routerzoo.distributed.collectives import all_ranks, sum_over_ranks
from routerzoo.distributed.fsdp import average_gradients, shard_model
from routerzoo.errors import UserError
from routerzoo.moe.auxiliary_loss import ROUTING_LOSSES

SEQUENCES, LENGTH, WIDTH, EXPERTS, VOCABULARY, STEPS = 8, 6, 16, 4, 20, 4


class Model(nn.Module):
    """An embedding, two MoE layers and a head."""

    def __init__(self, router, auxiliary=0.1, checkpointing=False):
        super().__init__()
        self.auxiliary, self.checkpointing = auxiliary, checkpointing
        specs = [
            LayerSpec(WIDTH, EXPERTS, layer, 2, VOCABULARY, LENGTH, hidden_dim=2 * WIDTH, num_tasks=2)
            for layer in range(2)
        ]
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([MoE(spec, router) for spec in specs])
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids_BS, first, step):
        batch, device = len(ids_BS), ids_BS.device
        tokens = torch.arange(batch * LENGTH, device=device)
        own = slice(first * LENGTH, (first + batch) * LENGTH)
        drawn, dtype = torch.Generator().manual_seed(step), self.head.weight.dtype
        attention = torch.randn(SEQUENCES * LENGTH, 2, LENGTH, dtype=dtype, generator=drawn).to(device)
        # No two tokens are the same: an assignment would break ties by the last bit.
        different_TD = torch.randn(SEQUENCES * LENGTH, WIDTH, dtype=dtype, generator=drawn)[own].to(device)
        context = RoutingContext(
            token_ids=ids_BS.flatten(),
            positions=tokens % LENGTH,
            sequence_ids=tokens // LENGTH,
            task_ids=(tokens // LENGTH + first) % 2,
            attention=attention.softmax(-1)[own],
            step=step,
            total_steps=STEPS,
            process_group=all_ranks(),
        )
        x_TD = self.embedding(ids_BS.flatten()) + different_TD
        for layer in self.layers:
            h_TD = F.layer_norm(x_TD, (WIDTH,))
            y_TD = checkpoint(layer, h_TD, context, use_reentrant=False) if self.checkpointing else layer(h_TD, context)
            x_TD = x_TD + y_TD
        # What wraps a model may copy what it is called with, and lose what layers leave there.
        assert [len(context.routings_of(layer)) for layer in self.layers] == [1, 1]
        targets_T = ids_BS.roll(1, dims=1).flatten()
        losses_T = F.cross_entropy(self.head(x_TD), targets_T, reduction="none")
        weights = dict.fromkeys(loss_names(context), self.auxiliary)
        return losses_T.mean() + auxiliary_loss(self.layers, context, weights, token_losses=losses_T)


def loss_names(context):
    """Return every loss that the routers of a pass have."""
    (router,) = {type(entry.layer.router): entry.layer.router for entry in context.routings}.values()
    routing = context.routings[0].routing
    generic = ROUTING_LOSSES if routing.for_losses.logits_TE is not None and routing.experts_TK is not None else ()
    own = {"local_balance"}  # of each process by itself, so that it depends on their number
    return sorted({*routing.losses, *router.default_loss_weights, *generic} - own)


def noise_by_place():
    """Let random draws depend on nothing, so that a share of a batch draws what the whole would."""
    torch.randn_like = torch.zeros_like
    torch.rand_like = lambda x, **options: torch.full_like(x, 0.25)
    torch.Tensor.uniform_ = lambda x, low=0.0, high=1.0, **options: x.fill_((low + high) / 2)
    torch.Tensor.exponential_ = lambda x, rate=1.0, **options: x.fill_(1 / rate)


def train(name, how, rank, ranks, device):
    how, _, recomputed = how.partition("-")
    torch.manual_seed(0)
    model = Model(name, checkpointing=bool(recomputed)).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    parallel = model.to(device)
    if ranks > 1 and how == "ddp":
        parallel = DistributedDataParallel(model)
    elif ranks > 1:
        shard_model(model, init_device_mesh(device.type, (ranks,)), 1 if how == "fsdp" else int(how))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, optimizer, STEPS, token_counts=torch.arange(VOCABULARY) + 1)
    share = SEQUENCES // ranks
    losses = []
    for step in range(STEPS):
        ids_BS = torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(100 + step))
        first = rank * share
        torch.manual_seed(step)
        loss = parallel(ids_BS[first : first + share].to(device), first, step)
        optimizer.zero_grad()
        loss.backward()
        if ranks > 1 and how != "ddp":
            average_gradients(model.parameters())
        optimizer.step()
        losses.append(float(sum_over_ranks(loss.detach(), all_ranks())) / ranks)
    whole = {n: value.full_tensor() if isinstance(value, DTensor) else value for n, value in model.state_dict().items()}
    return {"losses": losses, "state": {name: summary(value) for name, value in whole.items()}}


def summary(value):
    """Return one number that tells elements apart, and their places."""
    numbers = value.double().flatten().cpu()
    return (numbers * torch.cos(torch.arange(len(numbers), dtype=torch.float64))).sum().item()


def variants():
    """Return routers of which an option changes what is taken over a batch."""
    top_k = routerzoo.registry.router_class("TopKRouter")
    selective = routerzoo.registry.router_class("SelectiveSinkhornRouter")
    return {
        "noisy": partial(routerzoo.LinearRouter, noisy=True),
        "loss-free": partial(top_k, bias_speed=0.01),
        "transport": partial(selective, probability=0.5),
    }


def main(how, rank, ranks, port, file, kind):
    torch.set_num_threads(1)
    device = torch.device("cpu") if kind == "cpu" else torch.device("cuda", rank)
    if kind == "cuda":
        torch.cuda.set_device(device)
    routerzoo.registry.load_plugins()
    if ranks > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group(
            "gloo" if kind == "cpu" else "nccl", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
        )
    noise_by_place()
    results = {}
    for label, router in ({name: name for name in routerzoo.list_routers()} | variants()).items():
        try:
            results[label] = train(router, how, rank, ranks, device)
        except UserError as error:
            results[label] = {"refused": str(error)}
    if rank == 0:
        with open(file, "w", encoding="utf-8") as out:
            json.dump(results, out)
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], sys.argv[6])
