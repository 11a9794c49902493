"""Norms of experts: as a metric, and in training with warnings."""

import math

import pytest
import torch
from lightning import Trainer

from routerzoo import MoE, moe_layers
from routerzoo.callbacks import ExpertNormMonitor
from routerzoo.callbacks.expert_norms import ExpertNormWarning
from routerzoo.errors import UserError
from routerzoo.metrics import ExpertNorms
from routerzoo.metrics.expert_norms import norm_statistics, parameter_norms
from tests.callbacks.plain import QUIET, Plain, loader


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameter_norms_are_those_of_each_expert(dtype):
    experts = MoE(d_model=8, num_experts=4, experts="SwiGLUExperts").experts.to(dtype)
    expected = [math.sqrt(sum(p[e].detach().float().square().sum() for p in experts.parameters())) for e in range(4)]
    assert parameter_norms(experts, 4).tolist() == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        experts.down[2, 0, 0] = torch.nan
    assert parameter_norms(experts, 4)[2] == torch.inf
    assert parameter_norms(experts.to("meta"), 4).isnan().all()


def test_norms_are_over_the_median_of_those_that_are_known():
    statistics = norm_statistics(torch.tensor([1.0, torch.nan, 4.0, 2.0]))
    assert statistics == {"largest": 2, "smallest": 0.5}
    assert norm_statistics(torch.tensor([torch.nan]))["largest"].isnan()


def test_rows_of_no_expert_are_left_out_and_nan_is_infinite():
    metric = ExpertNorms(2)
    metric.update(torch.tensor([[3.0, 4.0], [torch.nan, 1.0], [9.0, 9.0]]), torch.tensor([1, 2], dtype=torch.int32))
    assert metric.norms_E.tolist() == [5, torch.inf]
    metric.update(torch.tensor([[0.0, 7.0]]), torch.tensor([1, 1]))
    assert metric.norms_E.tolist() == [6, torch.inf]
    with pytest.raises(ValueError, match="there are 3 experts, the metric is of num_experts = 2"):
        metric.update(torch.ones(3, 1), torch.tensor([1, 2, 3]))


def test_training_logs_norms_and_warns_once_of_an_expert():
    module = Plain()
    with torch.no_grad():
        for parameter in module.second.experts.parameters():
            parameter[3] *= 4
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=1e-3)
    monitor = ExpertNormMonitor(output_limits=(0.1, 3.0))
    trainer = Trainer(**{**QUIET, "log_every_n_steps": 2, "max_steps": 4}, callbacks=[monitor])
    with pytest.warns(ExpertNormWarning) as warned:
        trainer.fit(module, loader(), loader(1))
    told = [str(w.message) for w in warned if w.category is ExpertNormWarning]
    assert len({text.split(":")[0] for text in told}) == 1
    assert told[0].startswith("expert 3 of MoE layer 1 explodes: the norm of its parameters is ")
    assert len(told) == 2  # its parameters, its outputs
    logged = trainer.callback_metrics
    norms_E = parameter_norms(module.second.experts, 4)
    assert logged["train/moe1/parameter_norm_largest"] == pytest.approx(float(norms_E.max() / norms_E.median()))
    assert logged["train/moe1/output_norm_largest"] > 3
    assert 0.5 < logged["train/moe0/output_norm_smallest"] <= 1
    assert not any(layer.experts._forward_hooks for layer in moe_layers(module))


def test_limits_surround_the_median():
    with pytest.raises(UserError, match="output_limits must be a number below 1 and one above 1, got 2 and 3"):
        ExpertNormMonitor(output_limits=(2, 3))
