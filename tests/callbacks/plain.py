"""A `LightningModule` of somebody else's, with MoE layers that have no numbers."""

import torch
from lightning import LightningModule
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from routerzoo import MoE, RoutingContext

TOKENS, BATCHES, PADDING = 5, 8, 2
"""Tokens of a batch and batches of an epoch; the last tokens of each batch are padding where that is asked for."""
QUIET = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "logger": False,
    "num_sanity_val_steps": 0,
    "max_epochs": 1,
}


class Plain(LightningModule):
    """Calls its first layer once and its second layer twice; k is 2 of 4 experts."""

    def __init__(self, *, optimizers=1, backward="manual_backward", skipped=(), padded=False, recomputes=False):
        super().__init__()
        self.first, self.second = (MoE(d_model=8, num_experts=4) for _ in range(2))
        self.mean, self.outputs, self.ks = MeanMetric(), [], []
        self.automatic_optimization = optimizers == 1
        self.num_optimizers, self.backward_with = optimizers, backward
        self.skipped, self.padded, self.recomputes = skipped, padded, recomputes

    def forward(self, x_TD):
        mask_T = torch.arange(len(x_TD)) >= len(x_TD) - PADDING if self.padded else None
        context = RoutingContext(padding_mask=mask_T)
        x_TD = self.first(x_TD, context)
        x_TD = self.second(x_TD, context)
        if self.recomputes:
            return checkpoint(self.second, x_TD, context, use_reentrant=False)
        return self.second(x_TD, context)

    def training_step(self, batch, batch_idx):
        self.ks.append(self.first.router.top_k)
        loss = self(batch).square().mean()
        if batch_idx in self.skipped:
            return None
        self.log("train/loss", loss)
        if self.automatic_optimization:
            return loss
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss) if self.backward_with == "manual_backward" else loss.backward()
        for optimizer in self.optimizers():
            optimizer.step()
        return None

    def validation_step(self, batch, batch_idx):
        loss = self(batch).square().mean()
        self.outputs.append(loss)
        self.mean.update(loss)
        self.log("val/loss", self.mean)

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self(batch).square().mean())

    def predict_step(self, batch, batch_idx):
        return self(batch)

    def on_validation_epoch_start(self):
        self.mean.reset()  # one that `Trainer.validate` has reset cannot be updated outside inference mode

    def on_validation_epoch_end(self):
        self.log("val/batches", float(len(self.outputs)))
        self.outputs.clear()

    def configure_optimizers(self):
        layers = (self.first, self.second)[: self.num_optimizers]
        if self.num_optimizers == 1:
            return torch.optim.SGD(self.parameters(), lr=0.1)
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in layers]


def loader(seed=0, batch_size=TOKENS):
    x = torch.randn(BATCHES * TOKENS, 8, generator=torch.Generator().manual_seed(seed))
    return DataLoader(x, batch_size=batch_size)
