"""Routings and contexts in what Lightning moves, collates and returns."""

import torch
from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader

from routerzoo import MoE, RoutingContext
from tests.callbacks.plain import QUIET


class Returning(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = MoE(d_model=8, num_experts=4)

    def training_step(self, batch, batch_idx):
        x_TD, context = batch
        return self.layer(x_TD, context).square().mean()

    def predict_step(self, batch, batch_idx):
        x_TD, context = batch
        self.layer(x_TD, context)
        return context.routings

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def with_context(rows):
    return torch.stack(rows), RoutingContext(padding_mask=torch.tensor([False, False, True]))


def batches():
    return DataLoader(torch.randn(6, 8), batch_size=3, collate_fn=with_context)


def test_a_batch_may_hold_a_context_and_predictions_may_be_routings():
    module = Returning()
    trainer = Trainer(**QUIET)
    trainer.fit(module, batches())
    assert trainer.global_step == 2
    predictions = trainer.predict(module, batches())
    assert [len(routings) for routings in predictions] == [1, 1]
    for ((published,),) in zip(predictions, strict=True):
        assert published.layer is module.layer
        assert published.routing.expert_load(4).sum() == 2 * 2  # the third token is padding
        assert published.routing.experts_TK.device.type == "cpu"
